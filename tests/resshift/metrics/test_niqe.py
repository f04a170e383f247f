"""NIQE: fits of known distributions, and what must not change the distance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from resshift.metrics.niqe import Niqe, features, fit_asymmetric_gaussian


def photo_like(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture with texture at every scale, (H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.normal(size=(height, width)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]) + 1 / max(
        height, width
    )
    grey = np.fft.irfft2(spectrum / frequency, (height, width))
    grey = 128 + 45 * (grey - grey.mean()) / grey.std()
    return np.repeat(grey.clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)


def parameters(path: Path, mean: np.ndarray, covariance: np.ndarray) -> Path:
    np.savez(path, mu_pris_param=mean[None], cov_pris_param=covariance)
    return path


@pytest.mark.parametrize(
    ("draw", "shape", "scale"),
    [
        (lambda rng: rng.normal(0, 3, 400_000), 2.0, 3 * np.sqrt(2)),
        (lambda rng: rng.laplace(0, 3, 400_000), 1.0, 3.0),
        (lambda rng: rng.uniform(-3, 3, 400_000), 9.9, None),
    ],
)
def test_known_distributions_are_recognised(
    draw: Callable[[np.random.Generator], np.ndarray], shape: float, scale: float | None
) -> None:
    found, left, right = fit_asymmetric_gaussian(draw(np.random.default_rng(1)))
    assert found == pytest.approx(shape, rel=0.03)
    assert left == pytest.approx(right, rel=0.02)
    if scale is not None:
        assert left == pytest.approx(scale, rel=0.03)


def test_two_sides_are_told_apart() -> None:
    rng = np.random.default_rng(2)
    x = np.abs(rng.normal(size=600_000))
    x = np.where(
        rng.random(len(x)) < 1 / 3, -x, 2 * x
    )  # an asymmetric Gaussian has its sides in proportion to their scales
    shape, left, right = fit_asymmetric_gaussian(x)
    assert shape == pytest.approx(2, rel=0.03)
    assert right / left == pytest.approx(2, rel=0.02)


def test_a_side_without_samples_has_no_shape() -> None:
    assert np.isnan(fit_asymmetric_gaussian(np.array([1.0, 2.0]))).all()


def test_features_are_those_of_whole_blocks() -> None:
    y = photo_like(200, 300)[..., 0]
    assert features(y).shape == (2 * 3, 36)
    np.testing.assert_array_equal(features(y), features(y[:192, :288]))
    assert features(y[:95]).shape == (0, 36)


def test_distance_to_the_picture_itself_is_zero(tmp_path: Path) -> None:
    picture = photo_like(192, 288)
    found = features(np.round(picture[..., 0] * (219 / 255) + 16).astype(np.uint8))
    own = Niqe(parameters(tmp_path / "own.npz", found.mean(axis=0), np.cov(found, rowvar=False)))
    assert own(picture) == pytest.approx(0, abs=1e-6)


def test_distance_grows_with_the_distance_of_the_means(tmp_path: Path) -> None:
    """With far wider reference statistics than the picture's own, d = |m - m_p| / (s / sqrt(2)): closed
    form.
    """
    picture = photo_like(192, 288)
    found = features(np.round(picture[..., 0] * (219 / 255) + 16).astype(np.uint8))
    for step in (1.0, 2.0):
        mean = found.mean(axis=0)
        mean[0] += step
        niqe = Niqe(parameters(tmp_path / "wide.npz", mean, 1e6 * np.eye(36)))
        assert niqe(picture) == pytest.approx(step * np.sqrt(2e-6), rel=1e-3)


def test_pictures_without_two_textured_blocks_are_not_measured(tmp_path: Path) -> None:
    niqe = Niqe(parameters(tmp_path / "p.npz", np.zeros(36), np.eye(36)))
    assert niqe(photo_like(100, 100)) is None
    assert niqe(np.full((300, 300, 3), 90, np.uint8)) is None
    assert niqe(photo_like(200, 200)) is not None
    assert niqe(photo_like(200, 200), border=10) is None


def test_bad_parameters_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        Niqe(tmp_path / "absent.npz")
    np.savez(tmp_path / "part.npz", mu_pris_param=np.zeros(36))
    with pytest.raises(ValueError, match="does not hold cov_pris_param"):
        Niqe(tmp_path / "part.npz")
    with pytest.raises(ValueError, match=r"36 means and a 36 x 36 covariance, got \(35,\)"):
        Niqe(parameters(tmp_path / "short.npz", np.zeros(35), np.eye(36)))
