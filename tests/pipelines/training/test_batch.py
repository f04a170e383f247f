"""A batch is shared by workers and fills their GPUs, or is refused with what would do."""

from __future__ import annotations

import pytest

from pipelines.training.batch import check_batch, sharing
from resshift.config import ConfigError, with_settings
from resshift.presets import preset
from resshift.training.optimizer import run_learning_rate


@pytest.mark.parametrize(
    ("workers", "settings", "told"),
    [
        (1, [], "1 worker x 96 samples in 8 micro-batches; learning rate 5e-05"),
        (8, [], "8 workers x 12 samples in 1 micro-batch; learning rate 5e-05"),
        (
            64,
            ["train.batch_size=768", "optim.lr_batch=96"],
            "64 workers x 12 samples in 1 micro-batch; learning rate 0.000141",
        ),
    ],
)
def test_realsr_fills_1_8_and_64_gpus(workers: int, settings: list[str], told: str) -> None:
    config = with_settings(preset("realsr-x4-s4"), settings)
    check_batch(config, workers, gpus=1.0)
    assert sharing(config, workers, workers) == f"a step of {config.train.batch_size}: {told}"


def test_each_stage_has_its_learning_rate() -> None:
    config = with_settings(preset("tiny-x4"), ["stages.1.steps=0"])
    assert sharing(config, 1, 1).endswith("; learning rate 0.001, 0.0003")


@pytest.mark.parametrize(("name", "workers"), [("realsr-x4-s4", 64), ("tiny-x4-swin", 8), ("vq-f4", 64)])
def test_a_batch_that_leaves_gpus_idle_is_refused_and_the_advice_is_good(name: str, workers: int) -> None:
    from resshift.training.autoencoder import AUTOENCODER_PRESETS

    config = AUTOENCODER_PRESETS[name]() if name in AUTOENCODER_PRESETS else preset(name)
    with pytest.raises(ConfigError, match=f"gives {workers} GPUs .* use at most ") as caught:
        check_batch(config, workers, gpus=1.0)
    check_batch(config, workers, gpus=0.0)  # CPUs have no batch that they need
    advice = str(caught.value)
    told = advice[advice.index("(--set") + 1 : advice.index("), or say")].replace("--set ", "").split()
    larger = with_settings(config, told)
    check_batch(larger, workers, gpus=1.0)
    seen = [one.train.steps * one.train.batch_size for one in (config, larger)]
    assert seen[1] == pytest.approx(seen[0], rel=0.01)
    few = advice.rsplit("--set ", 1)[1].rstrip(")")
    check_batch(with_settings(config, [few]), workers, gpus=1.0)


def test_more_workers_than_samples_are_refused_everywhere() -> None:
    with pytest.raises(ConfigError, match=r"train.batch_size \(8\) must be at least .* \(9\)"):
        check_batch(preset("tiny-x4-swin"), 9, gpus=0.0)


def test_uneven_shares_are_told() -> None:
    told = sharing(with_settings(preset("tiny-x4-swin"), ["train.micro_batch=2"]), 2, 3)
    assert "2 workers x 4 samples in 2 micro-batches; 3 workers x 2 or 3 samples in 2 micro-batches" in told


def test_learning_rate_follows_the_batch_by_the_rule_that_is_asked_for() -> None:
    base = preset("realsr-x4-s15")  # constant after the warm-up
    for rule, factor in (("sqrt", 2.0), ("linear", 4.0)):
        config = with_settings(
            base,
            ["train.batch_size=256", "optim.lr_batch=64", f"optim.lr_rule={rule}", "optim.warmup_steps=10"],
        )
        rates = [run_learning_rate(step, config.optim, config.train) for step in (0, 10_000)]
        assert rates == pytest.approx([5e-6 * factor, 5e-5 * factor])
    assert run_learning_rate(9_000, base.optim, base.train) == 5e-5
