"""Decode in a separate process, with a memory and a time limit, so that no file can crash a worker or take
over what it may do.

    with Decoder(DecoderLimits(seconds=60)) as decoder:
        frames = decoder.decode(data)

raises ImageError for a bad file, and DecoderDied or DecoderTimeout for one that crashed or stopped the
process.

The child is `python -m resshift.images.confined`. It lives as long as its parent and is started again after a
crash. It imports neither torch nor ray, so a start takes 0.4 s and 70 MB. It decodes one file at a time, so a
crash is due to that file and to no other. Files and pixels are sent over a socket pair; the child ends when
the other end closes, however the parent ended.

A file that takes over its decoder finds neither the parent's environment nor a file, socket or other
process within reach (`resshift.images.seccomp`), and its answer is checked field by field
(`resshift.images.answers`).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from types import TracebackType

from resshift.images.animation import FrameChoice, Frames
from resshift.images.answers import LENGTH, Answer, BadAnswer, receive
from resshift.images.types import ImageError, ImageHeader, ImageLimits

# Of the parent's environment: where the interpreter finds its libraries, and its language.
INHERITED = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "LANG", "LC_ALL", "LC_CTYPE")


class DecoderDied(RuntimeError):
    """The process ended while it decoded this file; the message gives its signal or exit code."""


class DecoderTimeout(RuntimeError):
    """The file took longer than the limit; its process was ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLimits:
    """Limits for one file.

    Fields:
        images: Limits of sizes, checked on the header.
        seconds: Limit of wall-clock time.
        memory_mb: Memory limit in addition to the memory of an idle decoder; None means 256 MB and 64 bytes
            for every pixel that `images` accepts.
    """

    images: ImageLimits = field(default_factory=ImageLimits)
    seconds: float = 60.0
    memory_mb: int | None = None

    @property
    def memory_bytes(self) -> int:
        return (
            (self.memory_mb << 20)
            if self.memory_mb is not None
            else (256 << 20) + 64 * self.images.max_pixels
        )


class Decoder:
    """The parent's side; it starts the child when it is first needed."""

    def __init__(self, limits: DecoderLimits | None = None) -> None:
        self.limits = limits or DecoderLimits()
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._due = 0.0  # on the monotonic clock

    @property
    def pid(self) -> int | None:
        """Process id of the child, or None if it does not run."""
        return None if self._child is None else self._child.pid

    def decode(self, data: bytes, choice: FrameChoice = "first") -> Frames:
        """Decode one file.

        Raises:
            ImageError: The file is refused.
            DecoderTimeout: Decoding took too long.
            DecoderDied: The process was killed, crashed, or ran out of memory.
        """
        frames = self._ask(data, choice)
        assert isinstance(frames, Frames)
        return frames

    def header(self, data: bytes) -> ImageHeader:
        """Read the header of one file.

        Raises:
            ImageError, DecoderTimeout, DecoderDied: As for `decode`.
        """
        header = self._ask(data, None)
        assert isinstance(header, ImageHeader)
        return header

    def _ask(self, data: bytes, choice: FrameChoice | None) -> Answer:
        """Return the frames of a file, or its header if no frames are chosen."""
        if self._channel is None:
            self._start()
        assert self._channel is not None
        asked = {"limits": asdict(self.limits.images), "choice": choice, "size_bytes": len(data)}
        head = json.dumps(asked).encode()
        self._due = time.monotonic() + self.limits.seconds
        try:
            self._channel.settimeout(self.limits.seconds)
            self._channel.sendall(LENGTH.pack(len(head)) + head)
            self._channel.sendall(data)
            answer = receive(self._fill, self.limits.memory_bytes, self.limits.images.max_pixels)
            if (choice is None and isinstance(answer, Frames)) or (
                choice is not None and isinstance(answer, ImageHeader)
            ):
                raise BadAnswer(f"{type(answer).__name__} was not asked for")
        except TimeoutError:
            self.close()
            raise DecoderTimeout(f"decoding took longer than {self.limits.seconds:g} s") from None
        except BadAnswer as error:
            self.close()
            raise DecoderDied(f"the decoder answered what is no picture: {error}") from None
        except OSError:
            raise DecoderDied(f"the decoder ended while it had this file: {self._reap()}") from None
        if isinstance(answer, ImageError):
            raise answer
        return answer

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [
                sys.executable,
                "-m",
                "resshift.images.confined",
                str(theirs.fileno()),
                str(self.limits.memory_bytes),
            ]
            # The import path of the parent, not of its environment: a Ray worker finds the package in a
            # directory of its job.
            environment = {name: os.environ[name] for name in INHERITED if name in os.environ} | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            }
            self._child = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._channel = ours

    def _fill(self, view: memoryview) -> None:
        """Fill a buffer with what the child sends next, until the file's time is over."""
        assert self._channel is not None
        while len(view):
            self._channel.settimeout(max(1e-3, self._due - time.monotonic()))
            view = view[received(self._channel, view) :]

    def _reap(self) -> str:
        child = self._child
        try:
            code = 0 if child is None else child.wait(1)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End the child; the next `decode` starts another."""
        if self._channel is not None:
            self._channel.close()
        if self._child is not None:
            self._child.kill()
            self._child.wait()
        self._child = self._channel = None

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def received(channel: socket.socket, view: memoryview) -> int:
    """Receive some bytes into a buffer; return their number.

    Raises:
        ConnectionError: The other side has closed the connection.
    """
    count = channel.recv_into(view)
    if not count:
        raise ConnectionError("the other side has closed the connection")
    return count
