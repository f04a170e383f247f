"""Models for other tools: graphs (ONNX, torch.export), weight files, and directories for a model hub.

    export_model(locate_model("tiny-x4"), "onnx", Path("tiny-x4-onnx"))

Every export is read back and compared with the model that it was made from (`resshift.export.parity`).
docs/export.md says what the files contain and which tools take them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from resshift.config import ConfigError, ModelConfig
from resshift.models import ModelFiles

Format = Literal["onnx", "torch-export", "safetensors", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)


def check_directory(directory: Path) -> None:
    """Refuse a directory with files in it, which an export would mix with its own.

    Raises:
        ConfigError: The directory has files, or is no directory.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"an export needs a new or empty directory, got {directory}")


def model_name(found: ModelFiles) -> str:
    """Return the name of a model without its precision: files hold weights, and graphs are float32."""
    return found.name.partition("@")[0]


def chain_config(found: ModelFiles) -> ModelConfig:
    """Return the configuration of a model with a chain, the only kind that can be exported.

    Raises:
        ConfigError: The model has none.
    """
    if not isinstance(found.config, ModelConfig):
        raise ConfigError(f"only models with a chain can be exported, got {found.name}")
    return found.config
