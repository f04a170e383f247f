"""Ranges of keys that drivers work on independently of each other, and how they are found.

Inputs compete for the name of an output when they lie in one directory and have one stem T: T itself and
T.EXTENSION, all of them from T to before T + "/". A limit between two ranges that lies within is in nobody's
way unless there are such inputs: `straddling` says which stems these would be, a handful a limit, and whoever
lists a range puts them aside until all else is done.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

from pipelines.ledger.ledger import Interval

_LAST_ASCII = 0x7F
_IN_ITS_DIRECTORY = re.compile(r"\{dir\}/[^/]*\{(?:stem|name)\}[^/]*")


def keeps_to_directories(template: str) -> bool:
    """Return whether inputs of different directories or stems never have one output; then ranges of keys can
    be worked on independently.

    Args:
        template: Template of output names, see `output_names.output_key`.
    """
    return _IN_ITS_DIRECTORY.fullmatch(template) is not None and template.count("{dir}") == 1


def stem(key: str) -> str:
    """Return what inputs that compete for a name have in common."""
    return posixpath.splitext(key)[0]


def boundary(key: str) -> str:
    """Return a limit at or before a key that leaves those with its stem on one side."""
    directory, slash, name = key.rpartition("/")
    return directory + slash + name.partition(".")[0]


def straddling(limit: str | None) -> frozenset[str]:
    """Return the stems T with T < limit < T + "/"; there is none at the end of a listing."""
    text = limit or ""
    ends = (i for i, character in enumerate(text) if character < "/")
    return frozenset(text[:i] for i in ends if i and text[i - 1] != "/")


def split_point(first_key: Callable[[str, str | None], str | None], interval: Interval) -> str | None:
    """Return a limit with keys on both sides, None where none is found. About twenty look-ups.

    It is a half of the characters that occur at the first place at which keys differ, which is a half of the
    keys where names are spread evenly, as numbers and hashes are. Of halves that differ much the larger one
    can be split again.

    Args:
        first_key: Function that returns the first key of an interval.
        interval: Where the limit is looked for.
    """
    start, stop = interval
    first = first_key(start, stop)
    if first is None:
        return None

    def beyond(i: int) -> str | None:
        """Return the first key behind all that begin with the same i + 1 characters as the first one."""
        return first_key(first[:i] + _next(first[i]), stop)

    # If there is one behind i + 1 characters there is one behind more: bisect for the fewest.
    low, high = 0, len(first) - 1
    if beyond(high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if beyond(middle) is not None else (middle + 1, high)
    shared, second = first[:low], beyond(low)
    if second is None:  # gone meanwhile
        return None
    # The last of the characters that occur there; those beyond ASCII count as one.
    least, most = ord(second[low]), _LAST_ASCII
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (
            (middle, most) if first_key(shared + chr(middle), stop) is not None else (least, middle - 1)
        )
    half = first_key(shared + chr(max(ord(first[low]) + 1, (ord(first[low]) + least + 1) // 2)), stop)
    return None if half is None else half[: low + 1]


def _next(character: str) -> str:
    """Return the character behind one; surrogates are none unless they stand for bytes of a file's name."""
    return chr(0xE000 if character == "\ud7ff" else min(ord(character) + 1, 0x10FFFF))
