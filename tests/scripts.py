"""Scripts of the repository, which are part of no package."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


@functools.cache
def load_script(path: str) -> ModuleType:
    """Import a script once; it finds its neighbours by name, as when it is run.

    Args:
        path: Path relative to the repository, such as "jobs/train.py".
    """
    file = ROOT / path
    spec = importlib.util.spec_from_file_location(
        "script_" + path.removesuffix(".py").replace("/", "_"), file
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    sys.path.insert(0, str(file.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(file.parent))
    return module
