"""The full state of a training run as a directory.

    run.json            configuration, fingerprint, step, position in the data, versions
    config.json         name and model configuration, so that the directory is also a model directory
    model.safetensors   weights of the network; those of a discriminator are in discriminator.safetensors
    ema.safetensors     moving average of the weights, which inference uses
    state.pt            optimisers, loss scaler, running means, step
    files.json          size and sha256 of each of the above; written last, so a directory with it is complete

`take` copies the state from the networks, so that writing and uploading the copy can overlap with the next
steps. `load` checks every file against `files.json`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resshift import __version__
from resshift.config import ConfigError, RunConfig, differing_fields, fingerprint, to_dict
from resshift.models import WeightsError
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.step import TrainState
from resshift.weights import model_metadata, read_state_dict, save_safetensors

MANIFEST = "files.json"


class ResumeRefused(ConfigError):
    """The directory holds another run; the message names the fields that differ."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A copy of a run at one step, on the CPU, which does not change as training goes on."""

    step: int
    weights: dict[str, dict[str, Tensor]]
    rest: dict[str, Any]


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
    """Copy the state of a run. A collective operation: every worker must call it at the same step."""
    return Snapshot(state.step, state.weights(), state.state_dict())


def take_part(state: TrainState) -> None:
    """Do what `take` needs of the other workers, on one that does not write: nothing is copied."""
    state.weights(keep=False)
    state.state_dict(keep=False)


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
    `files.json`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = model_metadata(config.preset, config.model) if isinstance(config, RunConfig) else {}
    for name, weights in snapshot.weights.items():
        save_safetensors(
            weights, directory / f"{name}.safetensors", metadata if name in ("model", "ema") else {}
        )
    torch.save(snapshot.rest, directory / "state.pt")
    (directory / "config.json").write_text(json.dumps(description(config), indent=2) + "\n")
    record = run_record(config, step=snapshot.step, rows=snapshot.step * config.train.batch_size)
    (directory / "run.json").write_text(json.dumps(record, indent=2) + "\n")
    files = {path.name: file_facts(path) for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    manifest = {"step": snapshot.step, "fingerprint": fingerprint(config), "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


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
    verify(directory)
    record = json.loads((directory / "run.json").read_text())
    check_same_run(config, record, str(directory))
    # Every file is read before the state is changed.
    weights = {name: read_state_dict(directory / f"{name}.safetensors") for name in (*state.networks, "ema")}
    rest = _read_rest(directory / "state.pt")
    state.load_weights(weights)
    state.load_state_dict(rest, rank)


def _read_rest(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
