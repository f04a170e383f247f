"""List the models that have a name, and say what each needs.

    resshift models

Any other model is a path, s3:// or hf://OWNER/NAME: docs/models.md.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from resshift.command import Exit


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """There are none."""


def run(options: argparse.Namespace) -> Exit:
    """Print the names, by where their weights come from."""
    by_origin = sorted(_models(), key=lambda one: one[0])
    for origin, models in itertools.groupby(by_origin, key=lambda one: one[0]):
        print(origin)
        for _, name, facts in models:
            print(f"  {name:<26}{facts}".rstrip())
    return Exit.COMPLETE


def _models() -> Iterator[tuple[str, str, str]]:
    """Yield where its weights come from, name and facts of every model."""
    from resshift.models.files import PRETRAINED
    from resshift.models.locate import locate_model, model_names
    from resshift.models.published import FOREIGN, RELEASED
    from resshift.presets import preset

    for name in model_names():
        if (PRETRAINED / name).is_dir():
            config = locate_model(name).config
            yield "Ship with the package, Apache-2.0:", name, f"x{config.scale}, {config.steps} steps"
        elif name in RELEASED:
            config, file = preset(RELEASED[name].preset).model, RELEASED[name].unet
            told = f"Downloaded once, after RESSHIFT_ACCEPT_LICENCE=1: {file.licence}, {file.repository}"
            holes = ", fills the transparent holes of a picture" if config.fills_holes else ""
            yield f"{told}:", name, f"x{config.scale}, {config.steps} steps{holes}"
        else:
            told = f"Downloaded once, {FOREIGN[name].licence}, need pip install 'resshift[models]'"
            yield f"{told}:", name, ""
