"""Stages of a training run: which network is trained, for how long, and with which objective.

The batch, the crops and the degradation are those of the whole run. A stage that trains the regression
network comes before those that train the chain, which starts from what that network estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Stage:
    """A part of a run.

    Fields:
        steps: Number of steps; None for the last stage, which has the rest of `train.steps`. 0 leaves a stage
            out.
        trains: "regression" trains the regression network of the model alone, "chain" the U-Net with that
            network frozen.
        lr: Learning rate; None is `optim.lr`.
        decay_steps: Number of steps at the end of the stage in which the learning rate falls linearly to
            zero, while the average of the weights forgets what came before (`DECAYING_AVERAGE`).
        lpips, features, lattice, artifacts, adversary: Weights of the terms of the same name in `LossConfig`;
            None is that of the run.
    """

    steps: int | None = None
    trains: Literal["regression", "chain"] = "chain"
    lr: float | None = None
    decay_steps: int = 0
    lpips: float | None = None
    features: float | None = None
    lattice: float | None = None
    artifacts: float | None = None
    adversary: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "decay_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"stages: {name} must not be negative, got {getattr(self, name)}")
        if self.lr is not None and self.lr <= 0:
            raise ValueError(f"stages: lr must be positive, got {self.lr}")

    @property
    def weights(self) -> dict[str, float]:
        """Weights of terms that differ from those of the run, by name."""
        names = ("lpips", "features", "lattice", "artifacts", "adversary")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


class Span(NamedTuple):
    """Place of a stage in its run.

    Fields:
        i_stage: Index of the stage.
        stage: The stage.
        end: Step with which it is over.
        part_start: First step that trains the same network; the warm-up begins there.
    """

    i_stage: int
    stage: Stage
    end: int
    part_start: int


def span_at(stages: Sequence[Stage], step: int, num_steps: int) -> Span:
    """Return the stage that the step with index `step` belongs to; beyond the end of a run its last one.

    Args:
        stages: Stages of the run, at least one.
        step: Index of a step, from 0.
        num_steps: Number of steps of the run.
    """
    start = part_start = 0
    trained = stages[0].trains
    for i, stage in enumerate(stages):
        if stage.trains != trained:
            trained, part_start = stage.trains, start
        end = num_steps if stage.steps is None else start + stage.steps
        if step < end or i == len(stages) - 1:
            return Span(i, stage, end, part_start)
        start = end
    raise AssertionError("a run has at least one stage")


def check_stages(stages: Sequence[Stage], num_steps: int) -> None:
    """Check that stages and the length of their run agree.

    Raises:
        ValueError: They do not; the message says what would.
    """
    *earlier, last = stages
    steps = [stage.steps for stage in stages]
    if None in steps[:-1] or last.steps is not None:
        raise ValueError(
            "stages: every stage but the last needs steps, and the last has the rest of train.steps, got "
            f"steps of {steps}"
        )
    before = sum(stage.steps or 0 for stage in earlier)
    if num_steps <= before:
        raise ValueError(
            f"train.steps must be more than {before}, the steps of the stages before the last, got "
            f"{num_steps}; stages.0.steps, for example, makes one shorter"
        )
    trains = [stage.trains for stage in stages]
    if trains != sorted(trains, key=lambda name: name != "regression"):
        raise ValueError(f"stages: the regression network is trained before the chain, got {trains}")
