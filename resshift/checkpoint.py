"""The full state of a training run as a directory.

    run.json            configuration, fingerprint, step, versions
    config.json         name and model configuration, so that the directory is also a model directory
    model.safetensors   weights of the network
    ema.safetensors     their moving average: what inference uses
    state.pt            optimiser, step, position in the data

`save` fills a directory that nobody reads yet; whoever publishes it (a rename, or Ray Train's report) does so when it is complete.
"""

from __future__ import annotations

import json
import pickle
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from resshift import __version__
from resshift.config import RunConfig, differing_fields, fingerprint, to_dict
from resshift.training import TrainState
from resshift.weights import WeightsError, load_into, model_metadata, read_state_dict, save_safetensors, state_to_store, write_model_config


class ResumeRefused(ValueError):
    """The directory holds another run; the message names the differing fields."""


def run_record(config: RunConfig, **extra: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
    """Return what `run.json` says about a run: configuration, fingerprint, versions, and `extra`."""
    versions = {name: version(name) for name in ("numpy", "opencv-python-headless")}
    versions |= {"torch": str(torch.__version__), "resshift": __version__, "python": platform.python_version()}
    return {"preset": config.preset, "fingerprint": fingerprint(config), "config": to_dict(config), "versions": versions} | extra


def check_same_run(config: RunConfig, record: dict[str, Any], where: str) -> None:
    """Refuse to continue a run with another configuration.

    Raises:
        ResumeRefused: names every field that differs.
    """
    differing = differing_fields(to_dict(config), record["config"])
    if differing:
        raise ResumeRefused(f"{where} holds another run; differing: {'; '.join(differing)}. Use another --out, or give back these values")


def save(directory: str | Path, state: TrainState, config: RunConfig) -> None:
    """Write the whole state of a run into `directory`, which is created."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = model_metadata(config.preset, config.model)
    save_safetensors(state_to_store(state.plain), directory / "model.safetensors", metadata)
    save_safetensors(state_to_store(state.ema.module), directory / "ema.safetensors", metadata)
    torch.save(state.state_dict(), directory / "state.pt")
    write_model_config(directory, config.preset, config.model)
    (directory / "run.json").write_text(json.dumps(run_record(config, step=state.step), indent=2) + "\n")


def load(directory: str | Path, state: TrainState, config: RunConfig) -> None:
    """Bring `state` to what `directory` holds.

    Raises:
        ResumeRefused: it belongs to a run with another configuration.
        WeightsError: a file is missing or does not fit.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / "run.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise WeightsError(f"{directory} is not a checkpoint: {error}") from error
    if not isinstance(record, dict) or "config" not in record:
        raise WeightsError(f"{directory} is not a checkpoint: its run.json holds no configuration")
    check_same_run(config, record, str(directory))
    # Every file is read before the state is touched.
    weights, averaged = (read_state_dict(directory / f"{name}.safetensors") for name in ("model", "ema"))
    rest = _read_rest(directory / "state.pt")
    load_into(state.plain, weights)
    load_into(state.ema.module, averaged)
    state.load_state_dict(rest)


def _read_rest(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} cannot be read: {error}") from error
