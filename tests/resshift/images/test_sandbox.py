"""Decoding in a process of its own: the same pictures, and nothing that a file can do to the parent."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from resshift import images
from resshift.images import ImageError, ImageLimits, ImageReason
from resshift.images.sandbox import INHERITED, Decoder, DecoderDied, DecoderLimits, DecoderTimeout


def png(height: int, width: int, seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(
        out, "PNG", compress_level=1
    )
    return out.getvalue()


def test_pictures_and_refusals_are_those_of_the_library() -> None:
    with Decoder() as decoder:
        for i in range(3):
            data = png(30, 40, i)
            (picture,) = decoder.decode(data).pictures
            np.testing.assert_array_equal(picture.pixels, images.decode(data).pixels)
            with pytest.raises(ImageError) as caught:
                decoder.decode(data[:-100])
            assert caught.value.reason is ImageReason.TRUNCATED
        first = decoder.pid
        decoder.decode(png(5, 5))
        assert decoder.pid == first  # one process for all of them
    assert decoder.pid is None


@pytest.mark.slow
def test_memory_is_limited_and_the_process_goes_on() -> None:
    limits = DecoderLimits(images=ImageLimits(max_pixels=100_000_000), memory_mb=60)
    with Decoder(limits) as decoder:
        out = io.BytesIO()
        Image.new("RGB", (6000, 6000)).save(out, "PNG")  # 108 MB of pixels in 100 kB
        with pytest.raises(ImageError) as caught:
            decoder.decode(out.getvalue())
        assert caught.value.reason is ImageReason.TOO_LARGE
        assert decoder.decode(png(30, 40)).pictures[0].width == 40


def test_time_is_limited() -> None:
    with Decoder(DecoderLimits(seconds=30)) as decoder:
        decoder.decode(png(4, 4))
        pid = decoder.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # a decoder that hangs
        decoder.limits = DecoderLimits(seconds=0.2)
        started = time.monotonic()
        with pytest.raises(DecoderTimeout, match=r"longer than 0\.2 s"):
            decoder.decode(png(4, 4))
        assert time.monotonic() - started < 5
        decoder.limits = DecoderLimits(seconds=30)
        assert decoder.decode(png(4, 4)).pictures[0].width == 4


def test_a_decoder_has_no_environment_and_no_privileges_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of the parent")
    with Decoder() as decoder:
        decoder.decode(png(4, 4))
        with open(f"/proc/{decoder.pid}/environ", "rb") as environment:
            names = {line.split(b"=")[0].decode() for line in environment.read().split(b"\0") if line}
        with open(f"/proc/{decoder.pid}/status") as status:
            told = dict(line.split(":\t") for line in status.read().splitlines())
    assert names <= {"PYTHONPATH", "OMP_NUM_THREADS", *INHERITED}
    assert (told["NoNewPrivs"], told["Seccomp"]) == ("1", "2")  # 2: a filter


def answering(decoder: Decoder, answer: Callable[[socket.socket], None]) -> socket.socket:
    """Put something in the place of the child that a file has taken over; return its end."""
    ours, theirs = socket.socketpair()
    decoder._channel = ours  # pyright: ignore[reportPrivateUsage]
    threading.Thread(target=answer, args=(theirs,), daemon=True).start()
    return theirs


def test_an_answer_that_is_none_is_a_death_of_the_decoder() -> None:
    with Decoder(DecoderLimits(seconds=30)) as decoder:
        with (
            answering(decoder, lambda channel: channel.sendall((8).to_bytes(8, "big") + b'{"x": 1}')),
            pytest.raises(DecoderDied, match="answered what is no picture"),
        ):
            decoder.decode(png(4, 4))
        assert decoder.decode(png(4, 4)).pictures[0].width == 4  # of a new one


def test_an_answer_byte_by_byte_does_not_take_longer_than_the_limit() -> None:
    def trickle(channel: socket.socket) -> None:
        with contextlib.suppress(OSError):
            channel.sendall((1 << 20).to_bytes(8, "big"))
            while True:
                channel.sendall(b"\0")
                time.sleep(0.05)

    with Decoder(DecoderLimits(seconds=0.3)) as decoder:
        started = time.monotonic()
        with answering(decoder, trickle), pytest.raises(DecoderTimeout):
            decoder.decode(png(4, 4))
        assert time.monotonic() - started < 10


def test_a_crash_is_told_with_its_signal_and_the_next_file_is_decoded() -> None:
    with Decoder() as decoder:
        decoder.decode(png(4, 4))
        pid = decoder.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        threading.Timer(0.2, lambda: os.kill(pid, signal.SIGSEGV) or os.kill(pid, signal.SIGCONT)).start()
        with pytest.raises(DecoderDied, match="SIGSEGV"):
            decoder.decode(png(4, 4))
        assert decoder.decode(png(4, 4)).pictures[0].width == 4


def test_the_child_ends_with_its_parent_and_needs_no_torch() -> None:
    decoder = Decoder()
    decoder.decode(png(4, 4))
    assert decoder.pid is not None
    with open(f"/proc/{decoder.pid}/maps") as maps:
        assert "libtorch" not in maps.read()
    channel = decoder._channel  # pyright: ignore[reportPrivateUsage]
    child = decoder._child  # pyright: ignore[reportPrivateUsage]
    assert channel is not None
    assert child is not None
    channel.close()
    assert child.wait(10) == 0
