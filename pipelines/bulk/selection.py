"""Which objects are inputs, and which of them still need work: the filtered listing minus the ledger, never
held in memory.

    listing -> selected -> (done? a picture? name taken? unreadable?) -> WorkItem | refused row

A name of an output is held by a picture, and given back when no output came of it. Files whose names are not
those of pictures are looked into: most are sidecars, videos and notes, and become rows without being fetched.

Everything streams in batches: memory is a few bytes a key (`pipelines.ledger.digests`), and the first batch
comes after the first page of the listing.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import posixpath
import re
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, digests
from pipelines.ledger.ledger import Known, Row
from resshift import storage
from resshift.images import ImageError, ImageReason
from resshift.images.identify import identify, is_named_as_picture
from resshift.storage import Entry, StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_BATCH = 256
_REMEMBERED = 10_000
_MAX_AHEAD = 100  # batches of refusals alone that are kept while looking for work
_MAX_WAITING = 10_000  # inputs that wait for names; more are refused at once


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
            key = storage.printable_key(entry.key)
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
        company: Largest number of inputs of a task or unit that it may be among. A worker that ended while it
            had this item among many leaves a few, one that had a few leaves 1: it is tried alone.
    """

    key: str
    uri: str
    etag: str
    size: int
    output: str
    attempts: int = 0
    deaths: int = 0
    company: int = sys.maxsize

    @property
    def is_suspect(self) -> bool:
        """Whether it is tried alone."""
        return self.company == 1

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
class _Claim:
    """A name of an output, from the time its input is given out until it is finished.

    Fields:
        item: The input that has the name.
        waiting: Inputs that would have it too, in the order of the listing.
    """

    item: WorkItem
    waiting: deque[WorkItem] = field(default_factory=deque)


@dataclass(slots=True)
class Worklist:
    """Divides a listing into work and refusals.

    An output name belongs to the input that has written it, else to the first one in listing order of which
    an output can be made. A file that is not named as a picture yields to one that is: D.THM is a preview of
    D.jpg. Others that map to the name wait while that is not known; then they are refused with
    reason name_collision, without any work on them, or take their turn. `settle` is told what became of an
    input.

    Args:
        entries: The selected entries of the listing.
        known: What the ledger says; its map of owners grows with the listing.
        output: Function from the key of an input to the key of its output.
        scale: Sides of an output over sides of its input.
        first_bytes: Function from a URI to the first bytes of the object; None: names tell what is a picture.
        open: Inputs whose rows are not in the ledger, in the order of the listing: the key in the ledger, and
            that of the listing. None: they are not kept.
        divided_to: Key of the last entry that was divided.
    """

    entries: Iterable[Entry]
    known: Known
    output: Callable[[str], str]
    scale: float
    first_bytes: Callable[[str], bytes] | None = None
    counts: ListingCounts = field(default_factory=ListingCounts)
    open: dict[str, str] | None = None
    divided_to: str = ""
    _divided: Iterator[Batch] = field(init=False)
    _ahead: deque[Batch] = field(default_factory=deque)
    _recent: OrderedDict[str, str] = field(default_factory=OrderedDict)
    _claims: dict[str, _Claim] = field(default_factory=dict[str, _Claim])
    _num_waiting: int = 0
    _neighbours: dict[str, str] = field(default_factory=dict[str, str])
    _unread: list[Row] = field(default_factory=list[Row])
    _yielding: list[WorkItem] = field(default_factory=list[WorkItem])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._divided = self._divide_all(iter(self.entries))

    def batches(self) -> Iterator[Batch]:
        """Yield (items to do, rows of refused inputs) for a few hundred entries at a time, beginning with
        what was read ahead.
        """
        while self._ahead:
            yield self._ahead.popleft()
        yield from self._divided

    def has_work(self, until: float = math.inf) -> bool:
        """Read ahead to the first input that needs work; return False when there is none. A job without work
        needs no cluster.

        Args:
            until: Time of the monotonic clock at which it is taken for granted that there is some.
        """
        for items, refused in self._divided:
            if items or refused:
                self._ahead.append((items, refused))
            if items or len(self._ahead) > _MAX_AHEAD or time.monotonic() > until:
                return True
        return False

    def written(self, keys: Iterable[str]) -> None:
        """Take note of keys whose rows are in the ledger; others may be among them."""
        with self._lock:
            still_open = self.open or {}
            for key in keys if still_open else ():
                still_open.pop(key, None)

    def progress(self) -> tuple[str, str | None]:
        """Return the key of the last entry that was divided, and that of the first one without a row in the
        ledger, None if all have theirs.
        """
        with self._lock:
            return self.divided_to, next(iter(self.open.values()), None) if self.open else None

    def contested(self) -> list[WorkItem]:
        """Return the unfinished inputs for whose names others wait."""
        with self._lock:
            return [claim.item for claim in self._claims.values() if claim.waiting]

    def settle(self, row: Row) -> Batch:
        """Take note of what became of an item; return what follows for inputs that waited for its name: the
        first of them as an item where the name is free, all as refusals where it is taken.
        """
        output = row["output"] or self.output(row["key"])
        with self._lock:
            claim = self._claims.pop(output)
            if row["status"] == "failed" and claim.waiting:
                item = claim.waiting.popleft()
                self._num_waiting -= 1
                self._claims[output] = _Claim(item, claim.waiting)
                self.known.owners.release(digests([output]))
                self.known.owners.claim(digests([output]), digests([item.key]))
                self._remember(output, item.key)
                self.counts.pending += 1
                return [item], []
            if row["status"] == "failed":
                self.known.owners.release(digests([output]))
                return [], []
            self._num_waiting -= len(claim.waiting)
            self.counts.refused += len(claim.waiting)
            return [], [self._collision(item.key, item.etag, item.size, output) for item in claim.waiting]

    def _divide_all(self, entries: Iterator[Entry]) -> Iterator[Batch]:
        while batch := list(itertools.islice(entries, _BATCH)):
            yield self._divide(batch)
        if self._unread or self._yielding:
            yield self._granted(self._yielding, self._unread)

    def _divide(self, batch: Sequence[Entry]) -> Batch:
        keys = [storage.printable_key(entry.key) for entry in batch]
        outputs, unnameable = self._names(keys)
        is_done = self.known.done.contains(
            digests([(key, entry.etag) for key, entry in zip(keys, batch, strict=True)])
        )
        unusable = [
            unnameable.get(i) if entry.irregular is None else entry.irregular for i, entry in enumerate(batch)
        ]
        tried = [i for i, why in enumerate(unusable) if why is None and not is_done[i]]
        no_pictures = self._no_pictures([(i, batch[i]) for i in tried])
        wants = [
            WorkItem(keys[i], batch[i].uri, batch[i].etag, batch[i].size_bytes, outputs[i])
            for i in tried
            if i not in no_pictures
        ]
        # The picture that a file yields to may be in the next batch, as a listing is sorted.
        named = [item for item in wants if is_named_as_picture(item.key)]
        before, self._yielding = self._yielding, [item for item in wants if not is_named_as_picture(item.key)]
        refused = self._unsupported(keys, no_pictures)
        with self._lock:
            for i, entry in enumerate(batch):
                self.counts.listed += 1
                self.counts.listed_bytes += entry.size_bytes
                if is_done[i]:
                    self.counts.done += 1
                    if unusable[i] is None:
                        self._remember(outputs[i], keys[i])
                elif (why := unusable[i]) is not None:
                    refused.append(self._refused(entry, keys[i], *_reason(why)))
            self.divided_to = batch[-1].key
            if self.open is not None:
                self.open.update((keys[i], entry.key) for i, entry in enumerate(batch) if not is_done[i])
        return self._granted([*named, *before], refused)

    def _granted(self, wants: Sequence[WorkItem], refused: list[Row]) -> Batch:
        """Claim names; return the inputs that have theirs now, and the refusals with those of the others."""
        items: list[WorkItem] = []
        with self._lock:
            claimed = digests([item.output for item in wants]), digests([item.key for item in wants])
            for item, is_granted in zip(wants, self.known.owners.claim(*claimed).tolist(), strict=True):
                claim = self._claims.get(item.output)
                if is_granted:
                    items.append(item)
                    self._claims[item.output] = _Claim(item)
                    self._remember(item.output, item.key)
                elif claim is not None and self._num_waiting < _MAX_WAITING:
                    claim.waiting.append(item)
                    self._num_waiting += 1
                else:
                    refused.append(self._collision(item.key, item.etag, item.size, item.output))
            self.counts.pending += len(items)
            self.counts.refused += len(refused)
        return items, refused

    def _no_pictures(self, tried: Sequence[tuple[int, Entry]]) -> dict[int, Row]:
        """Look into files that are not named as pictures; return the rows of those that are none."""
        first_bytes = self.first_bytes
        if first_bytes is None:
            return {}

        def look(entry: Entry) -> Row | None:
            try:
                identify(first_bytes(entry.uri) if entry.size_bytes else b"")
            except ImageError as error:
                row = self._refused(entry, storage.printable_key(entry.key), str(error.reason), str(error))
                is_picture = error.reason is ImageReason.UNSUPPORTED_FORMAT
                return row if is_picture else ledger.skipped(row, ImageReason.NOT_AN_IMAGE, str(error))
            except StorageError:
                return None  # whoever fetches it will say so
            return None

        unknown = [(i, entry) for i, entry in tried if not is_named_as_picture(entry.key)]
        if not unknown:
            return {}
        with ThreadPoolExecutor(min(16, len(unknown))) as pool:
            rows = pool.map(look, [entry for _, entry in unknown])
            return {i: row for (i, _), row in zip(unknown, rows, strict=True) if row is not None}

    def _unsupported(self, keys: Sequence[str], no_pictures: dict[int, Row]) -> list[Row]:
        """Return the rows of inputs that are no pictures and whose rows are certain. A camera raw file beside
        a picture of the same name is skipped, and without one it failed: the picture may be in the next
        batch, as a listing is sorted.
        """
        before, self._neighbours = (
            self._neighbours,
            {_stem(key): key for key in keys if is_named_as_picture(key)},
        )
        stems = before | self._neighbours
        rows = [row for row in no_pictures.values() if row["status"] == "skipped"]
        unread = [row for row in no_pictures.values() if row["status"] == "failed"]
        for row in (*self._unread, *unread):
            if (beside := stems.get(_stem(row["key"]))) is not None:
                message = f"{row['message']}; {beside} beside it"
                rows.append(ledger.skipped(row, row["reason"], message))
        certain = {row["key"] for row in rows}
        rows += [row for row in self._unread if row["key"] not in certain]
        self._unread = [row for row in unread if row["key"] not in certain]
        return rows

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

    def _collision(self, key: str, etag: str, size: int, output: str) -> Row:
        first = self._recent.get(output, "another input")
        message = (
            f"{first} is written to {output} already; --name '{{dir}}/{{name}}.{{ext}}' would keep them apart"
        )
        return ledger.failed(ledger.row(key, etag, "failed", size=size), "name_collision", message)

    @staticmethod
    def _refused(entry: Entry, key: str, reason: str, message: str) -> Row:
        row = ledger.row(key, entry.etag, "failed", size=entry.size_bytes)
        return ledger.failed(row, reason, message)

    def _remember(self, output: str, key: str) -> None:
        """Keep the latest names for messages: colliding inputs are mostly neighbours in the listing."""
        self._recent[output] = key
        if len(self._recent) > _REMEMBERED:
            self._recent.popitem(last=False)


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0]


def _reason(why: str) -> tuple[str, str]:
    """Return the reason that a text begins with, and the rest; without one the file is irregular."""
    named, _, message = why.partition(": ")
    return (named, message) if named in set(StorageReason) else (StorageReason.IRREGULAR.value, why)
