"""The result of one check of the doctor: a level, what was found, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """Severity of a finding: `warn` works, but with limits; `fail` does not work."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of a check.

    Fields:
        name: Name of the check, for example "shared memory".
        level: Severity.
        found: What was found, in one line.
        remedy: What to do about it; empty when the level is ok.
    """

    name: str
    level: Level
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Return the line for the user."""
        return f"{self.level:<4}  {self.name}: {self.found}" + (
            f"\n      -> {self.remedy}" if self.remedy else ""
        )


def ok(name: str, found: str) -> Finding:
    """Return the finding of a check that passed."""
    return Finding(name, Level.OK, found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """Return the finding of a check that passed with limits."""
    return Finding(name, Level.WARN, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """Return the finding of a check that failed."""
    return Finding(name, Level.FAIL, found, remedy)
