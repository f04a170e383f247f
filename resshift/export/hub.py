"""Pushing a model directory to the Hugging Face Hub, with the credentials that huggingface_hub finds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from resshift.config import ConfigError

HUB = "hf://"


def repository_of(target: str) -> str:
    """Return OWNER/NAME of hf://OWNER/NAME, once it can be pushed to.

    Raises:
        ConfigError: The name is malformed, or huggingface_hub is not installed.
    """
    repository = target.removeprefix(HUB).strip("/")
    if repository.count("/") != 1:
        raise ConfigError(f"{HUB}OWNER/NAME names a repository of a hub, got {target!r}")
    _hub()
    return repository


def push(directory: Path, repository: str) -> str:
    """Upload the files of a directory to a repository, which is created if it is absent, and return its
    address.
    """
    hub = _hub()
    hub.create_repo(repository, exist_ok=True)
    return str(
        hub.upload_folder(repo_id=repository, folder_path=directory, commit_message="Export from resshift")
    )


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise ConfigError(
            "pushing to a hub needs the package huggingface_hub: pip install 'resshift[models]'"
        ) from None
