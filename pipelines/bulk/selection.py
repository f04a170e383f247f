"""Which objects are inputs, and which of them still need work: the filtered listing minus the ledger, never
held in memory.

    listing -> selected -> (done? name taken? unreadable?) -> WorkItem | refused row

Everything streams in batches: memory is a few bytes a key (`pipelines.ledger.digests`), and the first batch
comes after the first page of the listing.
"""

from __future__ import annotations

import fnmatch
import itertools
import posixpath
import re
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, digests
from pipelines.ledger.ledger import Known, Row
from resshift import storage
from resshift.storage import Entry, StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_BATCH = 256
_REMEMBERED = 10_000
_MAX_AHEAD = 100  # batches of refusals alone that are kept while looking for work


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which objects below SRC are inputs. What is not selected gets no row.

    Fields:
        include: Globs; an object must match one when there are any. `*` spans `/`. A glob without `/` is
            matched against the last part of the key.
        exclude: Globs that win over `include`.
        min_bytes, max_bytes: Smallest and largest object.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_bytes: int = 0
    max_bytes: int | None = None

    def matcher(self) -> Callable[[Entry], bool]:
        """Return a function that says whether an entry is selected."""
        include, exclude = _pattern(self.include), _pattern(self.exclude)

        def selected(entry: Entry) -> bool:
            key = storage.printable(entry.key)
            if key.split("/", 1)[0] == ledger.DIRECTORY:
                return False
            name = f"{key}\0{posixpath.basename(key)}"
            if (include is not None and not include.fullmatch(name)) or (
                exclude is not None and exclude.fullmatch(name)
            ):
                return False
            # An object that cannot be read has no size, and must keep its row.
            return entry.irregular is not None or (
                self.min_bytes <= entry.size_bytes
                and (self.max_bytes is None or entry.size_bytes <= self.max_bytes)
            )

        return selected


def _pattern(globs: Sequence[str]) -> re.Pattern[str] | None:
    """Return a pattern for `KEY NUL BASENAME`."""
    if not globs:
        return None
    bodies: list[str] = []
    for glob in globs:
        body = fnmatch.translate(glob).removeprefix("(?s:").removesuffix(")\\Z").removesuffix(")\\z")
        bodies.append(f"(?:{body}\0[^\0]*)" if "/" in glob else f"(?:[^\0]*\0{body})")
    return re.compile("|".join(bodies), re.DOTALL)


def listed_keys(root: str, keys: Iterable[str], options: S3Options = s3.DEFAULT) -> Iterator[Entry]:
    """Look up the keys of a list, in its order. One that is not there is an entry with `irregular` set.

    Args:
        root: SRC.
        keys: Lines; empty ones and repetitions are skipped.
        options: How SRC is reached.
    """

    def find(key: str) -> Entry:
        try:
            return storage.find_entry(root, key, options)
        except StorageError as error:
            return Entry(
                key, f"{root.rstrip('/')}/{key}", 0, "", storage.EPOCH, f"{error.reason}: {error.detail}"
            )

    seen = DigestSet()
    lines = (line.rstrip("\r\n") for line in keys)
    with ThreadPoolExecutor(16) as pool:
        while batch := list(dict.fromkeys(itertools.islice((line for line in lines if line), _BATCH))):
            members = digests(batch)
            is_new = ~seen.contains(members)
            seen.add(members[is_new])
            yield from pool.map(find, itertools.compress(batch, is_new.tolist()))


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One input to be done.

    Fields:
        key: Name of the input relative to SRC, printable.
        uri: Where it is read.
        etag, size: Version and bytes in the listing.
        output: Name of the output relative to DST.
        attempts: How often work on it began and was cut off.
        deaths: How many workers ended while they had this item alone.
        is_suspect: Whether a worker ended while it had this item among others; it is tried alone.
    """

    key: str
    uri: str
    etag: str
    size: int
    output: str
    attempts: int = 0
    deaths: int = 0
    is_suspect: bool = False

    def row(self, model: str) -> Row:
        """Return the ledger row of this item as it is before the work: nothing has gone wrong.

        Args:
            model: Identity of the model.
        """
        return {
            **ledger.row(self.key, self.etag, "ok"),
            "size": self.size,
            "output": self.output,
            "attempts": self.attempts + 1,
            "model": model,
        }


Batch: TypeAlias = tuple[list[WorkItem], list[Row]]


@dataclass(slots=True)
class ListingCounts:
    """What a listing held so far: inputs, their bytes, and what becomes of them."""

    listed: int = 0
    listed_bytes: int = 0
    done: int = 0
    pending: int = 0
    refused: int = 0


@dataclass(slots=True)
class Worklist:
    """Divides a listing into work and refusals.

    An output name belongs to the input that has written it, else to the first one in listing order; others
    that map to it are refused with reason name_collision, before any work on them.

    Args:
        entries: The selected entries of the listing.
        known: What the ledger says; its map of owners grows with the listing.
        output: Function from the key of an input to the key of its output.
        scale: Sides of an output over sides of its input.
    """

    entries: Iterable[Entry]
    known: Known
    output: Callable[[str], str]
    scale: float
    counts: ListingCounts = field(default_factory=ListingCounts)
    _entries: Iterator[Entry] = field(init=False)
    _ahead: deque[Batch] = field(default_factory=deque)
    _recent: OrderedDict[str, str] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self._entries = iter(self.entries)

    def batches(self) -> Iterator[Batch]:
        """Yield (items to do, rows of refused inputs) for a few hundred entries at a time, beginning with
        what was read ahead.
        """
        while self._ahead:
            yield self._ahead.popleft()
        while batch := list(itertools.islice(self._entries, _BATCH)):
            yield self._divide(batch)

    def has_work(self) -> bool:
        """Read ahead to the first input that needs work; return False when there is none. A job without work
        needs no cluster.
        """
        while batch := list(itertools.islice(self._entries, _BATCH)):
            items, refused = self._divide(batch)
            if items or refused:
                self._ahead.append((items, refused))
            if items or len(self._ahead) > _MAX_AHEAD:
                return True
        return False

    def _divide(self, batch: Sequence[Entry]) -> Batch:
        keys = [storage.printable(entry.key) for entry in batch]
        outputs, unnameable = self._names(keys)
        is_done = self.known.done.contains(
            digests([(key, entry.etag) for key, entry in zip(keys, batch, strict=True)])
        )
        unusable = [
            unnameable.get(i) if entry.irregular is None else entry.irregular for i, entry in enumerate(batch)
        ]
        wants = [i for i, why in enumerate(unusable) if why is None and not is_done[i]]
        key_digests = digests(keys)
        has_name = dict.fromkeys(range(len(batch)), True)
        if wants:
            granted = self.known.owners.claim(digests([outputs[i] for i in wants]), key_digests[wants])
            has_name |= dict(zip(wants, granted.tolist(), strict=True))
        items: list[WorkItem] = []
        refused: list[Row] = []
        for i, entry in enumerate(batch):
            self.counts.listed += 1
            self.counts.listed_bytes += entry.size_bytes
            if is_done[i]:
                self.counts.done += 1
            elif (why := unusable[i]) is not None:
                refused.append(self._refused(entry, keys[i], _reason(why), why))
            elif not has_name[i]:
                first = self._recent.get(outputs[i], "another input")
                message = (
                    f"{first} is written to {outputs[i]} already; --name '{{dir}}/{{name}}.{{ext}}' would "
                    "keep them apart"
                )
                refused.append(self._refused(entry, keys[i], "name_collision", message))
            else:
                items.append(WorkItem(keys[i], entry.uri, entry.etag, entry.size_bytes, outputs[i]))
            if unusable[i] is None and has_name[i]:
                self._remember(outputs[i], keys[i])
        self.counts.pending += len(items)
        self.counts.refused += len(refused)
        return items, refused

    def _names(self, keys: Sequence[str]) -> tuple[list[str], dict[int, str]]:
        """Return the output of every key, and why some have none: an object may be called "../x", an output
        may not.
        """
        outputs: list[str] = []
        unnameable: dict[int, str] = {}
        for i, key in enumerate(keys):
            try:
                outputs.append(self.output(key))
            except ValueError as error:
                outputs.append("")
                unnameable[i] = f"{StorageReason.INVALID}: the name {error}"
        return outputs, unnameable

    @staticmethod
    def _refused(entry: Entry, key: str, reason: str, message: str) -> Row:
        row = ledger.row(key, entry.etag, "failed", size=entry.size_bytes)
        return ledger.failed(row, reason, message)

    def _remember(self, output: str, key: str) -> None:
        """Keep the latest names for messages: colliding inputs are mostly neighbours in the listing."""
        self._recent[output] = key
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)


def _reason(why: str) -> str:
    """Return the reason that a text begins with; without one the file is irregular."""
    named = why.partition(": ")[0]
    return named if named in set(StorageReason) else str(StorageReason.IRREGULAR)
