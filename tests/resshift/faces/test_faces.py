"""Faces: the similarity against known ones, pasting against known pixels, and whole photos with an identity
in place of the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from resshift.config import OptionError, Sampling
from resshift.faces import YuNet, restore_faces
from resshift.faces.align import SIDE_PX, TEMPLATE, aligned, pasted, similarity, soft_mask
from resshift.images import Picture
from resshift.upscaler import Upscaler
from tests.faces import check_grey_faces, grey_model, photo_with, write_detector

Image = NDArray[np.uint8]
Points = NDArray[np.float64]


def smooth(height: int, width: int) -> Image:
    """A photo that linear interpolation changes by less than a level or two."""
    down, across = np.mgrid[:height, :width]
    planes = [128 + 100 * np.sin(across / 40 + i) * np.cos(down / 35 - i) for i in range(3)]
    return np.stack(planes, axis=2).round().astype(np.uint8)


def face_at(x: float, y: float, scale: float, degrees: float) -> Points:
    """Landmarks of a face whose square, scaled and turned, has its centre at (x, y)."""
    angle = np.radians(degrees)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (TEMPLATE - (SIDE_PX - 1) / 2) @ turn.T + (x, y)


class Known:
    """A detector that knows where faces are."""

    def __init__(self, *faces: Points) -> None:
        self.faces = faces

    def __call__(self, photo_u8: Image) -> Sequence[Points]:
        return self.faces


def identity(square_u8: Image, seed: int) -> Image:
    del seed
    return square_u8


@pytest.mark.parametrize(("scale", "degrees"), [(0.1, 0.0), (0.4, 30.0), (1.7, -75.0), (1.0, 179.0)])
def test_a_known_similarity_is_found(scale: float, degrees: float) -> None:
    matrix = similarity(face_at(90.0, 70.0, scale, degrees), TEMPLATE)
    angle = np.radians(-degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    np.testing.assert_allclose(matrix[:, :2], turn, atol=1e-9)
    np.testing.assert_allclose(matrix @ (90, 70, 1), [(SIDE_PX - 1) / 2] * 2, atol=1e-8)


def test_of_other_points_it_is_the_best_and_does_not_mirror() -> None:
    """A similarity is x' = a x - b y + c, y' = b x + a y + d: least squares gives the same."""
    rng = np.random.default_rng(0)
    mirrored = TEMPLATE * (-1, 1) + rng.normal(0, 20, TEMPLATE.shape)
    for source in (TEMPLATE + rng.normal(0, 20, TEMPLATE.shape), mirrored):
        x, y = source.T
        one, zero = np.ones(5), np.zeros(5)
        rows = np.concatenate([np.stack([x, -y, one, zero], 1), np.stack([y, x, zero, one], 1)])
        (a, b, c, d), *_ = np.linalg.lstsq(rows, TEMPLATE.T.reshape(-1), rcond=None)
        np.testing.assert_allclose(similarity(source, TEMPLATE), [[a, -b, c], [b, a, d]], atol=1e-8)
    with pytest.raises(ValueError, match="landmarks must be different points, got 5"):
        similarity(np.ones((5, 2)), TEMPLATE)


def test_landmarks_come_to_the_template() -> None:
    photo, landmarks = np.zeros((300, 400, 3), np.uint8), face_at(200.0, 140.0, 0.4, 20.0)
    for x, y in landmarks.round().astype(int):
        photo[y - 1 : y + 2, x - 1 : x + 2] = 255
    square = aligned(photo, similarity(landmarks, TEMPLATE))
    for x, y in TEMPLATE.round().astype(int):
        assert square[y, x].min() > 100
    assert (square > 0).mean() < 0.01


def test_a_square_is_put_where_the_mask_says() -> None:
    photo, grey = smooth(300, 400), np.full((SIDE_PX, SIDE_PX, 3), 77, np.uint8)
    to_square = np.array([[2.0, 0.0, -100.0], [0.0, 2.0, -20.0]])  # the square lies at (50, 10), 256 px
    result = pasted(photo, grey, to_square)
    share = soft_mask()[::2, ::2, None]
    expected = photo.astype(np.float32)
    expected[10:266, 50:306] += share * (77 - expected[10:266, 50:306])
    np.testing.assert_array_equal(result, np.rint(expected).astype(np.uint8))
    mask = soft_mask()
    assert (mask[0].max(), mask[255, 255], mask.min()) == (0, 1, 0)
    assert (np.diff(mask[255, :256]) >= 0).all()


def test_a_model_that_changes_nothing_gives_back_the_photo() -> None:
    """Several faces, one of them at the border, and one that is larger than the square."""
    photo = smooth(700, 900)
    faces = [face_at(200.0, 200.0, 0.3, 10.0), face_at(880.0, 350.0, 0.25, -20.0), face_at(500, 420, 1.1, 5)]
    seen: list[int] = []

    def restore(square_u8: Image, seed: int) -> Image:
        seen.append(seed)
        return square_u8

    result = restore_faces(photo, Known(*faces), restore, seed=3)
    assert (result.num_faces, result.note) == (3, "")
    assert len(set(seen)) == 3
    assert np.abs(result.pixels.astype(int) - photo).max() <= 2
    (left, *_) = restore_faces(photo, Known(faces[0]), lambda square, seed: 255 - square)
    changed = np.abs(left.astype(int) - photo).max(2) > 0
    down, across = np.nonzero(changed)
    reach = 0.3 * SIDE_PX / 2 * 2**0.5 + 1
    assert 0.2 < changed.mean() * 700 * 900 / (0.3 * SIDE_PX) ** 2 <= 1.05
    assert np.hypot(down - 200, across - 200).max() <= reach


def test_without_a_face_the_photo_is_as_it_was() -> None:
    photo = smooth(60, 80)
    result = restore_faces(photo, Known(), identity)
    assert result.pixels is photo
    assert (result.num_faces, result.note) == (0, "no face was found")


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_the_order_in_which_a_detector_names_faces_does_not_matter(order: Sequence[int]) -> None:
    """Two of them overlap: the larger one, which is nearer, is in front."""
    faces = [face_at(90.0, 80.0, 0.3, 10.0), face_at(130.0, 90.0, 0.35, 0.0), face_at(250.0, 80.0, 0.2, -5.0)]

    def paint(square_u8: Image, seed: int) -> Image:
        return np.full_like(square_u8, seed % 251)

    photo = smooth(180, 300)
    expected = restore_faces(photo, Known(*faces), paint, seed=1).pixels
    result = restore_faces(photo, Known(*[faces[i] for i in order]), paint, seed=1).pixels
    np.testing.assert_array_equal(result, expected)
    assert len({tuple(expected[y, x]) for x, y in ((30, 80), (130, 90), (250, 80))}) == 3


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_detector(tmp_path_factory.mktemp("detector") / "cells.onnx")


@pytest.fixture(scope="module")
def grey() -> Upscaler:
    return grey_model()


CELLS = [(40, 56), (120, 0), (48, 160)]  # the second at the left border


def test_yunet_gives_the_landmarks_of_its_file_in_photos_of_any_size(detector: str) -> None:
    yunet = YuNet(detector)
    template = TEMPLATE / 8 - 32
    for cells in ([], CELLS[:1], CELLS):
        found = yunet(photo_with(cells, 176, 233))
        expected = [template + np.array([left, top]) for top, left in cells]
        assert len(found) == len(expected)
        for one in expected:
            assert min(np.abs(one - other).max() for other in found) < 1e-4
    (found,) = yunet(photo_with([(40, 56)], 96, 1024).repeat(2, 0).repeat(2, 1))  # seen at half its size
    np.testing.assert_allclose(found, (template + (56, 40) + 0.5) * 2 - 0.5, atol=1e-3)
    assert len(yunet(np.zeros((1, 1, 3), np.uint8))) == 0


def test_faces_become_what_the_model_makes_of_them_and_nothing_else_changes(
    detector: str, grey: Upscaler
) -> None:
    photo = photo_with(CELLS, 176, 233)
    told: list[float] = []
    result = grey.upscale(Picture(pixels=photo), Sampling(faces=detector), told.append)
    check_grey_faces(result.pixels, photo, CELLS)
    assert result.notes == ("3 faces restored",)
    assert (len(told), told[-1]) == (3, pytest.approx(1))
    np.testing.assert_array_equal(grey(photo, faces=detector), result.pixels)


def test_a_photo_without_a_face_is_as_it_was(detector: str, grey: Upscaler) -> None:
    pixels = np.random.default_rng(1).integers(0, 65536, (50, 40, 1), np.uint16)
    picture = Picture(pixels=pixels, alpha=pixels[..., 0], notes=("first of 2 frames",))
    result = grey.upscale(picture, Sampling(faces=detector))
    assert result.pixels is pixels
    assert result.alpha is picture.alpha
    assert result.notes == ("first of 2 frames", "no face was found")


def test_sixteen_bits_and_alpha_stay(detector: str, grey: Upscaler) -> None:
    photo = photo_with(CELLS[:1], 96, 120)
    deep = photo.astype(np.uint16) * 257
    result = grey.upscale(Picture(pixels=deep, alpha=deep[..., 0]), Sampling(faces=detector))
    assert result.alpha is not None
    assert np.array_equal(result.alpha, deep[..., 0])
    check_grey_faces(result.pixels / np.float32(257), photo, CELLS[:1])


def test_options_that_do_not_go_with_faces_are_refused(detector: str, grey: Upscaler, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="outscale must be 1 where faces are restored, got 2"):
        Sampling(faces=detector, outscale=2)
    with pytest.raises(OptionError, match="faces must be the file of a face detector, got ''"):
        Sampling(faces="")
    with pytest.raises(OptionError, match="faces must not be given for tiny: a model of faces has scale 1"):
        Sampling(faces=detector).check_for("tiny", steps=1, smallest_tile_px=8)
    with pytest.raises(OptionError, match="faces must not be given where the steps of one chain are shown"):
        grey.trajectory(photo_with([], 64, 64), Sampling(faces=detector))
    with pytest.raises(OptionError, match=r"faces must be the file of a face detector: .* is not there"):
        grey(photo_with([], 64, 64), faces=str(tmp_path / "missing.onnx"))


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, got \(60, 80\) uint8"):
        restore_faces(np.zeros((60, 80), np.uint8), Known(), identity)
    with pytest.raises(ValueError, match=r"scale 1, got \(1024, 1024, 3\)"):
        restore_faces(
            smooth(200, 200),
            Known(face_at(100, 100, 0.3, 0)),
            lambda square, seed: square.repeat(2, 0).repeat(2, 1),
        )
    with pytest.raises(ValueError, match="which is not there"):
        YuNet(tmp_path / "missing.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match="must be an ONNX file, got"):
        YuNet(tmp_path / "bad.onnx")
