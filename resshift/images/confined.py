"""The child of `resshift.images.sandbox`: decodes one file after another, and can do nothing else.

    python -m resshift.images.confined FD MEMORY_BYTES

The memory limit is set as RLIMIT_AS, relative to the memory of the idle process, so an allocation that is too
large fails with MemoryError, which becomes an `ImageError` (too_large).
"""

from __future__ import annotations

import importlib
import json
import resource
import signal
import socket
import sys

import cv2
from pi_heif import options
from PIL import AvifImagePlugin

from resshift.images.animation import decode_frames
from resshift.images.answers import LENGTH, Answer, Buffer, pack
from resshift.images.header import probe
from resshift.images.sandbox import received
from resshift.images.seccomp import confine
from resshift.images.types import ImageError, ImageLimits, ImageReason

# What decoders import when they first need it: afterwards no file can be opened.
_MODULES = [
    *(f"encodings.{name}" for name in ("ascii", "latin_1", "cp1252", "utf_16", "utf_16_be", "utf_16_le")),
    *(f"PIL.{name}" for name in ("ImageCms", "ImageColor", "ImageFilter", "ImagePalette", "MpoImagePlugin")),
    *("copy", "linecache", "tokenize", "traceback", "warnings"),
    "pi_heif.as_plugin",
    "resshift.images.jxl",
]


def _prepare() -> None:
    """Import everything; one thread each, as others take stacks and arenas out of the memory of the limit."""
    for name in _MODULES:
        importlib.import_module(name)
    cv2.setNumThreads(1)
    AvifImagePlugin.DEFAULT_MAX_THREADS = options.DECODE_THREADS = 1


def _limit(memory_bytes: int) -> None:
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes, in_use + memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the picture


def _part(channel: socket.socket, length: int) -> bytearray:
    buffer = bytearray(length)
    view = memoryview(buffer)
    while len(view):
        view = view[received(channel, view) :]
    return buffer


def _serve(channel: socket.socket) -> None:
    """Decode one file after another until the parent closes the connection."""
    while True:
        try:
            (length,) = LENGTH.unpack(_part(channel, LENGTH.size))
            asked = json.loads(_part(channel, length))
            data = bytes(_part(channel, asked["size_bytes"]))
        except ConnectionError:
            return
        except MemoryError:  # the file alone exceeds the limit; the rest of it cannot be skipped
            message = "the file does not fit in the decoder's memory"
            _send(channel, pack(ImageError(ImageReason.TOO_LARGE, message)))
            return
        try:
            limits, choice = ImageLimits(**asked["limits"]), asked["choice"]
            answer: Answer = probe(data, limits) if choice is None else decode_frames(data, limits, choice)
            parts = pack(answer)
        except ImageError as error:
            parts = pack(error)
        except MemoryError:
            parts = pack(ImageError(ImageReason.TOO_LARGE, "decoding needs more memory than is allowed"))
        _send(channel, parts)


def _send(channel: socket.socket, parts: list[Buffer]) -> None:
    for part in parts:
        channel.sendall(part)


def main(arguments: list[str]) -> None:
    """Run the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which closes the connection
    _prepare()
    channel = socket.socket(fileno=int(arguments[0]))
    if sys.platform == "linux":
        _limit(int(arguments[1]))
        confine()
    _serve(channel)


if __name__ == "__main__":
    main(sys.argv[1:])
