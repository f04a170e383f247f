"""The CPU ends of the bulk job as plain functions, with a model that repeats pixels between them."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spandrel.architectures.Compact import Compact

from pipelines.bulk import stages
from pipelines.bulk.estimate import estimate
from pipelines.bulk.nearest import Nearest, nearest_model
from pipelines.bulk.parcels import Parcel, Underway, by_key
from pipelines.bulk.selection import WorkItem, Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions, prepare, store
from pipelines.bulk.worker import Replica, ReplicaOptions, Started, Upscaled, describe_model
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known, Row
from resshift import images, storage
from resshift.config import Sampling
from resshift.images import ImageLimits, Picture, animation
from resshift.images.animation import Frames
from resshift.images.sandbox import DecoderDied, DecoderLimits, DecoderTimeout
from resshift.models import WeightsError
from resshift.storage import StorageError, StorageReason
from resshift.upscaler import Upscaler
from tests.faces import check_grey_faces, grey_model, photo_with, write_detector
from tests.holes import box
from tests.pictures import decoded, encoded, file_of, noise, tiff_of

JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def options(out: Path, **changes: Any) -> StageOptions:
    return replace(StageOptions(outputs=JOB, target=str(out)), **changes)


def item(path: Path) -> WorkItem:
    size = path.stat().st_size if path.exists() else 0
    return WorkItem(path.name, str(path), "e", size, JOB.output_key(path.name))


def through(paths: list[Path], stage_options: StageOptions) -> list[Row]:
    """Take files through all stages and return their rows."""
    rows, frames = prepare([item(path) for path in paths], stage_options)
    good = [i for i, row in enumerate(rows) if row["status"] == "ok"]
    results = [frames[i].map(lambda picture: Nearest().upscale(picture)) for i in good]
    for i, row in zip(
        good, store([rows[i] for i in good], results, stage_options) if good else [], strict=True
    ):
        rows[i] = row
    return rows


def test_good_picture_is_written_and_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded(1, 5, 7))
    (row,) = through([path], options(tmp_path / "out"))
    data = (tmp_path / "out" / "a_x4.png").read_bytes()
    expected = images.decode(path.read_bytes()).pixels.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(images.decode(data).pixels, expected)
    assert row["status"] == "ok"
    assert (row["width_in"], row["height_in"], row["width_out"], row["height_out"]) == (7, 5, 28, 20)
    assert row["sha256_in"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (row["sha256_out"], row["bytes_out"]) == (hashlib.sha256(data).hexdigest(), len(data))
    assert row["seconds"] is not None
    assert row["seconds"] > 0
    assert row["attempts"] == 1


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_mask_lies_under_the_key_of_its_picture_or_as_png(tmp_path: Path, name: str) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "a.jpg").write_bytes(encoded(1, 12, 16, "JPEG"))
    hole = np.uint8(255) * box(12, 16)
    (tmp_path / "masks" / name).write_bytes(file_of(hole, "PNG"))  # formats are recognised by content
    outputs = replace(JOB, masks=str(tmp_path / "masks"))
    rows, frames = prepare([item(tmp_path / "a.jpg")], options(tmp_path / "out", outputs=outputs))
    assert rows[0]["status"] == "ok"
    mask = frames[0].pictures[0].mask
    assert mask is not None
    assert np.array_equal(mask, box(12, 16))


def test_transparent_pictures_are_their_own_masks(tmp_path: Path) -> None:
    pixels = np.dstack([noise(0, 12, 16), np.uint8(255) * ~box(12, 16)])
    (tmp_path / "a.png").write_bytes(file_of(pixels))
    outputs = replace(JOB, masks=str(tmp_path))
    rows, frames = prepare([item(tmp_path / "a.png")], options(tmp_path / "out", outputs=outputs))
    assert rows[0]["status"] == "ok"
    mask = frames[0].pictures[0].mask
    assert mask is not None
    assert np.array_equal(mask, box(12, 16))


@pytest.mark.parametrize(
    ("mask", "reason", "message"),
    [
        (None, "no_mask", "there is no mask a.jpg or a.png in "),
        (b"no picture", "bad_mask", "the mask a.png: "),
        (file_of(np.zeros((12, 12), np.uint8)), "bad_mask", "the mask is 12x12, and must be 16x12"),
        (file_of(np.zeros((12, 16), np.uint8)), "bad_mask", "the hole of the mask is empty"),
        (file_of(np.full((12, 16), 255, np.uint8)), "bad_mask", "the hole of the mask covers the whole"),
    ],
)
def test_a_mask_that_cannot_be_used_is_a_row(
    tmp_path: Path, mask: bytes | None, reason: str, message: str
) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "a.jpg").write_bytes(encoded(1, 12, 16, "JPEG"))
    if mask is not None:
        (tmp_path / "masks" / "a.png").write_bytes(mask)
    outputs = replace(JOB, masks=str(tmp_path / "masks"))
    (row,), (frames,) = prepare([item(tmp_path / "a.jpg")], options(tmp_path / "out", outputs=outputs))
    assert (row["status"], row["reason"]) == ("failed", reason)
    assert str(row["message"]).startswith(message)
    assert not frames.pictures


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>", "not_an_image"),
        ("cut", "truncated"),
        ("huge", "too_large"),
        (None, "missing"),
    ],
)
def test_bad_input_is_a_row_and_writes_nothing(data: bytes | str | None, reason: str, tmp_path: Path) -> None:
    huge = bytearray(encoded())
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    content = {"cut": encoded()[:-200], "huge": bytes(huge)}.get(str(data), data)
    if isinstance(content, bytes):
        (tmp_path / "x.png").write_bytes(content)
    (row,) = through([tmp_path / "x.png"], options(tmp_path / "out"))
    assert (row["status"], row["reason"]) == ("failed", reason)
    assert row["message"]
    assert not (tmp_path / "out").exists()


def test_bad_inputs_leave_their_neighbours_alone(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(i, 6, 6) if i % 2 else b"junk")
    assert [row["status"] for row in through(paths, options(tmp_path / "out"))] == [
        "failed",
        "ok",
        "failed",
        "ok",
    ]


def test_destination_that_cannot_be_written_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(0, 5, 5))
    (tmp_path / "out" / "x_x4.png").mkdir(parents=True)
    (row,) = through([tmp_path / "x.png"], options(tmp_path / "out"))
    assert row["status"] == "failed"
    assert row["reason"] in {"irregular", "invalid", "denied", "unavailable"}


@pytest.mark.parametrize("error", [RuntimeError("ERROR adding frame"), MemoryError(), KeyError("icc")])
def test_whatever_an_encoder_raises_is_the_row_of_its_picture(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode_frames(frames: Frames, *arguments: Any) -> bytes:
        if frames.pictures[0].width == 4 * 13:
            raise error
        return animation.encode_frames(frames, *arguments)

    monkeypatch.setattr(stages, "encode_frames", encode_frames)
    for width in (12, 13, 14):
        (tmp_path / f"{width}.png").write_bytes(encoded(width, 5, width))
    rows = through([tmp_path / f"{width}.png" for width in (12, 13, 14)], options(tmp_path / "out"))
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("ok", ""),
        ("failed", "encode_error"),
        ("ok", ""),
    ]
    assert type(error).__name__ in rows[1]["message"]


PROBE = "_resshift/writable"


@pytest.mark.parametrize(
    ("written", "told", "reason"),
    [
        (errno.ENOSPC, 0, StorageReason.FULL),
        (errno.EDQUOT, 0, StorageReason.FULL),
        (errno.EACCES, errno.EACCES, StorageReason.DENIED),
        (errno.EROFS, errno.EROFS, StorageReason.DENIED),
        (errno.EIO, errno.EIO, StorageReason.UNAVAILABLE),
        (errno.EACCES, 0, None),  # this name alone, as other writes succeed
        (errno.EIO, 0, None),
        (errno.ENAMETOOLONG, 0, None),
    ],
)
def test_a_destination_that_cannot_be_written_is_no_fault_of_a_picture(
    written: int, told: int, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replace(source: str, target: str) -> None:
        error = told if target.endswith(PROBE) else written
        if error:
            raise OSError(error, os.strerror(error), target)
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "x.png").write_bytes(encoded())
    if reason is None:
        (row,) = through([tmp_path / "x.png"], options(tmp_path / "out"))
        assert (row["status"], row["key"]) == ("failed", "x.png")
        return
    with pytest.raises(StorageError) as caught:
        through([tmp_path / "x.png"], options(tmp_path / "out"))
    assert caught.value.reason == reason
    assert os.strerror(written) in str(caught.value)


@pytest.mark.parametrize(
    ("format", "frames", "size", "reason"),
    [
        ("webp", "first", (5000, 9), "too_large"),
        ("jpeg", "first", (9, 16380), "too_large"),
        ("png", "first", (16380, 9), ""),
        ("jpeg", "all", (9, 9), "animated"),
        ("keep", "all", (9, 9), ""),
    ],
)
def test_what_a_format_cannot_hold_is_known_before_the_work(
    format: Any, frames: Any, size: tuple[int, int], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.tif"
    page = np.zeros((size[1], size[0], 3), np.uint8)
    path.write_bytes(tiff_of([(page, {}), (page, {})]))
    outputs = replace(JOB, format=format, frames=frames)
    stage_options = options(tmp_path / "out", outputs=outputs)
    (row,), (result,) = prepare([item(path)], stage_options)
    assert (row["status"], row["reason"]) == (("failed", reason) if reason else ("ok", ""))
    assert bool(result.pictures) != bool(reason)
    known = Known(DigestSet(), OwnerMap(), Counter())
    worklist = Worklist(storage.list_entries(str(tmp_path)), known, outputs.output_key, 4)
    assert [why for _, why, _ in estimate(worklist, stage_options).unreadable] == [reason] * bool(reason)


@pytest.mark.parametrize("format", ["png", "webp", "jpeg", "tiff"])
@pytest.mark.parametrize("sizes", [[(12, 16), (6, 8)], [(5, 5), (5, 5), (5, 6)], [(3, 9), (9, 3)]])
def test_pages_of_unlike_sizes_are_written_as_they_are_or_refused(
    format: Any, sizes: list[tuple[int, int]], tmp_path: Path
) -> None:
    (tmp_path / "doc.tif").write_bytes(tiff_of([(noise(i, *size), {}) for i, size in enumerate(sizes)]))
    (tmp_path / "z.png").write_bytes(encoded())
    outputs = replace(JOB, format=format, frames="all")
    doc, other = through(
        [tmp_path / "doc.tif", tmp_path / "z.png"], options(tmp_path / "out", outputs=outputs)
    )
    assert other["status"] == "ok"
    if format != "tiff":
        assert (doc["status"], doc["reason"]) == ("failed", "animated")
        return
    written = animation.decode_frames((tmp_path / "out" / doc["output"]).read_bytes(), None, "all")
    assert [(one.height, one.width) for one in written.pictures] == [(4 * h, 4 * w) for h, w in sizes]


def test_result_that_would_not_fit_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(0, 64, 64))
    (row,), (frames,) = prepare(
        [item(tmp_path / "x.png")], options(tmp_path, outputs=replace(JOB, scale=1000))
    )
    assert row["reason"] == "too_large"
    assert "GB are allowed" in row["message"]
    assert not frames.pictures


@pytest.mark.parametrize(
    ("error", "reason", "calls"),
    [(DecoderDied("SIGSEGV"), "killed_worker", 2), (DecoderTimeout("60 s"), "timeout", 1)],
)
def test_a_picture_that_ends_its_decoder_is_tried_twice(
    error: Exception, reason: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.png").write_bytes(encoded())
    made: list[int] = []

    class Fatal:
        def __init__(self, limits: DecoderLimits) -> None:
            del limits

        def decode(self, data: bytes, choice: str) -> Frames:
            made.append(len(data))
            raise error

    monkeypatch.setattr(stages, "Decoder", Fatal)
    stages._decoder.cache_clear()  # pyright: ignore[reportPrivateUsage]
    (row,), _ = prepare([item(tmp_path / "x.png")], options(tmp_path / "out"))
    stages._decoder.cache_clear()  # pyright: ignore[reportPrivateUsage]
    assert (row["status"], row["reason"], len(made)) == ("failed", reason, calls)


@pytest.mark.slow
def test_a_killed_decoder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded())
    stage_options = options(tmp_path / "out")
    assert through([tmp_path / "x.png"], stage_options)[0]["status"] == "ok"
    pid = stages._decoder(stage_options.limits).pid  # pyright: ignore[reportPrivateUsage]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert through([tmp_path / "x.png"], stage_options)[0]["status"] == "ok"


@pytest.mark.parametrize("choice", ["skip", "verify"])
def test_outputs_that_are_there_can_be_left_alone(choice: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("whole.png", "damaged.png", "absent.png")]
    for i, path in enumerate(paths):
        path.write_bytes(encoded(i, 5, 6))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "whole_x4.png").write_bytes(encoded(9, 20, 24))
    (tmp_path / "out" / "damaged_x4.png").write_bytes(encoded(9, 20, 24)[:-30])
    statuses = [row["status"] for row in through(paths, options(tmp_path / "out", if_exists=choice))]
    assert statuses == (["skipped", "skipped", "ok"] if choice == "skip" else ["skipped", "ok", "ok"])
    assert (tmp_path / "out" / "whole_x4.png").read_bytes() == encoded(9, 20, 24)


def test_an_output_that_kills_its_decoder_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison, real = b"poison", stages.Decoder.decode

    def decode(decoder: Any, data: bytes, *choice: Any) -> Frames:
        if data == poison:
            assert decoder.limits.images.max_pixels == 16 * options(tmp_path).limits.images.max_pixels
            raise DecoderDied("signal SIGKILL")
        return real(decoder, data, *choice)

    monkeypatch.setattr(stages.Decoder, "decode", decode)
    (tmp_path / "x.png").write_bytes(encoded(1, 5, 6))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x_x4.png").write_bytes(poison)
    (row,) = through([tmp_path / "x.png"], options(tmp_path / "out", if_exists="verify"))
    assert (row["status"], row["width_out"]) == ("ok", 24)


class Thirteen(Nearest):
    """Fails for pictures 13 wide."""

    def upscale(self, picture: Picture, sampling: Sampling = Sampling()) -> Picture:
        if picture.width == 13:
            raise RuntimeError("thirteen")
        return super().upscale(picture, sampling)


def test_a_replica_announces_every_picture_after_its_pixels() -> None:
    replica = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = Thirteen()
    inputs = [Frames((Picture(pixels=np.full((2, width, 3), width, np.uint8)),)) for width in (7, 13, 5)]
    told = list(
        replica.upscale(ReplicaOptions(model="nearest-x4", identity="nearest-x4"), ["a", "b", "c"], *inputs)
    )
    assert [type(one) for one in told] == [Started, Frames, Upscaled, Frames, Upscaled, Frames, Upscaled]
    reasons = [one.reason for one in told if isinstance(one, Upscaled)]
    assert reasons == ["", "upscale_error", ""]
    assert "RuntimeError: thirteen" in next(
        one.message for one in told if isinstance(one, Upscaled) and one.reason
    )
    sizes = [[picture.width for picture in one.pictures] for one in told if isinstance(one, Frames)]
    assert sizes == [[28], [], [20]]


def test_a_replica_takes_what_it_is_asked_for_out_of_parcels() -> None:
    """Nine keys of twelve, in an order of their own; the fifth fails, and the results come together."""
    replica = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = Thirteen()
    pictures = {f"{i}": Frames((Picture(pixels=np.full((2, i + 9, 3), i, np.uint8)),)) for i in range(12)}
    halves = [
        Parcel(tuple(keys), tuple(pictures[key] for key in keys)) for keys in (list("0123"), list("456789"))
    ]
    keys = list("987654321")
    options = ReplicaOptions(model="nearest-x4", identity="nearest-x4")
    _, results, told = replica.upscale(options, keys, *halves)
    assert isinstance(results, Parcel)
    assert isinstance(told, tuple)
    assert results.keys == tuple(keys)
    assert [one.reason for one in told if isinstance(one, Upscaled)] == [""] * 5 + ["upscale_error"] + [
        ""
    ] * 3
    for key, frames in by_key([results]).items():
        widths = [picture.width for picture in frames.pictures]
        assert widths == ([] if key == "4" else [4 * (int(key) + 9)])


def test_small_files_of_large_pictures_are_left_to_other_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "_MOST_PIXELS", 9 * 35)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        path.write_bytes(encoded(1, 5, 7))
    rows, frames = prepare([item(path) for path in paths], options(tmp_path / "out"))
    assert [row["key"] for row in rows] == [path.name for path in paths[:10]]
    assert len(frames) == 10


def test_a_suspect_has_its_replica_for_itself() -> None:
    """It waits for what is under way, and what comes after it waits for it, even before it has begun."""
    replica = Replica("nearest-x4", "nearest-x4", 1)
    options = ReplicaOptions(model="nearest-x4", identity="nearest-x4")
    frames = Frames((Picture(pixels=np.zeros((2, 2, 3), np.uint8)),))
    told: list[str] = []

    def upscale(key: str, alone: bool) -> threading.Thread:
        def work() -> None:
            for one in replica.upscale(options, [key], frames, alone=alone):
                told.extend([key] if isinstance(one, Started) else [])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(0.2)
        return thread

    first = replica.upscale(options, ["first"], frames)
    next(first)
    suspect = upscale("suspect", alone=True)
    later = upscale("later", alone=False)
    assert not told
    list(first)
    for thread in (suspect, later):
        thread.join(10)
    assert told == ["suspect", "later"]
    beside = replica.upscale(options, ["beside"], frames)
    next(beside)
    assert not upscale("another", alone=False).is_alive()


@pytest.mark.parametrize("alone", [False, True])
def test_the_model_waits_until_an_announcement_has_left(alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hang with the interpreter's lock also stops what sends answers. A suspect still has the room while
    its results leave, so that the next suspect cannot stop them.
    """
    events: list[str] = []

    class Recording(Nearest):
        def upscale(self, picture: Picture, sampling: Sampling = Sampling()) -> Picture:
            events.append("model")
            return super().upscale(picture, sampling)

    replica: Any = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = Recording()

    def sleep(seconds: float) -> None:
        if threading.current_thread() is threading.main_thread():  # the stand-in sleeps in the model's thread
            assert seconds > 0
            events.append(f"wait, {replica._room._num_inside} inside")

    monkeypatch.setattr("pipelines.bulk.worker.time.sleep", sleep)
    options = ReplicaOptions(model="nearest-x4", identity="nearest-x4")
    parcel = Parcel(("a",), (Frames((Picture(pixels=np.zeros((2, 2, 3), np.uint8)),)),))
    for answer in replica.upscale(options, ["a"], parcel, alone=alone):
        events.append(type(answer).__name__)
    end = ["wait, 1 inside"] if alone else []
    assert events == ["Started", "wait, 1 inside", "model", "Parcel", "tuple", *end]


def test_a_replica_tells_how_far_slow_pictures_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second frame of two is at a half: three quarters of the input."""
    monkeypatch.setattr("pipelines.bulk.worker._TELL_S", 0.05)
    told = threading.Event()

    class Halfway(Nearest):
        def upscaling(self, picture: Picture, sampling: Sampling = Sampling(), progress: Any = None) -> Any:
            progress(0.5)
            if picture.width == 3:
                told.wait(20)
            return super().upscaling(picture, sampling)

    replica: Any = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = Halfway()
    frames = Frames(tuple(Picture(pixels=np.zeros((2, width, 3), np.uint8)) for width in (2, 3)))
    options = ReplicaOptions(model="nearest-x4", identity="nearest-x4")
    answers = replica.upscale(options, ["a"], Parcel(("a",), (frames,)))
    assert isinstance(next(answers), Started)
    assert (next(answers), next(answers)) == (Parcel((), ()), (Underway((("a", 0.75),)),))
    told.set()
    rest = [one for one in answers if one != Parcel((), ()) and one != (Underway((("a", 0.75),)),)]
    assert [type(one) for one in rest] == [Parcel, tuple]
    assert [one.width for one in by_key([rest[0]])["a"].pictures] == [8, 12]


def test_a_replica_refuses_another_model() -> None:
    with pytest.raises(RuntimeError, match="another nearest-x4: nearest-x4 instead of 0123"):
        Replica("nearest-x4", "0123", 1)


def test_a_replica_runs_the_network_of_a_file_of_other_people(tmp_path: Path) -> None:
    path = tmp_path / "compact.pth"
    torch.save({"params": Compact(num_feat=4, num_conv=1, upscale=2).state_dict()}, path)
    facts = describe_model(str(path))
    assert (facts.scale, facts.steps, facts.smallest_tile_px) == (2, 1, 16)
    picture = Picture(pixels=np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    replica = Replica(str(path), facts.identity, 1)
    options = ReplicaOptions(model=str(path), identity=facts.identity)
    results = [one for one in replica.upscale(options, ["a.png"], Frames((picture,))) if type(one) is Frames]
    expected = Upscaler.from_pretrained(path, device="cpu").upscale(picture)
    assert np.array_equal(results[0].pictures[0].pixels, expected.pixels)


def test_faces_of_a_job_and_what_the_rows_say(tmp_path: Path) -> None:
    """Several faces, one at the border, and a picture without any, which is as it was."""
    cells = [(40, 56), (120, 0), (48, 160)]
    photos = {"three.png": photo_with(cells, 176, 233), "none.png": photo_with([], 40, 50)}
    for name, pixels in photos.items():
        (tmp_path / name).write_bytes(file_of(pixels))
    sampling = Sampling(faces=write_detector(tmp_path / "cells.onnx"))
    job = replace(JOB, scale=1, name="{name}", sampling=sampling)
    how = options(tmp_path / "out", outputs=job)
    items = [WorkItem(name, str(tmp_path / name), "e", 1, name) for name in photos]
    replica = Replica("nearest-x4", "nearest-x4", 1)
    replica.model = grey_model()
    rows, frames = prepare(items, how)
    asked = ReplicaOptions(model="nearest-x4", identity="nearest-x4", sampling=sampling)
    results = [one for one in replica.upscale(asked, list(photos), *frames) if isinstance(one, Frames)]
    rows = store(rows, results, how)
    assert [(row["status"], row["notes"]) for row in rows] == [
        ("ok", "3 faces restored"),
        ("ok", "no face was found"),
    ]
    restored = {name: decoded((tmp_path / "out" / name).read_bytes()) for name in photos}
    check_grey_faces(restored["three.png"], photos["three.png"], cells)
    assert np.array_equal(restored["none.png"], photos["none.png"])


def test_the_stand_in_is_asked_for_by_name() -> None:
    slow = nearest_model("nearest-x4@0.25")
    assert slow is not None
    assert slow.seconds_per_megapixel == 0.25
    assert nearest_model("tiny-x4") is None
    assert describe_model("nearest-x4").scale == 4
    with pytest.raises(WeightsError, match="nearest-x4@SECONDS"):
        nearest_model("nearest-x8")
    with pytest.raises(ValueError, match="outscale 2"):
        slow.upscale(Picture(pixels=np.zeros((1, 1, 3), np.uint8)), Sampling(outscale=2))


def test_limits_reach_the_decoder(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded(0, 100, 100))
    limits = DecoderLimits(images=ImageLimits(max_pixels=9_999))
    assert (
        prepare([item(tmp_path / "x.png")], options(tmp_path, limits=limits))[0][0]["reason"] == "too_large"
    )


def test_job_json_stays_what_it_was_before_there_were_options_that_are_not_asked_for() -> None:
    known = {
        "model": "nearest-x4",
        "identity": "nearest-x4",
        "scale": 4,
        "outscale": None,
        "format": "png",
        "quality": 95,
        "name": "{dir}/{stem}_x{scale}.{ext}",
        "seed": 0,
        "tile_px": None,
        "frames": "first",
        "source": "photos",
    }
    assert JOB.record("photos") == known
    asked = replace(JOB, sampling=Sampling(seed=3, outscale=2, steps=1, tile_px=64))
    assert asked.record("photos") == known | {"seed": 3, "outscale": 2, "steps": 1, "tile_px": 64}
