"""The full state of a training run as a directory.

    run.json            configuration, fingerprint, step, position in the data, versions
    config.json         name and model configuration, so that the directory is also a model directory
    model.safetensors   weights of the network; those of a discriminator are in discriminator.safetensors
    ema.safetensors     moving average of the weights, which inference uses
    state.pt            optimisers, loss scaler, running means, step
    files.json          size and sha256 of each of the above; written last, so a directory with it is complete

In a run with sharded networks every worker writes its part of the weights and of the optimisers' moments
(`resshift.training.parts`), which then are in no other file; the average, which users need, stays whole:

    part-00000-of-00004.safetensors

`take` copies the state from the networks, so that writing and uploading the copy can overlap with the next
steps. `load` checks every file against `files.json`; both forms serve any number of workers, sharded or not.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resshift import __version__
from resshift.config import ConfigError, RunConfig, differing_fields, fingerprint, to_dict
from resshift.models import WeightsError
from resshift.training import parts
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.parts import Held, Place
from resshift.training.step import TrainState
from resshift.weights import model_metadata, read_state_dict, save_safetensors

MANIFEST = "files.json"


class ResumeRefused(ConfigError):
    """The directory holds another run; the message names the fields that differ."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a run at one step, on the CPU, which does not change as training goes on.

    Fields:
        step: Step.
        weights: Whole weights by network, of a sharded run those of the average.
        rest: The rest of the state; empty on a worker that only writes a part.
        place: Place of this worker in a sharded run; None in others.
        parts: This worker's part of a sharded state.
    """

    step: int
    weights: dict[str, dict[str, Tensor]]
    rest: dict[str, Any]
    place: Place | None = None
    parts: Mapping[str, Held] = field(default_factory=dict[str, Held])

    @property
    def leads(self) -> bool:
        """Whether it is that of the first worker."""
        return bool(self.rest)


def run_record(config: AnyRunConfig, **extra: Any) -> dict[str, Any]:
    """Return the content of `run.json`: configuration, fingerprint, versions, and `extra`."""
    versions = {name: version(name) for name in ("numpy", "opencv-python-headless")}
    versions |= {
        "torch": str(torch.__version__),
        "resshift": __version__,
        "python": platform.python_version(),
    }
    return {
        "preset": config.preset,
        "fingerprint": fingerprint(config),
        "config": to_dict(config),
        "versions": versions,
    } | extra


def check_same_run(config: AnyRunConfig, record: dict[str, Any], where: str) -> None:
    """Check that a run is continued with its own configuration.

    Raises:
        ResumeRefused: The configuration differs; the message names every field that differs.
    """
    differing = differing_fields(to_dict(config), record["config"])
    if differing:
        raise ResumeRefused(
            f"{where} holds another run; differing: {'; '.join(differing)}. Use another --out, or restore "
            "these values"
        )


def take(state: TrainState) -> Snapshot:
    """Copy what the first worker has to write of a run: everything, or in a sharded run its own part and what
    is not sharded. A collective operation: every worker must call it or `take_part` at the same step.
    """
    if state.place is None:
        return Snapshot(state.step, state.weights(), state.state_dict())
    weights, rest = state.weights(average_only=True), state.state_dict(moments=False)
    return Snapshot(state.step, weights, rest, state.place, parts.held(state.shared_tensors(), state.place))


def take_part(state: TrainState) -> Snapshot | None:
    """Do what `take` needs of the other workers, and copy this one's part of a sharded state; None if it has
    nothing to write.
    """
    place = state.place
    state.weights(keep=False, average_only=place is not None)
    state.state_dict(keep=False, moments=place is None)
    if place is None or place.replica:
        return None
    return Snapshot(state.step, {}, {}, place, parts.held(state.shared_tensors(), place))


def part_name(index: int, count: int) -> str:
    """Return the name of the file with a worker's part of the state."""
    return f"part-{index:05d}-of-{count:05d}.safetensors"


def description(config: AnyRunConfig) -> dict[str, Any]:
    """Return the content of `config.json`: the name, and the configuration that inference needs."""
    model = (
        {"model": to_dict(config.model)}
        if isinstance(config, RunConfig)
        else {"first_stage": to_dict(config.first_stage)}
    )
    return {"name": config.preset} | model


def write(directory: str | Path, snapshot: Snapshot, config: AnyRunConfig) -> dict[str, Any]:
    """Write a snapshot to `directory`, which is created, and return its manifest, the content of
    `files.json`. Of a sharded run that is the manifest of this worker's files.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if snapshot.place is not None:
        parts.write(directory / part_name(snapshot.place.index, snapshot.place.count), snapshot.parts)
    if snapshot.leads:
        _write_whole(directory, snapshot, config)
    files = {path.name: file_facts(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    manifest = {"step": snapshot.step, "fingerprint": fingerprint(config), "files": files}
    (directory / MANIFEST).write_text(manifest_text(manifest))
    return manifest


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return the content of `files.json`."""
    return json.dumps(manifest, indent=2) + "\n"


def _write_whole(directory: Path, snapshot: Snapshot, config: AnyRunConfig) -> None:
    metadata = model_metadata(config.preset, config.model) if isinstance(config, RunConfig) else {}
    for name, weights in snapshot.weights.items():
        save_safetensors(
            weights, directory / f"{name}.safetensors", metadata if name in ("model", "ema") else {}
        )
    torch.save(snapshot.rest, directory / "state.pt")
    (directory / "config.json").write_text(json.dumps(description(config), indent=2) + "\n")
    record = run_record(config, step=snapshot.step, rows=snapshot.step * config.train.batch_size)
    (directory / "run.json").write_text(json.dumps(record, indent=2) + "\n")


def file_facts(path: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size_bytes": path.stat().st_size, "sha256": digest}


def verify(directory: str | Path) -> dict[str, Any]:
    """Check all files of a checkpoint against its manifest, and return the manifest.

    Raises:
        WeightsError: There is no manifest, or a file is missing or has changed; the message names it.
    """
    directory = Path(directory)
    try:
        manifest: Any = json.loads((directory / MANIFEST).read_text())
        files: dict[str, Any] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{directory} is not a complete checkpoint: {error}") from error
    for name, facts in files.items():
        path = directory / name
        if not path.is_file():
            raise WeightsError(f"{directory} lacks {name}")
        if file_facts(path) != facts:
            raise WeightsError(f"{path} is damaged: size or sha256 differ from {MANIFEST}")
    return manifest


def load(directory: str | Path, state: TrainState, config: AnyRunConfig, rank: int = 0) -> None:
    """Restore the state of a run from a checkpoint.

    Args:
        directory: Directory of the checkpoint.
        state: State at step 0 with the networks of the same configuration, sharded or not.
        config: Configuration of the run.
        rank: Rank of this worker.

    Raises:
        ResumeRefused: The checkpoint belongs to a run with another configuration.
        WeightsError: A file is missing, damaged or does not fit. The state is not changed.
    """
    directory = Path(directory)
    manifest = verify(directory)
    record = json.loads((directory / "run.json").read_text())
    check_same_run(config, record, str(directory))
    rest = _read_rest(directory / "state.pt")
    if written := [name for name in manifest["files"] if name.startswith("part-")]:
        shared = parts.Parts(directory / name for name in written)
        state.load_parts(shared, parts.Parts([directory / "ema.safetensors"]), rest)
        state.load_state_dict(rest, rank)
        return
    # Every file is read before the state is changed.
    weights = {name: read_state_dict(directory / f"{name}.safetensors") for name in (*state.networks, "ema")}
    state.load_weights(weights)
    state.load_state_dict(rest, rank)


def _read_rest(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
