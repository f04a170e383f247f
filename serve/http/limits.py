"""Bounds that hold before work is done: bytes in memory, queued requests, time, and quotas of callers.

    budget = ByteBudget(limit)           bodies of all requests together, counted as they arrive
    admission = Admission(slots, queue)  a bounded queue, first come first served, with a limit on waiting
    quota = Quota(per minute, ...)       a bucket of requests and one of megapixels for every key

Everything here belongs to one gateway and its event loop. Of several gateways each has its share of the line
and of the quotas, the whole divided by their number (`share`): no request waits for another process, and
nothing has to live for the limits to hold. Shares of the line are rounded up, and for the half second in
which not all gateways know of a new one their sum is larger. The price is a caller whose connections all end
at one gateway: it gets that gateway's share. Clocks are arguments, so that tests need not wait.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import AsyncGenerator, Callable

from serve.http.problems import Problem

Clock = Callable[[], float]
# The shortest that a request may ask for; below it, every answer would be "try again later".
LEAST_TIMEOUT_S = 0.1
_MEMORY_SHARE = 0.2  # weight of the last request in the estimate of how long one takes


def announced_bytes(content_length: str) -> int:
    """Return the value of a `Content-Length` header; 0 without one, and of a number with more than 18 digits
    no more than 10^18.
    """
    digits = content_length.lstrip("0")
    return (int(digits) if len(digits) <= 18 else 10**18) if digits.isdecimal() and digits.isascii() else 0


def too_large(found: str, limit: int) -> Problem:
    """Return the problem for a body of `found` bytes."""
    return Problem(
        "too_large",
        f"the body has {found} bytes, at most {limit} are allowed",
        members={"reason": "too_large"},
    )


class ByteBudget:
    """The number of bytes of requests that are in memory.

    Args:
        limit: Largest number of bytes of all requests together.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    def take(self, num_bytes: int) -> None:
        """Count bytes that are about to be kept.

        Raises:
            Problem: busy.
        """
        if self.used + num_bytes > self.limit:
            raise Problem(
                "busy",
                "the memory for bodies of requests is used up by requests that are being worked on",
                retry_after_s=1,
            )
        self.used += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Forget bytes that are no longer kept."""
        self.used -= num_bytes


class Bucket:
    """A token bucket: holds a minute's worth, fills evenly.

    Args:
        per_minute: Number of tokens that are added in a minute; None: no limit.
        clock: Clock in seconds.
    """

    def __init__(self, per_minute: float | None, clock: Clock = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._tokens = per_minute or 0.0
        self._at = clock()
        self._num_shares = 1

    def share(self, num_shares: int) -> None:
        """Hold one of `num_shares` equal parts of the tokens from now on."""
        self._num_shares = num_shares

    def take(self, amount: float) -> float:
        """Take tokens if there are enough; return 0, or the seconds until there will be (inf: more than the
        bucket holds).
        """
        if self._per_minute is None:
            return 0.0
        now, size = self._clock(), self._per_minute / self._num_shares
        self._tokens = min(size, self._tokens + (now - self._at) * size / 60)
        self._at = now
        if amount > self._per_minute:
            return float("inf")
        # More than a share holds is taken from a full one, which is in debt afterwards.
        needed = min(amount, size)
        if needed > self._tokens + 1e-9:
            return (needed - self._tokens) * 60 / size
        self._tokens -= amount
        return 0.0


class Quota:
    """What the holder of a key may use.

    Args:
        requests_per_minute, megapixels_per_minute: None: any.
        clock: Clock in seconds.
    """

    def __init__(
        self,
        requests_per_minute: float | None,
        megapixels_per_minute: float | None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._requests = Bucket(requests_per_minute, clock)
        self._megapixels = Bucket(megapixels_per_minute, clock)

    def share(self, num_shares: int) -> None:
        """Hold one of `num_shares` equal parts from now on."""
        self._requests.share(num_shares)
        self._megapixels.share(num_shares)

    def take_request(self) -> None:
        """Count a request.

        Raises:
            Problem: rate_limited.
        """
        wait_s = self._requests.take(1)
        if wait_s:
            raise Problem(
                "rate_limited", "too many requests a minute for this key", retry_after_s=min(wait_s, 60)
            )

    def take_pixels(self, num_pixels: int) -> None:
        """Count the pixels of a picture, known from its header.

        Raises:
            Problem: rate_limited; too_large, when the picture is larger than a minute's share.
        """
        wait_s = self._megapixels.take(num_pixels / 1e6)
        if wait_s == float("inf"):
            raise Problem(
                "too_large",
                f"the picture has {num_pixels / 1e6:.1f} megapixels, more than this key may use in a minute",
            )
        if wait_s:
            raise Problem("rate_limited", "too many megapixels a minute for this key", retry_after_s=wait_s)


class Deadline:
    """The time at which an answer is due.

    Args:
        seconds: Seconds from now.
        clock: Clock in seconds.
    """

    def __init__(self, seconds: float, clock: Clock = time.monotonic) -> None:
        self._clock, self._due = clock, clock() + seconds

    @property
    def left_s(self) -> float:
        return self._due - self._clock()

    @classmethod
    def asked(cls, header: str | None, default_s: float, max_s: float) -> Deadline:
        """Return the deadline of a request.

        Args:
            header: Value of `X-Request-Timeout`, in seconds.
            default_s: Seconds when there is no header.
            max_s: Largest number of seconds.

        Raises:
            Problem: bad_option.
        """
        if header is None:
            return cls(default_s)
        try:
            seconds = float(header)
        except ValueError:
            seconds = float("nan")
        if not LEAST_TIMEOUT_S <= seconds <= max_s:
            raise Problem(
                "bad_option",
                f"X-Request-Timeout must be seconds in [{LEAST_TIMEOUT_S:g}, {max_s:g}], got {header[:40]!r}",
            )
        return cls(seconds)


class Admission:
    """A line in front of the model: `slots` requests are worked on, `queue` wait, all others are refused at
    once.

    Args:
        slots: Number of requests that are worked on at a time.
        queue: Number of requests that may wait, first come first served.
        clock: Clock in seconds.
    """

    def __init__(self, slots: int, queue: int, clock: Clock = time.monotonic) -> None:
        self.slots, self.queue = slots, queue
        self._whole_queue = queue
        self.num_working = 0
        self._waiting: collections.deque[asyncio.Future[None]] = collections.deque()
        self._clock = clock
        self._seconds: float | None = None  # estimate of how long a request holds a slot

    def share(self, slots: int, num_shares: int) -> None:
        """Have one of `num_shares` equal parts of the slots and of the line from now on; at least one slot.

        Args:
            slots: Number of slots of all shares together.
            num_shares: Number of shares.
        """
        self.slots = max(1, -(-slots // num_shares))
        self.queue = -(-self._whole_queue // num_shares)
        while self._waiting and self.num_working < self.slots:
            self.num_working += 1
            self._release()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def estimated_wait_s(self) -> float:
        """Return how many seconds a request that arrives now will wait."""
        if self.num_working < self.slots and not self._waiting:
            return 0.0
        return (len(self._waiting) + 1) * (self._seconds or 0.0) / self.slots

    def check(self, left_s: float) -> None:
        """Refuse a request that would find the line full, or get its turn too late; cheap, for before its
        body is read.

        Raises:
            Problem: busy.
        """
        wait_s = self.estimated_wait_s()
        if self.num_working >= self.slots and len(self._waiting) >= self.queue:
            raise Problem(
                "busy", f"{len(self._waiting)} requests wait already", retry_after_s=max(1.0, wait_s)
            )
        if wait_s > left_s:
            raise Problem(
                "busy",
                f"the line takes about {wait_s:.1f} s, the request has {max(0.0, left_s):.1f} s",
                retry_after_s=max(1.0, wait_s - left_s),
            )

    @contextlib.asynccontextmanager
    async def slot(self, deadline: Deadline) -> AsyncGenerator[float]:
        """Wait for a slot and hold it; gives the seconds of waiting.

        Raises:
            Problem: busy: the line is full, or the deadline passed in it.
        """
        self.check(deadline.left_s)
        came = self._clock()
        if self.num_working >= self.slots or self._waiting:
            await self._wait(deadline)
        else:
            self.num_working += 1
        began = self._clock()
        try:
            yield began - came
        finally:
            took = self._clock() - began
            self._seconds = (
                took if self._seconds is None else (1 - _MEMORY_SHARE) * self._seconds + _MEMORY_SHARE * took
            )
            self._release()

    async def _wait(self, deadline: Deadline) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            async with asyncio.timeout(max(0.0, deadline.left_s)):
                await turn
        except TimeoutError:
            self._leave(turn)
            raise Problem(
                "busy",
                "the deadline passed while the request waited",
                retry_after_s=max(1.0, self.estimated_wait_s()),
            ) from None
        except asyncio.CancelledError:  # the client went away
            self._leave(turn)
            raise

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn in self._waiting:
            self._waiting.remove(turn)
        elif turn.done() and not turn.cancelled():  # its turn came at the same moment: pass it on
            self._release()

    def _release(self) -> None:
        """Hand the slot to the next in line, or free it; one of more than there are by now is free."""
        while self._waiting and self.num_working <= self.slots:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_working -= 1
