"""Apply overlays to a YAML file, so that a variant contains only its differences.

    python deploy/overlay.py cluster.yaml deploy/aws/small.yaml > mine.yaml
    ray up mine.yaml

An overlay is a JSON merge patch (RFC 7396): maps are merged key by key, null removes a key, any other value
(also a list) replaces the previous one. Several overlays are applied in the given order.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def merge(base: Any, overlay: Any) -> Any:
    """Return `base` with an overlay applied (RFC 7396); neither argument is changed."""
    if not isinstance(overlay, dict):
        return overlay
    merged: dict[str, Any] = dict(base) if isinstance(base, dict) else {}
    for key, value in overlay.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge(merged.get(key), value)
    return merged


def main(argv: Sequence[str] | None = None) -> int:
    """Write the result to standard output; return 2 if a file is missing or is not a YAML map."""
    paths = list(sys.argv[1:] if argv is None else argv)
    if len(paths) < 2 or any(path.startswith("-") for path in paths):
        sys.stderr.write("usage: python deploy/overlay.py BASE OVERLAY [OVERLAY ...]\n")
        return 2
    merged: Any = {}
    for path in paths:
        try:
            layer = yaml.safe_load(Path(path).read_text())
        except (OSError, yaml.YAMLError) as error:
            sys.stderr.write(f"error: {path}: {error}\n")
            return 2
        if not isinstance(layer, dict):
            sys.stderr.write(f"error: {path}: must be a YAML map, got {type(layer).__name__}\n")
            return 2
        merged = merge(merged, layer)
    # Values that nodes share through anchors (&image, &gpu_resources) are written out: the result is easier
    # to read without aliases.
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    yaml.dump(merged, sys.stdout, Dumper=dumper, sort_keys=False, width=140)
    return 0


if __name__ == "__main__":
    sys.exit(main())
