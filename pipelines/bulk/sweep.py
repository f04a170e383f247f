"""One pass of a job over its inputs, in ranges of keys.

    Sweep -> Share (a range, as a driver gets it) -> RangeWork (listing, Worklist and cursor of a range)

A job that can be divided (its listing is that of SRC, and no two directories compete for a name) begins with
the ranges that no cursor says are finished, of at most some hundred thousand rows of the ledger each. A range
can give away its end as long as that is not listed. What is done is asked of the rows of that range alone, so
the memory of a driver does not grow with the ledger.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelines.bulk.ranges import boundary, keeps_to_directories, split_point, stem, straddling
from pipelines.bulk.selection import Batch, ListingCounts, Selection, Worklist, listed_keys
from pipelines.bulk.stages import StageOptions
from pipelines.ledger import cursors, ledger
from pipelines.ledger.cursors import Finished
from pipelines.ledger.ledger import Interval, Part, Row
from resshift import storage
from resshift.config import OptionError
from resshift.images.identify import read_head
from resshift.storage import Entry, s3
from resshift.storage.s3 import S3Options

_PAGE = 1000
_READ_AHEAD_S = 10.0  # that a command looks for work before it starts a cluster
_RANGE_ROWS = 200_000
# Keys of a listing for which cursors are kept: a shorter one is soon read again, with what is new in it.
_WORTH_CURSORS = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Which inputs a job has.

    Fields:
        source: SRC.
        selection: Which objects below it.
        keys: File with their keys, one a line; None: the listing of the source.
        retry_failed: Whether those that failed are tried again.
        again: Keys that are not done, whatever the ledger says.
    """

    source: str
    selection: Selection = field(default_factory=Selection)
    keys: str | None = None
    retry_failed: bool = False
    again: frozenset[str] = frozenset()

    def entries(
        self, options: S3Options = s3.DEFAULT, start: str = "", stop: str | None = None
    ) -> Iterator[Entry]:
        """Stream the selected entries, from a key to before another.

        Raises:
            OptionError: The list of keys cannot be read.
        """
        if self.keys is not None:
            found = listed_keys(self.source, _lines(self.keys), options)
        else:
            found = storage.list_entries(self.source, options, start, stop)
        return filter(self.selection.matcher(), found)

    def worklist(
        self,
        stages: StageOptions,
        entries: Iterable[Entry],
        parts: Sequence[Part] | None = None,
        within: Sequence[Interval] = (("", None),),
    ) -> Worklist:
        """Return entries minus the ledger, which is read here.

        Args:
            stages: Options of the job.
            entries: What `entries` returned.
            parts: Parts of the ledger; None: all there are.
            within: Where the keys of the entries lie.
        """
        known = ledger.load_known(
            stages.target,
            retry_failed=self.retry_failed,
            again=self.again,
            s3_options=stages.target_s3,
            of_parts=parts,
            within=within,
        )
        return Worklist(entries, known, *_naming(stages))


def _naming(stages: StageOptions) -> tuple[Any, float, Any]:
    """Return what a `Worklist` must know of names and files."""

    def look(uri: str) -> bytes:
        return read_head(functools.partial(storage.read_first_bytes, uri, options=stages.source_s3))

    def output(key: str) -> str:
        name = stages.outputs.output_key(key)
        if (problem := storage.name_problem(stages.target, name)) is not None:
            raise ValueError(problem)
        return name

    return output, stages.outputs.scale, look


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, "rb") as file:
            encoding, errors = storage.list_encoding(file.read(2))
        with open(path, encoding=encoding, errors=errors) as file:
            yield from file
    except OSError as error:
        raise OptionError("keys", f"{path}: {error.strerror}") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A range of keys, as it is given to a driver.

    Fields:
        id: Number in this run.
        start, stop: First key, and the key before which it ends; None: the end of the listing.
        parts: Parts of the ledger that may have rows of it.
        aside: Entries that were put aside, in place of a listing.
    """

    id: int
    start: str = ""
    stop: str | None = None
    parts: tuple[Part, ...] | None = None
    aside: tuple[Entry, ...] = ()


@dataclass(frozen=True, slots=True)
class RangeState:
    """How far a range has come.

    Fields:
        id: That of its share.
        stop: The key before which it ends now; None: the end of the listing.
        cursor: All before it have rows in the ledger; None: all have.
        position: Key up to which it was listed.
        is_listed: Whether the listing has come to its end.
        is_finished: Whether nothing is left to do but what was put aside.
        aside: Entries that compete for names across the limits of the range, when it is finished.
    """

    id: int
    stop: str | None
    cursor: str | None
    position: str
    is_listed: bool
    is_finished: bool
    aside: tuple[Entry, ...]


class RangeWork:
    """A range under way at a driver.

    Args:
        share: The range.
        inputs: Inputs of the job.
        stages: Options of the job.
        entries: Listing that was begun at the start of the range; None: it begins here.
    """

    def __init__(
        self, share: Share, inputs: Inputs, stages: StageOptions, entries: Iterator[Entry] | None = None
    ) -> None:
        self.share = share
        self._inputs, self._stages, self._entries = inputs, stages, entries
        self._stop = share.stop
        self._straddling = straddling(share.start) | straddling(share.stop)
        self._position = share.start
        self._aside: list[Entry] = []
        self._is_closed = False  # nothing more comes from the listing
        self._is_listed = False  # and all of it has been divided
        self._lock = threading.Lock()

    @functools.cached_property
    def worklist(self) -> Worklist:
        """What is listed minus the ledger; reads the ledger."""
        share = self.share
        if share.aside:
            within = [(stem(entry.key), f"{stem(entry.key)}/") for entry in share.aside]
            # Names of files that are not text are written differently in the ledger.
            if len(within) > _PAGE or not all(_is_text(entry.key) for entry in share.aside):
                within = [("", None)]
        else:
            within = [_of_text(share.start, share.stop)]
        found = self._inputs.worklist(self._stages, self._listed(), share.parts, within)
        found.open = {}
        return found

    @property
    def is_begun(self) -> bool:
        """Whether the worklist is there."""
        return "worklist" in self.__dict__

    def _listed(self) -> Iterator[Entry]:
        """Yield the entries up to the end of the range, which may come closer meanwhile."""
        share = self.share
        if share.aside:
            yield from share.aside
        else:
            found = self._entries or self._inputs.entries(self._stages.source_s3, share.start, share.stop)
            is_divided = bool(share.start) or share.stop is not None
            for entry in read_ahead(found) if storage.is_s3(self._inputs.source) else found:
                with self._lock:
                    if self._stop is not None and entry.key >= self._stop:
                        break
                    self._position = entry.key
                    is_divided = is_divided or self._stop is not None
                    if is_divided and (stem(entry.key) in self._straddling or not _is_text(entry.key)):
                        self._aside.append(entry)
                        continue
                yield entry
        with self._lock:
            self._is_closed = True

    def batches(self) -> Iterator[Batch]:
        """Yield what is to be done; see `Worklist.batches`."""
        yield from self.worklist.batches()
        with self._lock:
            self._is_listed = True

    def has_work(self, until: float) -> bool:
        """Look for an input that needs work; see `Worklist.has_work`. One that was put aside may."""
        return self.worklist.has_work(until) or bool(self._aside)

    def shrink(self, stop: str) -> bool:
        """Give away the keys from `stop` on; return False when they are listed already."""
        with self._lock:
            if self._is_closed or self._position >= stop or (self._stop is not None and stop >= self._stop):
                return False
            self._stop = stop
            self._straddling |= straddling(stop)
            return True

    def state(self) -> RangeState:
        """Return how far this range has come."""
        if not self.is_begun:
            return RangeState(self.share.id, self._stop, self.share.start, self._position, False, False, ())
        # In this order: the listing goes on meanwhile, in another thread.
        is_listed = self._is_listed
        divided_to, first_open = self.worklist.progress()
        with self._lock:
            position, stop, aside = self._position, self._stop, tuple(self._aside)
        is_finished = is_listed and first_open is None
        cursor = stop if is_finished else boundary(divided_to if first_open is None else first_open)
        if aside:
            limit = boundary(aside[0].key)
            cursor = limit if cursor is None else min(cursor, limit)
        cursor = None if cursor is None else max(cursor, self.share.start)
        return RangeState(
            self.share.id, stop, cursor, position, is_listed, is_finished, aside if is_finished else ()
        )


def _is_text(key: str) -> bool:
    """Return whether a key is the same in the ledger."""
    return storage.printable_key(key) == key


def _of_text(start: str, stop: str | None) -> Interval:
    """Return an interval that a ledger can be asked for, with all keys of another that are text in it."""
    first, last = (re.match("[^\ud800-\udfff]*", limit or "", re.DOTALL) for limit in (start, stop))
    assert first is not None
    assert last is not None
    return first[0], stop if stop is None or last[0] == stop else f"{last[0]}\U0010ffff"


def read_ahead(entries: Iterator[Entry]) -> Iterator[Entry]:
    """Yield entries while the next page of them is asked for."""
    with ThreadPoolExecutor(1, thread_name_prefix="listing") as pool:
        page = pool.submit(lambda: list(itertools.islice(entries, _PAGE)))
        while found := page.result():
            page = pool.submit(lambda: list(itertools.islice(entries, _PAGE)))
            yield from found


class Sweep:
    """A pass over the inputs of a job.

    Args:
        inputs: Inputs of the job.
        stages: Options of the job.
        entries: Their listing, begun.

    Fields:
        counts: Counts of the listing so far.
        finished: What is finished.
        queue: Ranges that are not given to anybody.
        begun: Ranges that were looked into for work.
    """

    def __init__(self, inputs: Inputs, stages: StageOptions, entries: Iterator[Entry]) -> None:
        self.inputs, self.stages = inputs, stages
        self.counts = ListingCounts()
        self.is_divisible = inputs.keys is None and keeps_to_directories(stages.outputs.name)
        self._entries = entries
        self._has_cursors = self.is_divisible and not inputs.again
        self._ids = itertools.count()
        self._parts: list[Part] | None = None
        self.finished = Finished()
        self.queue: deque[Share] = deque()
        self.begun: list[RangeWork] = []
        if self._has_cursors:
            self.finished = cursors.read(stages.target, self._pass(), stages.target_s3)
        self.num_continued = len(self.finished.intervals)
        self._has_file = self.num_continued > 0
        if not self.is_divisible:
            self.queue.append(Share(id=next(self._ids)))
            return
        self.look_into_ledger()
        for interval in self.finished.gaps():
            limits = [interval[0], *self._limits(interval)]
            for start, stop in zip(limits, [*limits[1:], interval[1]], strict=True):
                self.queue.append(self.share(start, stop))

    def _pass(self) -> dict[str, Any]:
        facts = asdict(self.inputs.selection)
        facts = {name: list(value) if isinstance(value, tuple) else value for name, value in facts.items()}
        source = storage.printable(self.inputs.source)
        return facts | {"source": source, "retry_failed": self.inputs.retry_failed}

    def look_into_ledger(self) -> None:
        """Take note of the parts that the ledger has now."""
        self._parts = ledger.look_into_parts(self.stages.target, self.stages.target_s3, self._parts or ())

    def share(self, start: str, stop: str | None, aside: Sequence[Entry] = ()) -> Share:
        """Return a range to give away."""
        parts = self._parts
        if parts is not None and not aside:
            parts = [part for part in parts if part.overlaps((start, stop))]
        known = None if parts is None else tuple(parts)
        return Share(id=next(self._ids), start=start, stop=stop, parts=known, aside=tuple(aside))

    def _limits(self, interval: Interval) -> list[str]:
        """Return limits in an interval, between which there are rows of the ledger for a range each."""
        start, stop = interval
        found: list[str] = []
        num_rows = 0
        for part in sorted(self._parts or (), key=lambda part: part.first):
            limit = boundary(part.first)
            if (
                num_rows >= _RANGE_ROWS
                and limit > max([start, *found[-1:]])
                and (stop is None or limit < stop)
            ):
                found.append(limit)
                num_rows = 0
            num_rows += part.num_rows
        return found

    def limit_within(self, start: str, stop: str | None) -> str | None:
        """Return a limit in the middle of an interval, None where there is none: by the ledger, or by looking
        for keys there.
        """
        firsts = sorted({boundary(part.first) for part in self._parts or () if part.num_rows})
        low = bisect.bisect_right(firsts, start)
        high = len(firsts) if stop is None else bisect.bisect_left(firsts, stop)
        if low < high:
            return firsts[(low + high) // 2]

        def first_key(start: str, stop: str | None) -> str | None:
            return storage.first_key(self.inputs.source, self.stages.source_s3, start, stop)

        return split_point(first_key, (start, stop))

    def divide(self, number: int) -> None:
        """Divide the ranges that nobody has until there are so many, if they can be divided."""
        whole: list[Share] = []
        while self.queue and len(self.queue) + len(whole) < number:
            share = self.queue.popleft()
            limit = self.limit_within(share.start, share.stop)
            if limit is None:
                whole.append(share)
            else:
                self.queue += (self.share(share.start, limit), self.share(limit, share.stop))
        self.queue = deque(sorted([*whole, *self.queue], key=lambda share: share.start))

    def has_work(self) -> bool:
        """Look for an input that needs work; return False when there is none. A job without work needs no
        cluster. After ten seconds without any it is taken for granted that there is some.
        """
        until = time.monotonic() + _READ_AHEAD_S
        while self.queue:
            self.begun.append(self.begin(self.queue.popleft()))
            if self.begun[-1].has_work(until):
                return True
        self.counts = sum_counts(work.worklist.counts for work in self.begun)
        return False

    def begin(self, share: Share) -> RangeWork:
        """Return the work on a range in this process."""
        entries = None if share.start else self._entries
        return RangeWork(share, self.inputs, self.stages, entries)

    def unread(self) -> None:
        """Give back the ranges that were looked into; whoever gets them lists them from their beginning."""
        self._entries = self.inputs.entries(self.stages.source_s3)
        self.queue.extendleft(work.share for work in reversed(self.begun))
        self.begun.clear()

    def save(self) -> None:
        """Write what is finished."""
        is_long = self.num_continued or self.counts.listed >= _WORTH_CURSORS
        if self._has_cursors and is_long and self.finished.intervals:
            cursors.write(self.stages.target, self._pass(), self.finished, self.stages.target_s3)
            self._has_file = True

    def told(self) -> Iterator[str]:
        """Yield lines on what this run found."""
        seen = self.counts
        yield f"{seen.listed} inputs: {seen.pending} to do, {seen.done} done before, {seen.refused} left out"
        if self.num_continued:
            yield "what an earlier run has finished was not listed; run again to find what has come there"

    def close(self) -> list[Row]:
        """End a pass that is complete; return the rows of inputs that were refused and not yet written."""
        rows = [row for work in self.begun for _, refused in work.batches() for row in refused]
        if self._has_file:
            cursors.remove(self.stages.target, self.stages.target_s3)
        return rows


def sum_counts(all_counts: Iterable[ListingCounts]) -> ListingCounts:
    """Return the sums of counts."""
    total = ListingCounts()
    for counts in all_counts:
        for name, value in asdict(counts).items():
            setattr(total, name, getattr(total, name) + value)
    return total
