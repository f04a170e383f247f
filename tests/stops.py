"""Training that stops and goes on: what must be the same to the bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from resshift.config import RunConfig
from resshift.training import checkpoint
from resshift.training.step import Learner, TrainState

AnyLearner = TypeVar("AnyLearner", bound=Learner)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Return all weights, the average and the moments of all optimisers."""
    weights = {f"{name}.{key}": v for name, part in state.weights().items() for key, v in part.items()}
    return weights | {
        f"{name}.{i}.{key}": value
        for name, optimizer in state.optimizers.items()
        for i, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }


def check_stops(
    config: RunConfig,
    make: Callable[[], AnyLearner],
    batches: Callable[[int], Sequence[Mapping[str, Tensor]]],
    stops: Sequence[int],
    directory: Path,
) -> AnyLearner:
    """Check that a new learner which goes on from a checkpoint ends where an uninterrupted one does, bit for
    bit, and return the uninterrupted one.

    Args:
        config: Configuration of the run.
        make: Makes a learner at step 0.
        batches: Returns the batches from a step on.
        stops: Steps at which to stop.
        directory: Place for the checkpoints.
    """
    whole = make()
    for step, batch in enumerate(batches(0)):
        if step in stops:
            checkpoint.write(directory / str(step), checkpoint.take(whole.state), config)
        whole.state.means.add(*whole.step(batch))
    theirs, means = tensors(whole.state), whole.state.means.pop()
    assert max(stops) < whole.state.step
    for stop in stops:
        torch.rand(5)  # the global generator is elsewhere in a new process
        second = make()
        checkpoint.load(directory / str(stop), second.state, config)
        assert second.state.step == stop
        for batch in batches(stop):
            second.state.means.add(*second.step(batch))
        ours = tensors(second.state)
        assert ours.keys() == theirs.keys()
        assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []
        assert second.state.means.pop() == means
    return whole
