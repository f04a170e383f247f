"""Lay small changes over a YAML file, so that a variant is what differs and not a copy.

    python deploy/overlay.py cluster.yaml deploy/aws/small.yaml > mine.yaml
    ray up mine.yaml

A JSON merge patch (RFC 7396): maps are merged key by key, null removes a key, anything else (lists too) takes
the place of what was there. Several overlays are laid on in the order given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def merge(base: Any, overlay: Any) -> Any:
    """Return `base` with an overlay on it (RFC 7396); neither is changed."""
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
    """Write the result to standard output; exit code 2 when a file is not there or is no YAML map."""
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
            sys.stderr.write(f"error: {path}: a map is expected, this is {type(layer).__name__}\n")
            return 2
        merged = merge(merged, layer)
    # What nodes share in the file (&image, &gpu_resources) is written out: aliases in the result would be one
    # more thing to read.
    dumper = yaml.SafeDumper
    dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]
    yaml.dump(merged, sys.stdout, Dumper=dumper, sort_keys=False, width=140)
    return 0


if __name__ == "__main__":
    sys.exit(main())
