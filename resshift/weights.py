"""Weights: reading any wrapping they come in, loading them strictly, storing them as safetensors, and the registry of named models.

A model directory holds `config.json` (name and `ModelConfig`), `model.safetensors` (the U-Net) and, when the first stage has parameters,
`first_stage.safetensors`. Pickles are opened with `weights_only=True` and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from resshift.config import ConfigError, ModelConfig, from_dict, to_dict

PRETRAINED = Path(__file__).parent / "pretrained"
# Buffers that are computed from the shapes. They are in released checkpoints; what a file says about them is not trusted.
_DERIVED = ("attn_mask", "relative_position_index")
_WRAPPERS = ("module.", "_orig_mod.")
_METADATA_KEY = "resshift.model"


class WeightsError(ValueError):
    """A weight file that cannot be used; the message says what is wrong with it."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read weights from safetensors or from a pickle in any of the released wrappings.

    Accepted: a raw dict of tensors; a training checkpoint with the dict under "state_dict"; keys that begin with "module." (DDP) and
    "_orig_mod." (torch.compile) in any order. Derived buffers are dropped.

    Args:
        path: `.safetensors`, or anything that `torch.load` reads.

    Returns:
        Tensors on the CPU, with the dtype they were stored in.

    Raises:
        WeightsError: not a file of tensors, or one that would execute code.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"no weight file at {path}")
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    except Exception as error:
        # torch.load(weights_only=True) raises pickle.UnpicklingError and, for damaged streams, almost anything.
        raise WeightsError(f"{path} is not a plain file of tensors ({type(error).__name__}: {error})") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} does not hold a dict of tensors")
    state = {_unwrapped(str(key)): value for key, value in loaded.items()}
    if len(state) != len(loaded):
        raise WeightsError(f"{path} holds the same key with and without a wrapper prefix")
    return {key: value for key, value in state.items() if not is_derived(key)}


def _unwrapped(key: str) -> str:
    while key.startswith(_WRAPPERS):
        for prefix in _WRAPPERS:
            key = key.removeprefix(prefix)
    return key


def is_derived(key: str) -> bool:
    """Tell whether a key names a buffer that is computed from shapes; no file stores or gives one."""
    return key.rsplit(".", 1)[-1] in _DERIVED


def state_to_store(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the state dict of a module on the CPU, contiguous, without derived buffers, cast to `dtype` when one is given."""
    return {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items() if not is_derived(key)}


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy weights into a module, strictly: every parameter present, nothing else, every shape equal.

    Raises:
        WeightsError: lists the missing, unexpected and mismatched keys. The module is left as it was.
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


def save_safetensors(state: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file through a temporary name, so that a half-written file never has the final one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # Not save_file: it makes the file readable by its owner only.
    temporary.write_bytes(save(dict(state), metadata=dict(metadata or {})))
    temporary.replace(path)


def save_model(
    directory: str | Path,
    name: str,
    config: ModelConfig,
    unet: nn.Module,
    first_stage: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model directory that `Upscaler.from_pretrained` reads; the configuration comes last.

    Args:
        directory: created when absent.
        name: for reports.
        config: of the model.
        unet: stored as model.safetensors.
        first_stage: stored as first_stage.safetensors when it has parameters.
        dtype: of the stored weights, for example torch.float16 for half the size; default as they are.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    save_safetensors(state_to_store(unet, dtype), directory / "model.safetensors", model_metadata(name, config))
    if first_stage is not None and any(True for _ in first_stage.parameters()):
        save_safetensors(state_to_store(first_stage, dtype), directory / "first_stage.safetensors")
    write_model_config(directory, name, config)


def model_metadata(name: str, config: ModelConfig) -> dict[str, str]:
    """Return the safetensors metadata that makes a weight file complete in itself."""
    return {_METADATA_KEY: json.dumps({"name": name, "model": to_dict(config)})}


def embedded_model_config(path: Path) -> tuple[str, ModelConfig] | None:
    """Return the name and the configuration inside a safetensors file, None when there are none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    return None if text is None else _parsed_model_config(text, path)


def write_model_config(directory: Path, name: str, config: ModelConfig) -> None:
    """Write `config.json` of a model directory."""
    (directory / "config.json").write_text(json.dumps({"name": name, "model": to_dict(config)}, indent=2) + "\n")


def read_model_config(directory: Path) -> tuple[str, ModelConfig]:
    """Return the name and the configuration of a model directory.

    Raises:
        WeightsError: `config.json` is absent or not valid.
    """
    path = directory / "config.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise WeightsError(f"{directory} is not a model directory: it has no config.json") from None
    return _parsed_model_config(text, path)


def _parsed_model_config(text: str, path: Path) -> tuple[str, ModelConfig]:
    try:
        values = json.loads(text)
        return str(values["name"]), from_dict(ModelConfig, values["model"])
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{path} is not a model configuration: {error}") from error


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A weight file on the network. `sha256` is None where its publisher gives none and we have not seen the file."""

    name: str
    url: str
    licence: str
    sha256: str | None = None


_RELEASE = "https://github.com/zsyOAOA/ResShift/releases/download/v2.0/"
_S_LAB = "S-Lab License 1.0 (non-commercial)"


def _released(name: str) -> RemoteFile:
    return RemoteFile(name=name, url=_RELEASE + name, licence=_S_LAB)


VQ_F4 = _released("autoencoder_vq_f4.pth")
# Presets with published weights: preset -> (U-Net, first stage). None of them ships with this package.
RELEASED: dict[str, tuple[RemoteFile, RemoteFile]] = {
    "realsr-x4-s15": (_released("resshift_realsrx4_s15_v2.pth"), VQ_F4),
    "realsr-x4-s4": (_released("resshift_realsrx4_s4_v3.pth"), VQ_F4),
    "bicubic-x4-s4": (_released("resshift_bicsrx4_s4.pth"), VQ_F4),
}


def cache_directory() -> Path:
    """Return where downloads go: $RESSHIFT_CACHE, or ~/.cache/resshift."""
    return Path(os.environ.get("RESSHIFT_CACHE", "~/.cache/resshift")).expanduser()


def fetch(file: RemoteFile, *, accept_licence: bool, cache: Path | None = None, timeout_s: float = 60.0) -> Path:
    """Return the local copy of a weight file, downloading it once.

    The download goes to a temporary name and is renamed after its sha256 was checked. For a file without a published checksum, the sha256
    seen first is stored beside it, and a later change is refused.

    Args:
        file: what to get.
        accept_licence: the user has agreed to `file.licence`.
        cache: directory; default `cache_directory()`.
        timeout_s: of the connection and of each read.

    Raises:
        WeightsError: licence not accepted, download failed, or another checksum than expected.
    """
    target = (cache or cache_directory()) / file.name
    seen = target.with_name(target.name + ".sha256")
    expected = file.sha256 or (seen.read_text().strip() if seen.is_file() else None)
    if target.is_file():
        _check(target, expected, file.name, f"delete {target} and try again")
        return target
    if not accept_licence:
        raise WeightsError(
            f"{file.name} is published under {file.licence}. Read it, and if you agree set RESSHIFT_ACCEPT_LICENCE=1 "
            "or pass accept_licence=True"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp: it makes the file readable by its owner only, and a cache may be shared.
    temporary = target.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as out, urllib.request.urlopen(file.url, timeout=timeout_s) as response:
            while chunk := response.read(1 << 20):
                out.write(chunk)
            promised = response.headers.get("Content-Length")
        if promised is not None and temporary.stat().st_size != int(promised):
            raise WeightsError(f"{file.url} ended after {temporary.stat().st_size} of {promised} bytes; try again")
        remedy = "try again" if file.sha256 else f"if you trust the source, delete {seen} and try again"
        digest = _check(temporary, expected, file.name, remedy)
        seen.write_text(digest + "\n")
        temporary.replace(target)
    except (OSError, HTTPException) as error:  # URLError is an OSError; a broken chunk is an HTTPException
        raise WeightsError(f"{file.url} could not be downloaded: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _check(path: Path, expected: str | None, name: str, remedy: str) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected is not None and digest != expected:
        raise WeightsError(f"{name} has sha256 {digest}, expected {expected}: {remedy}")
    return digest
