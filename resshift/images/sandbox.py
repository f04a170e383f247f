"""Decode in a separate process, with a memory and a time limit, so that no file can crash a worker.

    with Decoder(DecoderLimits(seconds=60)) as decoder:
        frames = decoder.decode(data)

raises ImageError for a bad file, and DecoderDied or DecoderTimeout for one that crashed or stopped the
process.

The child is `python -m resshift.images.sandbox`. It lives as long as its parent and is started again after a
crash. It imports neither torch nor ray, so a start takes 0.3 s and 60 MB. It decodes one file at a time, so a
crash is due to that file and to no other. Files and pixels are sent over a socket pair; the child ends when
the other end closes, however the parent ended.

The memory limit is set as RLIMIT_AS, relative to the memory of the idle child, so an allocation that is too
large fails with MemoryError, which becomes an `ImageError` (too_large).
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from resshift.images.animation import FrameChoice, Frames, decode_frames
from resshift.images.header import probe
from resshift.images.types import ImageError, ImageHeader, ImageLimits, ImageReason

_LENGTH = struct.Struct(">Q")


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
        return self._ask(data, choice)

    def header(self, data: bytes) -> ImageHeader:
        """Read the header of one file.

        Raises:
            ImageError, DecoderTimeout, DecoderDied: As for `decode`.
        """
        return self._ask(data, None)

    def _ask(self, data: bytes, choice: FrameChoice | None) -> Any:
        """Return the frames of a file, or its header if no frames are chosen."""
        if self._channel is None:
            self._start()
        assert self._channel is not None
        try:
            self._channel.settimeout(self.limits.seconds)
            _send(self._channel, pickle.dumps((self.limits.images, choice)), data)
            answer = pickle.loads(_receive(self._channel))
        except TimeoutError:
            self.close()
            raise DecoderTimeout(f"decoding took longer than {self.limits.seconds:g} s") from None
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
                "resshift.images.sandbox",
                str(theirs.fileno()),
                str(self.limits.memory_bytes),
            ]
            # The import path of the parent, not of its environment: a Ray worker finds the package in a
            # directory of its job.
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "OMP_NUM_THREADS": "1",
            }
            self._child = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env=environment, stdin=subprocess.DEVNULL
            )
        self._channel = ours

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


def _send(channel: socket.socket, *parts: bytes) -> None:
    for part in parts:
        channel.sendall(_LENGTH.pack(len(part)))
        channel.sendall(part)


def _receive(channel: socket.socket) -> bytearray:
    """Receive one part.

    Raises:
        ConnectionError: The other side has closed the connection.
    """
    head = bytearray(_LENGTH.size)
    _fill(channel, head)
    body = bytearray(_LENGTH.unpack(head)[0])
    _fill(channel, body)
    return body


def _fill(channel: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while len(view):
        count = channel.recv_into(view)
        if not count:
            raise ConnectionError("the other side has closed the connection")
        view = view[count:]


def _limit_memory(num_bytes: int) -> None:
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + num_bytes, in_use + num_bytes))


def _serve(channel: socket.socket) -> None:
    """Decode one file after another until the parent closes the connection."""
    while True:
        try:
            limits, choice = pickle.loads(_receive(channel))
            data = bytes(_receive(channel))
        except ConnectionError:
            return
        except MemoryError:  # the file alone exceeds the limit; the rest of it cannot be skipped
            _send(
                channel,
                pickle.dumps(
                    ImageError(ImageReason.TOO_LARGE, "the file does not fit in the decoder's memory")
                ),
            )
            return
        try:
            result = probe(data, limits) if choice is None else decode_frames(data, limits, choice)
            answer = pickle.dumps(result, protocol=5)
        except ImageError as error:
            answer = pickle.dumps(error)
        except MemoryError:
            answer = pickle.dumps(
                ImageError(ImageReason.TOO_LARGE, "decoding needs more memory than is allowed")
            )
        _send(channel, answer)


def main(arguments: list[str]) -> None:
    """Run the child: `python -m resshift.images.sandbox FD MEMORY_BYTES`."""
    import cv2
    from pi_heif import options
    from PIL import AvifImagePlugin

    cv2.setNumThreads(1)
    # One thread each: others take stacks and arenas out of the memory of the limit.
    AvifImagePlugin.DEFAULT_MAX_THREADS = options.DECODE_THREADS = 1
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which closes the connection
    if sys.platform == "linux":
        _limit_memory(int(arguments[1]))
    _serve(socket.socket(fileno=int(arguments[0])))


if __name__ == "__main__":
    main(sys.argv[1:])
