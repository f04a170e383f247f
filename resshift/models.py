"""Names, files and configurations of models. Nothing here loads weights, so nothing imports torch.

A model directory holds `config.json` (name and `ModelConfig`), `model.safetensors` (the U-Net) and, if the
first stage has parameters, `first_stage.safetensors`. A weight file that this package wrote also holds name
and configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import urllib.request
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

from resshift.config import ConfigError, ModelConfig, from_dict, to_dict
from resshift.presets import PRESETS, preset

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

PRETRAINED = Path(__file__).parent / "pretrained"
METADATA_KEY = "resshift.model"
# Increase this with every change that gives other pixels for the same weights (including defaults such as the
# colour fix). It is part of a model's identity, so a bulk job that began before such a change is refused
# instead of continued with other pixels.
PIXELS = 5


class WeightsError(ValueError):
    """A weight file that cannot be used; the message gives the reason."""


def write_model_config(directory: Path, name: str, config: ModelConfig) -> None:
    """Write `config.json` of a model directory."""
    (directory / "config.json").write_text(
        json.dumps({"name": name, "model": to_dict(config)}, indent=2) + "\n"
    )


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


def embedded_model_config(path: Path) -> tuple[str, ModelConfig] | None:
    """Return the name and the configuration in a safetensors file, or None if it holds none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    return None if text is None else _parsed_model_config(text, path)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A published weight file; `sha256` is None if its publisher gives none and it was never checked."""

    name: str
    url: str
    licence: str
    sha256: str | None = None


_RELEASE = "https://github.com/zsyOAOA/ResShift/releases/download/v2.0/"
_S_LAB = "S-Lab License 1.0 (non-commercial)"


def _released(name: str) -> RemoteFile:
    return RemoteFile(name=name, url=_RELEASE + name, licence=_S_LAB)


VQ_F4 = _released("autoencoder_vq_f4.pth")
# Presets with published weights: preset -> (U-Net, first stage). This package contains none of them.
RELEASED: dict[str, tuple[RemoteFile, RemoteFile]] = {
    "realsr-x4-s15": (_released("resshift_realsrx4_s15_v2.pth"), VQ_F4),
    "realsr-x4-s4": (_released("resshift_realsrx4_s4_v3.pth"), VQ_F4),
    "bicubic-x4-s4": (_released("resshift_bicsrx4_s4.pth"), VQ_F4),
}


def cache_directory() -> Path:
    """Return the directory of downloads: $RESSHIFT_CACHE, or ~/.cache/resshift."""
    return Path(os.environ.get("RESSHIFT_CACHE", "~/.cache/resshift")).expanduser()


def fetch(
    file: RemoteFile, *, accept_licence: bool, cache: Path | None = None, timeout_s: float = 60.0
) -> Path:
    """Return the local copy of a weight file, which is downloaded once.

    The file is downloaded to a temporary name and renamed after its sha256 is checked. For a file without a
    published checksum, the first sha256 is stored beside it, and a file that differs later is refused.

    Args:
        file: Weight file.
        accept_licence: Whether the user has accepted `file.licence`.
        cache: Directory of the copy; None is `cache_directory()`.
        timeout_s: Timeout of the connection and of each read.

    Raises:
        WeightsError: The licence was not accepted, the download failed, or the checksum is not as expected.
    """
    target = (cache or cache_directory()) / file.name
    seen = target.with_name(target.name + ".sha256")
    expected = file.sha256 or (seen.read_text().strip() if seen.is_file() else None)
    if target.is_file():
        _check(target, expected, file.name, f"delete {target} and try again")
        return target
    if not accept_licence:
        raise WeightsError(
            f"{file.name} is published under {file.licence}. Read it, and if you agree set "
            "RESSHIFT_ACCEPT_LICENCE=1 or pass accept_licence=True"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # mkstemp would make the file readable by its owner only, and a cache may be shared.
    temporary = target.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as out, urllib.request.urlopen(file.url, timeout=timeout_s) as response:
            while chunk := response.read(1 << 20):
                out.write(chunk)
            promised = response.headers.get("Content-Length")
        if promised is not None and temporary.stat().st_size != int(promised):
            raise WeightsError(
                f"{file.url} ended after {temporary.stat().st_size} of {promised} bytes; try again"
            )
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


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Name, configuration and files of a model, and the precision in which its networks compute."""

    name: str
    config: ModelConfig
    unet: Path
    first_stage: Path | None
    dtype: Dtype = "auto"

    def identity(self) -> str:
        """Return 16 hexadecimal digits that change with any weight or setting of the model, with a chosen
        precision, and with `PIXELS`.
        """
        asked = [] if self.dtype == "auto" else [self.dtype]
        digest = hashlib.sha256(json.dumps([PIXELS, to_dict(self.config), *asked], sort_keys=True).encode())
        for path in (self.unet, self.first_stage):
            if path is not None:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def locate_model(
    source: str | Path,
    *,
    preset_name: str | None = None,
    first_stage: str | Path | None = None,
    accept_licence: bool = False,
) -> ModelFiles:
    """Find the files of a model without loading them; arguments and errors as in `Upscaler.from_pretrained`.

    A name or path may end in @float32, @bfloat16 or @float16, the precision in which its networks compute.
    Every command accepts this suffix, and jobs and endpoints distinguish the precisions, because the
    identities differ.
    """
    source = str(source)
    accept_licence = accept_licence or os.environ.get("RESSHIFT_ACCEPT_LICENCE") == "1"
    path = Path(source).expanduser()
    base, _, dtype = source.rpartition("@")
    if base and (dtype == "float32" or dtype == "bfloat16" or dtype == "float16") and not path.exists():
        found = locate_model(
            base, preset_name=preset_name, first_stage=first_stage, accept_licence=accept_licence
        )
        return replace(found, name=f"{found.name}@{dtype}", dtype=dtype)
    stage = Path(first_stage).expanduser() if first_stage is not None else None
    shipped = PRETRAINED / source
    if path.is_dir() or (shipped / "config.json").is_file():
        directory = path if path.is_dir() else shipped
        name, config = read_model_config(directory)
        averaged = directory / "ema.safetensors"
        own_stage = directory / "first_stage.safetensors"
        unet = averaged if averaged.is_file() else directory / "model.safetensors"
        return ModelFiles(name, config, unet, stage or (own_stage if own_stage.is_file() else None))
    if path.is_file():
        return _located_file(path, preset_name, stage)
    if source in RELEASED:
        unet_file, stage_file = RELEASED[source]
        unet = fetch(unet_file, accept_licence=accept_licence)
        return ModelFiles(
            source, preset(source).model, unet, stage or fetch(stage_file, accept_licence=accept_licence)
        )
    names = sorted(
        {entry.name for entry in PRETRAINED.glob("*") if (entry / "config.json").is_file()} | RELEASED.keys()
    )
    raise WeightsError(
        f"no model {source!r}: give one of {', '.join(names)}, a model directory, or a weight file"
    )


def _located_file(path: Path, preset_name: str | None, stage: Path | None) -> ModelFiles:
    embedded = embedded_model_config(path)
    if embedded is not None and preset_name is None:
        return ModelFiles(*embedded, path, stage)
    if (path.parent / "config.json").is_file() and preset_name is None:
        return ModelFiles(*read_model_config(path.parent), path, stage)
    if preset_name is None:
        preset_name = next((name for name, (file, _) in RELEASED.items() if file.name == path.name), None)
    if preset_name is None:
        raise WeightsError(
            f"{path} does not say which model it is: give preset_name, one of {', '.join(PRESETS)}"
        )
    try:
        config = preset(preset_name).model
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    beside = path.with_name(VQ_F4.name)
    return ModelFiles(preset_name, config, path, stage or (beside if beside.is_file() else None))
