"""Write a bill of materials of requirements.lock: CycloneDX 1.6 in JSON, what scanners and auditors read.

    make sbom          dist/resshift.cdx.json

Components are the pins that hold on this platform; dependencies are those that the lock names ("via");
licences are what the installed packages declare (deploy/licences.py). The same lock gives the same bytes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import licences
from packaging.requirements import Requirement

_ROOT = Path(__file__).parents[1]
_VIA = re.compile(r"^    #(?: via|  ) +([A-Za-z0-9][\w.-]*)")


def pins(lock: str) -> dict[str, tuple[str, set[str]]]:
    """Return version and dependents of each package that a lock pins for this platform."""
    found: dict[str, tuple[str, set[str]]] = {}
    dependents: set[str] = set()
    for line in lock.splitlines():
        if not line.startswith((" ", "#")) and line.strip():
            pin = Requirement(line)
            dependents = set()
            if pin.marker is None or pin.marker.evaluate():
                found[pin.name] = (next(iter(pin.specifier)).version, dependents)
        elif (via := _VIA.match(line)) is not None:
            dependents.add(via[1])
    return found


def _licence(name: str) -> list[dict[str, Any]]:
    try:
        text = licences.licence_of(metadata.metadata(name)).text
    except metadata.PackageNotFoundError:
        return []
    return [{"license": {"name": text}}] if text else []


def bill(lock: str, version: str) -> dict[str, Any]:
    """Return the bill of materials of a lock for a version of resshift."""
    found = pins(lock)
    refs = {name: f"pkg:pypi/{name}@{pinned}" for name, (pinned, _) in found.items()}
    root = f"pkg:pypi/resshift@{version}"
    needs: dict[str, set[str]] = {ref: set() for ref in (root, *refs.values())}
    for name, (_, dependents) in found.items():
        for one in dependents:
            needs[root if one == "resshift" else refs[one]].add(refs[name])
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {
                "type": "application",
                "bom-ref": root,
                "name": "resshift",
                "version": version,
                "purl": root,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            }
        },
        "components": [
            {
                "type": "library",
                "bom-ref": refs[name],
                "name": name,
                "version": found[name][0],
                "purl": refs[name],
                "licenses": _licence(name),
            }
            for name in sorted(found)
        ],
        "dependencies": [{"ref": ref, "dependsOn": sorted(needs[ref])} for ref in sorted(needs)],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write the bill to the file that is named; return 2 without one."""
    paths = list(sys.argv[1:] if argv is None else argv)
    if len(paths) != 1 or paths[0].startswith("-"):
        sys.stderr.write("usage: python deploy/sbom.py FILE\n")
        return 2
    made = bill((_ROOT / "requirements.lock").read_text(), metadata.version("resshift"))
    target = Path(paths[0])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(made, indent=1) + "\n")
    sys.stdout.write(f"{target}: {len(made['components'])} components\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
