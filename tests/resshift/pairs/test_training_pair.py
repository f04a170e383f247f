"""One training pair: a pure function of the photo, key, epoch and seed."""

from __future__ import annotations

import io
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from resshift import degradation
from resshift.config import DataConfig
from resshift.images import ImageError
from resshift.pairs.training_pair import TrainingPair, make_pair

CROP = DataConfig(crop="random", crop_px=32)
RECIPE = replace(degradation.realesrgan_x4(), bicubic_share=0.3)


def photo(seed: int = 0, height: int = 40, width: int = 48, format: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def content(pair: TrainingPair) -> bytes:
    return (
        pair.hq_u8.tobytes()
        + pair.lq_u8.tobytes()
        + (b"" if pair.mask_u8 is None else pair.mask_u8.tobytes())
    )


def test_pair_is_a_function_of_seed_epoch_and_key() -> None:
    data = photo()

    def pair(key: str, epoch: int, seed: int) -> bytes:
        made = make_pair(data, key, epoch, seed, CROP, RECIPE)
        assert (made.hq_u8.shape, made.lq_u8.shape, made.hq_u8.dtype, made.lq_u8.dtype) == (
            (32, 32, 3),
            (8, 8, 3),
            np.uint8,
            np.uint8,
        )
        return content(made)

    variants = [pair(*arguments) for arguments in (("a", 0, 0), ("b", 0, 0), ("a", 1, 0), ("a", 0, 1))]
    assert len(set(variants)) == 4
    assert pair("a", 0, 0) == variants[0]


@pytest.mark.parametrize("shape", [(40, 40), (40, 40, 4)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_alpha_and_16_bit_photos_become_rgb(shape: tuple[int, ...], dtype: type) -> None:
    flat = np.full(shape, 100 * (257 if dtype is np.uint16 else 1), dtype)
    pair = make_pair(cv2.imencode(".png", flat)[1].tobytes(), "k", 0, 0, CROP, degradation.bicubic_x4())
    assert pair.hq_u8.shape == (32, 32, 3)
    assert np.all(pair.hq_u8 == 100)


def test_pairs_do_not_depend_on_threads_or_on_what_ran_before() -> None:
    """Large enough that OpenCV and torch share the work among their threads, and that blurs go through
    Fourier space.
    """
    data = {f"k{i}": photo(i, height=300, width=380, format="JPEG") for i in range(12)}
    crop = DataConfig(crop="short_side", crop_px=256)
    num_threads = cv2.getNumThreads(), torch.get_num_threads()
    made: list[dict[str, bytes]] = []
    try:
        for num_opencv, num_torch, keys in ((1, 1, list(data)), (4, 3, list(reversed(data)))):
            cv2.setNumThreads(num_opencv)
            torch.set_num_threads(num_torch)
            made.append(
                {
                    key: content(make_pair(data[key], key, 0, 0, crop, degradation.realesrgan_x4()))
                    for key in keys
                }
            )
    finally:
        cv2.setNumThreads(num_threads[0])
        torch.set_num_threads(num_threads[1])
    assert made[0] == made[1]


def test_a_broken_photo_is_refused() -> None:
    with pytest.raises(ImageError):
        make_pair(photo()[:60], "k", 0, 0, CROP, RECIPE)


def test_inpainting_pairs_carry_their_mask() -> None:
    crop = DataConfig(crop="random", crop_px=256)
    data = photo(height=256, width=256)
    pair = make_pair(data, "k", 0, 0, crop, degradation.inpainting())
    assert pair.mask_u8 is not None
    assert set(np.unique(pair.mask_u8)) == {0, 255}
    hole = pair.mask_u8 == 255
    np.testing.assert_array_equal(pair.lq_u8, np.where(hole[..., None], 0, pair.hq_u8))
    assert make_pair(data, "k", 0, 0, CROP, RECIPE).mask_u8 is None


def test_what_was_drawn_reproduces_the_pair() -> None:
    gray = replace(degradation.face(), face=replace(degradation.face().face, gray_prob=1.0))
    for recipe in (RECIPE, degradation.face(), gray, degradation.inpainting()):
        pair = make_pair(photo(), "k", 0, 0, CROP, recipe)
        assert pair.params is not None
        np.testing.assert_array_equal(degradation.degrade(pair.hq_u8, pair.params), pair.lq_u8)
