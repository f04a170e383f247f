"""Weights: reading files in all released wrappings, loading strictly, storing as safetensors.

Pickles are opened with `weights_only=True` only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resshift.config import ModelConfig
from resshift.models.files import (
    METADATA_KEY,
    AnyModelConfig,
    ModelFiles,
    WeightsError,
    described,
    write_model_config,
)
from resshift.models.locations import local_file
from resshift.networks.config import RegressionConfig

# Buffers that are computed from shapes. Released checkpoints contain them; their values in files are ignored.
_DERIVED = ("attn_mask", "relative_position_index")
_WRAPPERS = ("module.", "_orig_mod.")
# Where training checkpoints of the field keep the weights, the first that is there; averages before the rest.
_SECTIONS = ("params_ema", "params", "model_state_dict", "state_dict", "model", "net")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a network of ours; as `read_tensors`, without derived buffers."""
    return {key: value for key, value in read_tensors(path).items() if not is_derived(key)}


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read weights from safetensors or from a pickle in any of the released wrappings. No code of a pickle is
    run.

    Accepted are a raw dict of tensors, a training checkpoint with the dict under a name such as "state_dict"
    or "params_ema", and keys that begin with "module." (DDP) and "_orig_mod." (torch.compile) in any order.

    Args:
        path: `.safetensors` file, or any file that `torch.load` reads; a path, file://, s3:// or
            hf://OWNER/NAME/FILE.

    Returns:
        Tensors on the CPU, with the dtype of the file.

    Raises:
        WeightsError: The file does not hold tensors, or would execute code.
    """
    path = local_file(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")
    try:
        loaded: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch.load raises almost any error for damaged files
        raise WeightsError(f"{path} cannot be read as weights: {_reason(error)}") from error
    if isinstance(loaded, Mapping):
        loaded = next((loaded[name] for name in _SECTIONS if isinstance(loaded.get(name), Mapping)), loaded)
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} does not hold a dict of tensors")
    state = {_unwrapped(str(key)): value for key, value in loaded.items()}
    if len(state) != len(loaded):
        raise WeightsError(f"{path} holds the same key with and without a wrapper prefix")
    return state


def _reason(error: Exception) -> str:
    """Return one line. The texts of torch are pages, and advise to run the code."""
    text = str(error)
    if code := re.search(r"GLOBAL (\S+)", text):
        return f"it asks to run code ({code[1]}), which is not done; a file of weights holds tensors only"
    if "TorchScript" in text:
        return "it is a TorchScript archive; save the state_dict of its module instead"
    if isinstance(error, SafetensorError | PermissionError):
        return text
    return f"it is damaged, incomplete or no file of weights ({type(error).__name__})"


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        for prefix in _WRAPPERS:
            key = key.removeprefix(prefix)
    return key


def is_derived(key: str) -> bool:
    """Tell whether a key names a buffer that is computed from shapes, which is neither stored nor loaded."""
    return key.rsplit(".", 1)[-1] in _DERIVED


def state_to_store(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the state dict of a module on the CPU, contiguous, without derived buffers, and cast to `dtype`
    unless it is None.
    """
    return {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in module.state_dict().items()
        if not is_derived(key)
    }


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a module. Every parameter must be present with its shape, and nothing else.

    Raises:
        WeightsError: The weights do not fit; the message lists the missing, unexpected and mismatched keys.
            The module is not changed.
    """
    ours = {key: value for key, value in module.state_dict().items() if not is_derived(key)}
    theirs = {key: value for key, value in state.items() if not is_derived(key)}
    problems = [
        *_problem("missing", sorted(ours.keys() - theirs.keys())),
        *_problem("unexpected", sorted(theirs.keys() - ours.keys())),
        *_problem(
            "of another shape",
            [
                f"{key} {tuple(theirs[key].shape)} instead of {tuple(ours[key].shape)}"
                for key in sorted(ours.keys() & theirs.keys())
                if ours[key].shape != theirs[key].shape
            ],
        ),
    ]
    if problems:
        raise WeightsError("the weights do not fit the network: " + "; ".join(problems))
    module.load_state_dict(theirs, strict=False)  # strict was checked above; only derived buffers are absent


def _problem(kind: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"{len(names)} {kind} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"]


def save_safetensors(
    state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors to a file through a temporary name, so that the final name is never that of an incomplete
    file.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Streamed from the tensors; `save` would hold a second copy of all of them.
    save_file(dict(state), temporary, metadata=dict(metadata or {}))
    shown = os.umask(0)
    os.umask(shown)
    temporary.chmod(0o666 & ~shown)  # as any other file; save_file makes it readable by its owner only
    temporary.replace(path)


def save_model(
    directory: str | Path,
    name: str,
    config: AnyModelConfig,
    unet: nn.Module,
    first_stage: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory that `Upscaler.from_pretrained` reads; the configuration is written last.

    Args:
        directory: Directory of the model, which is created if it is absent.
        name: Name of the model in reports.
        config: Configuration of the model.
        unet: U-Net, or the one network of a model without a chain, stored as model.safetensors.
        first_stage: First stage, stored as first_stage.safetensors if it has parameters.
        dtype: Dtype of the stored weights, for example torch.float16 for half the size; None keeps theirs.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_safetensors(
        state_to_store(unet, dtype), directory / "model.safetensors", model_metadata(name, config)
    )
    if first_stage is not None and any(True for _ in first_stage.parameters()):
        save_safetensors(state_to_store(first_stage, dtype), directory / "first_stage.safetensors")
    write_model_config(directory, name, config)


def copy_model(found: ModelFiles, directory: Path) -> ModelFiles:
    """Write the files of a model as a model directory: its tensors in the precision that they have.

    Args:
        found: Model.
        directory: Directory of the copy, which is created if it is absent.

    Returns:
        The copy.

    Raises:
        WeightsError: The files cannot be read.
    """
    name = found.name.partition("@")[0]  # a precision is chosen by who uses the model
    read = read_state_dict if isinstance(found.config, ModelConfig | RegressionConfig) else read_tensors
    states = {"model": read(found.unet)}
    if found.first_stage is not None:
        states["first_stage"] = read_state_dict(found.first_stage)
    directory.mkdir(parents=True, exist_ok=True)
    for part, state in states.items():
        metadata = model_metadata(name, found.config) if part == "model" else {}
        state = {key: value.contiguous() for key, value in state.items()}
        save_safetensors(state, directory / f"{part}.safetensors", metadata)
    write_model_config(directory, name, found.config)
    stage = directory / "first_stage.safetensors" if "first_stage" in states else None
    return ModelFiles(name, found.config, directory / "model.safetensors", stage)


def model_metadata(name: str, config: AnyModelConfig) -> dict[str, str]:
    """Return the safetensors metadata with which a weight file can be used without a `config.json`."""
    return {METADATA_KEY: json.dumps(described(name, config))}
