"""List what `--set section.field=value` changes: meaning, allowed values, default.

    resshift settings                      all settings of jobs/train.py, with the values of tiny-x4
    resshift settings realsr-x4-s4         with the values of another preset
    resshift settings tiny-x4 optim data.crop
    resshift settings vq-f4                settings of jobs/train_autoencoder.py

Lists and ranges are written as 1,30, nothing as null.
"""

from __future__ import annotations

import argparse
from typing import Any

from resshift.command import Exit, UsageError

_DEFAULT = "tiny-x4"


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    arguments.add_argument("preset", nargs="?", default=_DEFAULT, metavar="PRESET", help="preset (tiny-x4)")
    arguments.add_argument("section", nargs="*", metavar="SECTION", help="only these sections or settings")


def run(options: argparse.Namespace) -> Exit:
    """Print the settings."""
    from resshift.settings import listing

    shown = listing(_config(options.preset), tuple(options.section))
    if not shown:
        raise UsageError(f"{options.preset} has no settings {', '.join(options.section)}")
    print(shown)
    return Exit.COMPLETE


def _config(name: str) -> Any:
    """Return a preset of either training command."""
    from resshift.presets import PRESETS, preset

    if name in PRESETS:
        return preset(name)

    from resshift.training.autoencoder import AUTOENCODER_PRESETS, autoencoder_preset

    if name not in AUTOENCODER_PRESETS:
        known = [one for one in (*PRESETS, *AUTOENCODER_PRESETS) if not one.startswith("test-")]
        raise UsageError(f"unknown preset {name!r}; allowed: {', '.join(known)}")
    return autoencoder_preset(name)
