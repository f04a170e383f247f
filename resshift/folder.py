"""Which files of a folder are pictures, and where the result of each goes: a function of the names and of the
first bytes of files whose names promise no picture.

Results keep the tree of the folder and are called `{stem}_x{scale}`. Where several pictures of a folder have
one stem (IMG_1.HEIC and IMG_1.JPG), all of them are called `{name}_x{scale}`, so none hides another, in later
runs either.
"""

from __future__ import annotations

import functools
import os
import posixpath
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from resshift import storage
from resshift.images import ImageError, ImageReason
from resshift.images.identify import identify, is_named_as_picture, read_head
from resshift.output_names import OutputFormat, output_key
from resshift.storage import Entry, StorageError


@dataclass(frozen=True, slots=True)
class Task:
    """A picture to be upscaled.

    Fields:
        source, target: Where it is read and where its result is written.
    """

    source: str
    target: str


@dataclass(slots=True)
class Contents:
    """What was found.

    Fields:
        tasks: Pictures, in the order of the listing.
        num_others: Number of files that are no pictures, camera raw beside a picture of its name included.
        refused: Files that should be pictures and cannot be read as such, each with the reason.
    """

    tasks: list[Task] = field(default_factory=list[Task])
    num_others: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])


def find_pictures(sources: Sequence[str], target: str, format: OutputFormat, scale: float) -> Contents:
    """Find the pictures of files and folders.

    Args:
        sources: Files and folders; a file counts as a picture whatever its name is.
        target: Folder of the results.
        format: Format of the results.
        scale: Sides of a result over sides of its picture.

    Raises:
        StorageError: A source cannot be listed.
    """
    found = Contents()
    pictures: list[Entry] = []
    raw: list[tuple[Entry, str]] = []
    for entry, is_asked_for in _entries(sources):
        if entry.irregular is not None:
            found.refused.append((entry.uri, entry.irregular))
        elif is_asked_for or is_named_as_picture(entry.key):
            pictures.append(entry)
        else:
            try:
                identify(read_head(functools.partial(storage.read_first_bytes, entry.uri)))
                pictures.append(entry)
            except ImageError as error:
                if error.reason is ImageReason.UNSUPPORTED_FORMAT:
                    raw.append((entry, str(error)))
                else:
                    found.num_others += 1
            except StorageError as error:
                found.refused.append((entry.uri, f"{error.reason}: {error.detail}"))
    stems = Counter(_stem(entry.key) for entry in pictures)
    for entry, why in raw:
        if stems[_stem(entry.key)]:
            found.num_others += 1
        else:
            found.refused.append((entry.uri, f"{ImageReason.UNSUPPORTED_FORMAT}: {why}"))
    for entry in pictures:
        part = "stem" if stems[_stem(entry.key)] == 1 else "name"
        key = output_key(
            storage.printable(entry.key), f"{{dir}}/{{{part}}}_x{{scale}}.{{ext}}", format, scale
        )
        found.tasks.append(Task(entry.uri, storage.join(target, key)))
    return found


def _entries(sources: Sequence[str]) -> Iterator[tuple[Entry, bool]]:
    """Yield every file, and whether it was named and not found in a folder."""
    for source in sources:
        if os.path.isdir(source):
            yield from ((entry, False) for entry in storage.list_entries(source))
        else:
            yield storage.find_entry(posixpath.dirname(source) or ".", posixpath.basename(source)), True


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0]
