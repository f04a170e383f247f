"""Files and configurations of models.

A model directory holds `config.json` (name and configuration), `model.safetensors` (the U-Net, or the one
network of a model without a chain) and, if the first stage has parameters, `first_stage.safetensors`. A
weight file that this package wrote also holds name and configuration.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from resshift.config import ConfigError, ModelConfig, Sampling, from_dict, to_dict
from resshift.networks.config import ForeignConfig, RegressionConfig

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

PRETRAINED = Path(__file__).parents[1] / "pretrained"
METADATA_KEY = "resshift.model"
# Increase this with every change that gives other pixels for the same weights (including defaults such as the
# colour fix). It is part of a model's identity, so a bulk job that began before such a change is refused
# instead of continued with other pixels.
PIXELS = 5


AnyModelConfig = ModelConfig | RegressionConfig | ForeignConfig
# Key of the configuration in config.json -> its type.
_KINDS: dict[str, type[AnyModelConfig]] = {
    "model": ModelConfig,
    "regression": RegressionConfig,
    "foreign": ForeignConfig,
}


class WeightsError(ValueError):
    """A weight file that cannot be used; the message gives the reason."""


def write_model_config(directory: Path, name: str, config: AnyModelConfig) -> None:
    """Write `config.json` of a model directory."""
    (directory / "config.json").write_text(json.dumps(described(name, config), indent=2) + "\n")


def read_model_config(directory: Path) -> tuple[str, AnyModelConfig]:
    """Return the name and the configuration of a model directory.

    Raises:
        WeightsError: `config.json` is absent or not valid.
    """
    path = directory / "config.json"
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise WeightsError(f"{directory} is not a model directory: it has no config.json") from None
    return config_of(text, str(path))


def config_of(text: str, origin: str) -> tuple[str, AnyModelConfig]:
    """Return the name and the configuration that the text of a `config.json` holds.

    Args:
        text: Text of the file.
        origin: Address of the file, for messages.

    Raises:
        WeightsError: The text is no configuration of a model.
    """
    try:
        values: Any = json.loads(text)
        for key, kind in _KINDS.items():
            if key in values:
                return str(values["name"]), from_dict(kind, values[key])
        told = (
            "it describes an autoencoder, a part of a model" if "first_stage" in values else "it has no model"
        )
        raise WeightsError(f"{origin} is not a model configuration: {told}")
    except (json.JSONDecodeError, KeyError, TypeError, ConfigError) as error:
        raise WeightsError(f"{origin} is not a model configuration: {error}") from error


def describes_autoencoder(text: str) -> bool:
    """Tell whether the text of a `config.json` is that of a trained autoencoder."""
    try:
        values: Any = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(values, dict) and "first_stage" in values


def described(name: str, config: AnyModelConfig) -> dict[str, Any]:
    """Return what `config.json` of a model holds."""
    kind = next(key for key, kind in _KINDS.items() if isinstance(config, kind))
    return {"name": name, kind: to_dict(config)}


def embedded_model_config(path: Path) -> tuple[str, AnyModelConfig] | None:
    """Return the name and the configuration in a safetensors file, or None if it holds none."""
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="np") as file:
            text = (file.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error
    return None if text is None else config_of(text, str(path))


def float32_bytes(path: Path) -> int:
    """Return the memory that the weights of a file need in float32; that of a pickle, which only torch can
    read, is taken to be its size.

    Raises:
        WeightsError: The file cannot be read.
    """
    if path.suffix != ".safetensors":
        return path.stat().st_size
    try:
        with safe_open(path, framework="np") as file:
            return 4 * sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} cannot be read as weights: {error}") from error


def machine_bytes() -> int | None:
    """Return the memory of this machine, or of this process's control group if that has less; None where it
    cannot be found out.
    """
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:  # no control group
        return total
    return min(total, int(limit)) if limit.isdecimal() else total


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Name, configuration and files of a model, and the precision in which its networks compute."""

    name: str
    config: AnyModelConfig
    unet: Path
    first_stage: Path | None
    dtype: Dtype = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.config, ForeignConfig) and self.dtype not in ("auto", *self.config.precisions):
            raise WeightsError(
                f"{self.name} ({self.config.architecture}) computes in {', '.join(self.config.precisions)}, "
                f"got {self.dtype}"
            )

    @property
    def fills_holes(self) -> bool:
        """Whether the model fills holes, so that pictures need masks."""
        return isinstance(self.config, ModelConfig) and self.config.fills_holes

    @property
    def takes_faces(self) -> bool:
        """Whether it may restore the faces of a picture, see `Sampling.faces`."""
        return self.config.scale == 1 and not self.fills_holes

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse options that this model cannot do.

        Raises:
            OptionError: It cannot.
        """
        has_estimate = isinstance(self.config, ModelConfig) and self.config.has_estimate
        sampling.check_for(
            self.name, self.config.steps, self.config.smallest_tile_px, has_estimate, self.takes_faces
        )

    def check_memory(self, num_bytes: int, where: str) -> None:
        """Refuse a model whose weights alone do not fit into memory. Files may hold float16; networks hold
        float32.

        Args:
            num_bytes: Memory that there is.
            where: What has this memory, for the message.

        Raises:
            WeightsError: The weights need more.
        """
        needed = sum(float32_bytes(path) for path in (self.unet, self.first_stage) if path is not None)
        if needed > num_bytes:
            raise WeightsError(
                f"the weights of {self.name} need {needed / 1e9:.1f} GB of memory, and {where} has "
                f"{num_bytes / 1e9:.1f} GB"
            )

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
