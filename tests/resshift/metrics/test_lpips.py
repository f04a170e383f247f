"""LPIPS: its distances, and where its weights come from."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from resshift.metrics.lpips import Lpips


@pytest.mark.slow
def test_lpips_of_equal_pictures_is_zero_and_grows_with_noise(lpips: Lpips) -> None:
    hq = torch.rand((2, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    noise = torch.randn(hq.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        distances = [float(lpips(hq, (hq + sigma * noise).clamp(-1, 1)).mean()) for sigma in (0.0, 0.05, 0.5)]
    assert distances[0] == 0
    assert distances[0] < distances[1] < distances[2]


def test_lpips_without_weights_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # A port where nobody listens: the download fails at once, as it does without a network.
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"loss\.lpips_trunk"):
        Lpips("squeeze")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Lpips("squeeze", tmp_path / "nowhere.pth")


def test_wrong_lpips_trunk_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "trunk.pth"
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a run that goes well prints none of those of torchvision
        with pytest.raises(ValueError, match=r"features\.0\.weight"):
            Lpips("squeeze", path)


def test_lpips_at_pixels_is_that_of_the_picture_where_nothing_varies(lpips: Lpips) -> None:
    """Of flat pictures every layer's map is flat but for its border, and the mean over the picture is near
    their distance; equal halves are nearer than unlike ones.
    """
    x = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = x.clone()
    y[..., :32] = -y[..., :32]
    found = lpips.at_pixels(x, y)
    assert found.shape == (1, 64, 64)
    assert found[..., :16].mean() > 2 * found[..., 48:].mean()
    torch.testing.assert_close(lpips(x, x), torch.zeros(1))  # `forward` is as before
    assert lpips(x, y).shape == (1,)
    torch.testing.assert_close(found.mean(), lpips(x, y)[0], rtol=0.15, atol=0)
