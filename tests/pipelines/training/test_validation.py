"""Validation: the set, the figures of known pictures, and that the number of workers does not matter."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.shards.prepare import prepare_here
from pipelines.training.validation import Held, Validator, held_out
from resshift import degradation, images
from resshift.config import ConfigError, DataConfig, ValidationConfig
from resshift.training.step import to_unit_range

CPU = torch.device("cpu")
CROP = DataConfig(crop="random", crop_px=32)


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_folders_give_the_centre_of_pairs(tmp_path: Path) -> None:
    gt = picture(0, 48, 56)
    write(tmp_path / "gt/a.png", gt)
    write(tmp_path / "lq/a.png", picture(1, 12, 14))
    write(tmp_path / "gt/small.png", picture(2, 16, 16))  # smaller than a crop
    write(tmp_path / "lq/small.png", picture(3, 4, 4))
    write(tmp_path / "gt/odd.png", picture(4, 47, 56))  # not four times the other
    write(tmp_path / "lq/odd.png", picture(5, 12, 14))
    (held,) = held_out(f"{tmp_path}/lq:{tmp_path}/gt", 10, 0, CROP, degradation.bicubic_x4())
    assert held.key == "a"
    assert (held.lq_u8.shape, held.hq_u8.shape) == ((8, 8, 3), (32, 32, 3))
    np.testing.assert_array_equal(held.hq_u8, gt[8:40, 12:44])


def shards(root: Path, num: int = 5) -> str:
    for i in range(num):
        write(root / f"photos/{i}.png", picture(i, 40, 48))
    prepare_here(str(root / "photos"), str(root / "shards"))
    return str(root / "shards")


def test_shards_are_degraded_the_same_way_every_time(tmp_path: Path) -> None:
    root = shards(tmp_path)
    recipe = degradation.realesrgan_x4()
    first, again = (held_out(root, 3, 7, CROP, recipe) for _ in range(2))
    assert [held.key for held in first] == [held.key for held in again]
    assert len({held.key for held in first}) == 3
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.lq_u8, b.lq_u8)
    assert not np.array_equal(held_out(root, 1, 8, CROP, recipe)[0].lq_u8, first[0].lq_u8)


def test_inpainting_is_validated_with_its_masks(tmp_path: Path) -> None:
    (held,) = held_out(shards(tmp_path, 1), 1, 0, CROP, degradation.inpainting())
    assert held.mask_u8 is not None
    assert set(np.unique(held.mask_u8)) <= {0, 255}
    with pytest.raises(ConfigError, match="has no masks"):
        held_out("lq:gt", 1, 0, CROP, degradation.inpainting())


def test_bad_sources_are_said(tmp_path: Path) -> None:
    write(tmp_path / "lq/a.png", picture(1, 12, 14))
    with pytest.raises(ConfigError, match="must be LQ_DIR:GT_DIR or a directory of shards"):
        held_out("a:b:c", 1, 0, CROP, degradation.bicubic_x4())
    (tmp_path / "gt").mkdir()
    with pytest.raises(ConfigError, match="have no truth"):
        held_out(f"{tmp_path}/lq:{tmp_path}/gt", 1, 0, CROP, degradation.bicubic_x4())
    write(tmp_path / "gt/a.png", picture(1, 12, 14))
    with pytest.raises(ConfigError, match=r"no picture of .* is large enough: 32 x 32"):
        held_out(f"{tmp_path}/lq:{tmp_path}/gt", 1, 0, CROP, degradation.bicubic_x4())


class Knows:
    """Renders the truth, darker by a known number of levels."""

    def __init__(self, darker: int = 0) -> None:
        self.darker = darker
        self.batches: list[list[str]] = []

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        self.batches.append(list(keys))
        return to_unit_range(batch["hq"]) - self.darker / 127.5


def held(num: int) -> list[Held]:
    grey = [np.full((32, 32, 3), 100 + i, np.uint8) for i in range(num)]
    return [Held(f"k{i}", picture(i, 8, 8), truth) for i, truth in enumerate(grey)]


def validator(num: int, rank: int = 0, num_ranks: int = 1, grid: int = 4) -> Validator:
    return Validator(held(num), ValidationConfig(grid=grid), None, CPU, rank, num_ranks, micro_batch=2)


def test_truth_has_perfect_figures_and_a_known_error_its_own() -> None:
    result = validator(5)(Knows())
    assert result is not None
    assert result.means == {"psnr_y": 100.0, "ssim_y": pytest.approx(1.0)}
    darker = validator(1)(Knows(20))
    assert darker is not None
    # 20 levels of grey are 17.17 of luma (219 / 255), rounded for each picture: 103 - 86 = 17 or 18.
    levels = [10 ** ((20 * np.log10(255) - darker.means["psnr_y"]) / 20)]
    assert levels[0] == pytest.approx(17.2, abs=0.9)


def test_grid_shows_what_went_in_what_came_out_and_the_truth() -> None:
    result = validator(3, grid=2)(Knows(20))
    assert result is not None
    assert result.grid_u8 is not None
    assert result.grid_png is not None
    assert result.grid_u8.shape == (64, 96, 3)
    assert result.grid_u8[40, 40].tolist() == [81, 81, 81]  # the second picture, rendered
    assert result.grid_u8[40, 80].tolist() == [101, 101, 101]  # its truth
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(result.grid_png))), result.grid_u8)
    assert images.decode(result.grid_png).pixels.shape == (64, 96, 3)
    without = validator(3, grid=0)(Knows())
    assert without is not None
    assert without.grid_png is None


@pytest.mark.parametrize(("num", "num_ranks"), [(1, 3), (5, 2), (6, 3), (7, 3), (13, 3)])
def test_workers_share_the_set_and_call_equally_often(
    num: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharded weights are gathered at every call: a worker that calls once less would leave the others
    waiting for ever.
    """
    parts: list[object] = []
    monkeypatch.setattr(
        "pipelines.training.validation.dist.all_gather_object", lambda gathered, own: parts.append(own)
    )
    renderers = [Knows() for _ in range(num_ranks)]
    for rank in range(1, num_ranks):
        assert validator(num, rank, num_ranks)(renderers[rank]) is None

    def gather(gathered: list[object], own: object) -> None:
        gathered[:] = [own, *parts]

    monkeypatch.setattr("pipelines.training.validation.dist.all_gather_object", gather)
    result = validator(num, 0, num_ranks)(renderers[0])
    assert result is not None
    assert result.means["psnr_y"] == 100.0
    assert len({len(renderer.batches) for renderer in renderers}) == 1
    rendered = [key for renderer in renderers for batch in renderer.batches for key in batch]
    assert {f"k{i}" for i in range(num)} == set(rendered)
    assert len(rendered) - num <= 2 * num_ranks  # repeats fill the last round only


def test_best_by_lpips_needs_lpips() -> None:
    with pytest.raises(ConfigError, match=r"loss\.lpips must not be 0"):
        Validator(held(1), ValidationConfig(best="lpips"), None, CPU, 0, 1, 1)
