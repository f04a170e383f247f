"""From what a user calls a model to its files and its configuration.

A model is asked for by the name of one that ships or whose weights are published, by a path, by file:// or
s3://, or by a repository on Hugging Face (OWNER/NAME or hf://OWNER/NAME[@REVISION]). What lies there is a
model directory, a checkpoint, a run (its model, else its newest checkpoint), or a weight file: ours, a
released one of ResShift or SinSR, or one of another architecture. After the address may stand

    #preset=NAME&first-stage=FILE     what the shapes of released weights cannot tell
    @float32, @bfloat16 or @float16   the precision in which the networks compute
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode

from resshift.config import ModelConfig, from_dict, to_dict
from resshift.models.files import (
    PRETRAINED,
    Dtype,
    ModelFiles,
    WeightsError,
    config_of,
    describes_autoencoder,
    embedded_model_config,
)
from resshift.models.locations import (
    HUB,
    Folder,
    folder_of,
    is_elsewhere,
    is_repository,
    is_weight_file,
    local_file,
    local_path,
)
from resshift.models.published import FIRST_STAGES, FOREIGN, RELEASED, fetch
from resshift.networks.config import ForeignConfig
from resshift.presets import PRESETS, preset

_DTYPES = ("float32", "bfloat16", "float16")
_OPTIONS = ("preset", "first-stage")
_MANIFEST = "files.json"  # last file of a complete checkpoint


def model_with(source: str, preset_name: str | None = None, first_stage: str | None = None) -> str:
    """Return the source of a model with a preset and the weights of a first stage, as one text."""
    options = [
        (name, value)
        for name, value in zip(_OPTIONS, (preset_name, first_stage), strict=True)
        if value is not None
    ]
    return f"{source}#{urlencode(options, safe='/:@')}" if options else source


def locate_model(
    source: str | Path,
    *,
    preset_name: str | None = None,
    first_stage: str | Path | None = None,
    accept_licence: bool = False,
) -> ModelFiles:
    """Find the files of a model, and fetch them if they are elsewhere, without loading them. Arguments and
    errors as in `Upscaler.from_pretrained`.

    Every command takes what this function takes. Jobs and endpoints distinguish the precisions, because the
    identities differ.
    """
    text = str(source)
    base, _, dtype = text.rpartition("@")
    if base and dtype in _DTYPES and not local_path(text).exists():
        found = locate_model(
            base, preset_name=preset_name, first_stage=first_stage, accept_licence=accept_licence
        )
        return replace(found, name=f"{found.name}@{dtype}", dtype=cast(Dtype, dtype))
    text, options = _split_options(text)
    preset_name = preset_name or options.get("preset")
    first_stage = first_stage or options.get("first-stage")
    if preset_name is not None and preset_name not in PRESETS:
        raise WeightsError(f"unknown preset {preset_name!r}; allowed: {', '.join(PRESETS)}")
    accept_licence = accept_licence or _licence_accepted()
    stage = None if first_stage is None else first_stage_file(str(first_stage))

    path, shipped = local_path(text), PRETRAINED / text
    if (shipped / "config.json").is_file() and not path.is_dir():
        return _in_folder(folder_of(str(shipped)), preset_name, stage)
    if path.is_dir() or (is_elsewhere(text) and not is_weight_file(text)):
        return _in_folder(folder_of(text), preset_name, stage)
    if path.is_file() or is_elsewhere(text):
        return _in_file(local_file(text), text, preset_name, stage)
    if text in RELEASED:
        released = RELEASED[text]
        unet = fetch(released.unet, accept_licence=accept_licence)
        stage = stage or fetch(released.first_stage, accept_licence=accept_licence)
        return ModelFiles(text, preset(released.preset).model, unet, stage)
    if text in FOREIGN:
        return replace(_in_file(fetch(FOREIGN[text], accept_licence=False), text, None, None), name=text)
    if is_repository(text) and not is_weight_file(text):
        try:
            return _in_folder(folder_of(HUB + text), preset_name, stage)
        except WeightsError as error:
            raise WeightsError(f"no model {text!r}: there is no such path, and {error}") from error
    if text in PRESETS:
        raise WeightsError(
            f"{text} is a preset without published weights: train it (jobs/train.py --preset {text}), and "
            "give the directory of the run"
        )
    raise WeightsError(
        f"no model {text!r}: give one of {', '.join(model_names())}, a model directory or weight file (a "
        "path, file:// or s3://), or OWNER/NAME on Hugging Face"
    )


def unet_file(source: str) -> Path:
    """Return the weights of the network of a model: a weight file, or what `locate_model` takes.

    Raises:
        WeightsError: There is no such model.
    """
    return local_file(source) if _is_file(source) else locate_model(source).unet


def first_stage_file(source: str) -> Path:
    """Return the weights of an autoencoder: a weight file, the directory of a model that contains it or of a
    run that trained it, or the name of a released one (vq-f4, vq-f4-face, vq-f8-face).

    Raises:
        WeightsError: There is no such autoencoder.
    """
    if _is_file(source):
        return local_file(source)
    if source in FIRST_STAGES:
        return fetch(FIRST_STAGES[source], accept_licence=_licence_accepted())
    if not (is_elsewhere(source) or local_path(source).is_dir()):
        raise WeightsError(
            f"no autoencoder {source!r}: give one of {', '.join(FIRST_STAGES)}, or a directory or weight "
            "file (a path, file://, s3:// or hf://)"
        )
    folder = folder_of(source)
    for name in ("first_stage.safetensors", "model/first_stage.safetensors", *_trained_autoencoder(folder)):
        if (found := folder.file(name)) is not None:
            return found
    raise WeightsError(
        f"{folder} holds no autoencoder: neither first_stage.safetensors nor one that was trained"
    )


def _trained_autoencoder(folder: Folder) -> Iterator[str]:
    """Yield the name of the weights of an autoencoder in the directory of its model or of its run."""
    for prefix in ("", "model/"):
        text = folder.text(f"{prefix}config.json")
        if text is not None and describes_autoencoder(text):
            yield f"{prefix}model.safetensors"


def _is_file(source: str) -> bool:
    return local_path(source).is_file() or is_weight_file(source)


def _licence_accepted() -> bool:
    return os.environ.get("RESSHIFT_ACCEPT_LICENCE") == "1"


def model_names() -> list[str]:
    """Return the names of models that ship or whose weights are published."""
    shipped = {entry.parent.name for entry in PRETRAINED.glob("*/config.json")}
    return sorted(shipped | RELEASED.keys() | FOREIGN.keys())


def _split_options(source: str) -> tuple[str, dict[str, str]]:
    """Return a source without its options, and the options."""
    base, mark, text = source.rpartition("#")
    options = dict(parse_qsl(text, keep_blank_values=True))
    if not mark or local_path(source).exists() or not options:
        return source, {}
    if unknown := options.keys() - set(_OPTIONS):
        raise WeightsError(f"unknown {sorted(unknown)[0]!r} in {source}; allowed: {', '.join(_OPTIONS)}")
    return base, options


def _in_folder(folder: Folder, preset_name: str | None, stage: Path | None) -> ModelFiles:
    """Find the model of a directory: a model or checkpoint, a run, or the one weight file that is in it."""
    prefix = ""
    text = folder.text("config.json")
    if text is None and folder.text("run.json") is not None:
        prefix = _model_of_run(folder)
        text = folder.text(f"{prefix}config.json")
    if text is None:
        return _only_file(folder, preset_name, stage)
    name, config = config_of(text, f"{folder}/{prefix}config.json")
    unet = folder.file(f"{prefix}ema.safetensors") or folder.file(f"{prefix}model.safetensors")
    if unet is None:
        raise WeightsError(f"{folder} is not a complete model: it has no {prefix}model.safetensors")
    stage = stage or folder.file(f"{prefix}first_stage.safetensors")
    return ModelFiles(name, preset(preset_name).model if preset_name else config, unet, stage)


def _model_of_run(folder: Folder) -> str:
    """Return the directory of a run's model: the one of its end, else its newest complete checkpoint."""
    names = folder.names()
    if "model/config.json" in names:
        return "model/"
    complete = [name for name in names if name.startswith("step-") and name.endswith(f"/{_MANIFEST}")]
    if not complete:
        raise WeightsError(f"{folder} is a run without a checkpoint yet: it has no model")
    return max(complete, key=lambda name: int(name.split("/")[0].removeprefix("step-"))).removesuffix(
        _MANIFEST
    )


def _only_file(folder: Folder, preset_name: str | None, stage: Path | None) -> ModelFiles:
    found = [name for name in folder.names() if is_weight_file(name)]
    if len(found) != 1:
        told = f"{len(found)} weight files ({', '.join(found[:5])}): name one" if found else "no weight file"
        raise WeightsError(f"{folder} is not a model directory: it has no config.json, and {told}")
    path = folder.file(found[0])
    assert path is not None  # it was listed
    return _in_file(path, f"{folder}/{found[0]}", preset_name, stage)


def _in_file(path: Path, address: str, preset_name: str | None, stage: Path | None) -> ModelFiles:
    """Find out which model a weight file is."""
    if preset_name is None:
        embedded = embedded_model_config(path)
        if embedded is not None:
            return ModelFiles(*embedded, path, stage)
        beside = path.parent / "config.json"
        if beside.is_file():
            return ModelFiles(*config_of(beside.read_text(), str(beside)), path, stage)
        found = _inspected(path, address)
        if "foreign" in found:
            stem = address.rsplit("/", 1)[-1].rpartition(".")[0]
            return ModelFiles(stem, from_dict(ForeignConfig, found["foreign"]), path, None)
        preset_name = _preset_of(found, address)
    config: ModelConfig = preset(preset_name).model
    if stage is None and config.first_stage.kind == "vq":
        stage = _stage_beside(path, preset_name, address)
    return ModelFiles(preset_name, config, path, stage)


def _preset_of(found: dict[str, Any], address: str) -> str:
    """Return the preset that a weight file belongs to, of those whose shapes it has."""
    presets: list[str] = found["presets"]
    file_name = address.rsplit("/", 1)[-1]
    hinted = [one.preset for one in RELEASED.values() if one.unet.name == file_name]
    presets = [name for name in presets if name in hinted] or presets
    if len({json.dumps(to_dict(preset(name).model)) for name in presets}) > 1:
        raise WeightsError(
            f"{address} has the shapes of {', '.join(presets)}: say which with --preset (preset_name)"
        )
    return presets[0]


def _stage_beside(path: Path, preset_name: str, address: str) -> Path:
    """Return the released autoencoder that lies beside a released U-Net."""
    remote = next((one.first_stage for one in RELEASED.values() if one.preset == preset_name), None)
    remote = remote or RELEASED["realsr-x4-s4"].first_stage
    beside = path.with_name(remote.name)
    if not beside.is_file():
        raise WeightsError(
            f"{address} needs the weights of its autoencoder: give them with --first-stage (first_stage), or "
            f"fetch {remote.url} and put it at {beside}"
        )
    return beside


def _inspected(path: Path, address: str) -> dict[str, Any]:
    """Return what `resshift.networks.recognition.inspect` says of a file; see there.

    It reads the tensors and so needs torch. A process without torch, such as the driver of a bulk job, asks
    another one.

    Raises:
        WeightsError: The file holds no weights, or nobody knows them.
    """
    facts = path.stat()
    found = json.loads(_inspection(path, facts.st_mtime_ns, facts.st_size))
    if "error" in found:
        raise WeightsError(str(found["error"]).replace(str(path), address))
    return found


@lru_cache(maxsize=8)
def _inspection(path: Path, *version: int) -> str:
    """Return what is said of a version of a file, as JSON."""
    if "torch" in sys.modules:
        from resshift.networks.recognition import inspect

        return json.dumps(inspect(path))
    command = [sys.executable, "-m", "resshift.networks.recognition", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WeightsError(f"{path} cannot be inspected: {done.stderr.strip()[-300:]}")
    return done.stdout
