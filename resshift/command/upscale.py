"""Upscale a picture, several, or a folder, on this machine.

    resshift photo.heic big.png            the format is that of the name
    resshift photos/ out/                  a folder; run again to continue with what is missing
    resshift *.jpg out/ --format keep
    resshift - big.png < photo.jpg         - is standard input or output
    resshift photo.jpg - --outscale 2 --format jpeg > twice.jpg
    resshift photo.jpg big.png --model realesrgan-x4plus

JPEG, PNG, WebP, TIFF, HEIC, AVIF, JPEG XL, GIF and BMP are read; a format is told by content. In a folder,
files that are no pictures are left out, and a picture that cannot be read is a line with the reason. A result
is written whole or not at all.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed pictures, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from resshift.command import (
    Exit,
    UsageError,
    add_format,
    add_model,
    add_outscale,
    add_sampling,
    model_of,
    sampling_of,
)

if TYPE_CHECKING:
    from rich.console import Console

    from resshift import Upscaler
    from resshift.config import Sampling
    from resshift.folder import Contents, Task
    from resshift.images import Format
    from resshift.images.animation import Frames
    from resshift.images.sandbox import Decoder
    from resshift.models import ModelFiles
    from resshift.output_names import OutputFormat
    from resshift.progress import Progress

PIPE = "-"
_MEGAPIXELS = 100.0


def add_arguments(arguments: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add = arguments.add_argument
    add("source", metavar="SRC", nargs="+", help="picture, folder, or - for standard input")
    add("target", metavar="DST", help="name of the result, folder, or - for standard output")
    add_model(arguments, default="tiny-x4")
    add_outscale(arguments)
    add_sampling(arguments)
    add_format(arguments, "by the name of DST, else png")
    add(
        "--max-megapixels",
        type=float,
        default=_MEGAPIXELS,
        help=f"refuse larger inputs (default {_MEGAPIXELS:g}: the photos of phones, and their panoramas)",
    )
    add("--overwrite", action="store_true", help="make results again that are in the folder already")


def run(options: argparse.Namespace) -> Exit:
    """Upscale, and print what was made."""
    from resshift.models import locate_model

    _check(options)
    found = locate_model(model_of(options.model, options))
    sampling = sampling_of(options)
    found.check_sampling(sampling)
    if sampling.faces is not None:
        from resshift.faces.detect import yunet

        yunet(sampling.faces)  # a file that is none is one line, not one of each picture
    contents = _contents(options, sampling.outscale or found.config.scale)
    if not contents.tasks:
        for uri, why in contents.refused:
            _tell_failed(uri, why)
        raise UsageError(f"no pictures in {', '.join(options.source)}")
    return _Run(options, found, sampling, contents).work()


def is_one_picture(source: str, target: str) -> bool:
    """Return whether a file is to be upscaled into a file: DST is called like a picture."""
    from resshift.output_names import format_name

    is_named = _is_format(format_name(os.path.splitext(target)[1])) and not target.endswith("/")
    return is_named and os.path.isfile(source) and not os.path.isdir(target)


def run_one(options: argparse.Namespace) -> Exit:
    """Upscale one picture with the options of another command that has those of this one."""
    return run(argparse.Namespace(**{**vars(options), "source": [options.source], "overwrite": True}))


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be done."""
    if not 1 <= options.quality <= 100:
        raise UsageError(f"--quality must lie in 1 to 100, got {options.quality}")
    if not 0 < options.max_megapixels <= 10_000:
        raise UsageError(f"--max-megapixels must be positive and at most 10000, got {options.max_megapixels}")
    if PIPE in options.source and len(options.source) > 1:
        raise UsageError(f"{PIPE} is one picture: it cannot be given beside {_others(options.source)}")
    if options.target == PIPE and (len(options.source) > 1 or os.path.isdir(options.source[0])):
        raise UsageError(f"DST {PIPE} takes one picture, got {', '.join(options.source)}")
    if options.target == PIPE and sys.stdout.isatty():
        raise UsageError(f"DST {PIPE} writes the picture itself: send it to a file or a pipe")


def _others(sources: Sequence[str]) -> str:
    return ", ".join(source for source in sources if source != PIPE)


def _contents(options: argparse.Namespace, scale: float) -> Contents:
    """Return what is to be done; DST is a folder if it looks like one or several pictures go there."""
    from resshift import storage
    from resshift.folder import Contents, Task, find_pictures
    from resshift.output_names import format_name, output_key

    source, target = options.source[0], options.target
    several = len(options.source) > 1 or os.path.isdir(source)
    is_folder = several or target.endswith("/") or os.path.isdir(target)
    if target == PIPE or not is_folder:
        extension = os.path.splitext(target)[1]
        if target != PIPE and options.format is None and not _is_format(format_name(extension)):
            raise UsageError(
                f"DST {target} has no extension of a format: give one of .png, .jpg, .webp, .tif, .avif, "
                ".jxl, a folder with / at its end, or --format"
            )
        if target != PIPE and os.path.exists(target) and source != PIPE and os.path.samefile(source, target):
            raise UsageError(f"DST {target} is SRC: the original would be lost")
        return Contents([Task(source, target)])
    if source == PIPE:
        key = output_key("picture", "{stem}_x{scale}.{ext}", options.format or "png", scale)
        return Contents([Task(source, storage.join(target, key))])
    for folder in options.source:
        if os.path.isdir(folder) and storage.is_inside(target, folder):
            raise UsageError(
                f"DST must not lie inside {folder}, got {target}: results would become inputs of the next run"
            )
    return find_pictures(options.source, target, options.format or "png", scale)


def _is_format(name: str) -> bool:
    from resshift.images import Format

    return name in get_args(Format)


def _tell_failed(uri: str, why: str) -> None:
    sys.stderr.write(f"failed: {uri}: {why}\n")


@dataclass(slots=True)
class _Failed(Exception):
    """A picture that cannot be made."""

    why: str


@dataclass(slots=True)
class _Run:
    """One run of the command."""

    options: argparse.Namespace
    model: ModelFiles
    sampling: Sampling
    contents: Contents

    def work(self) -> Exit:
        """Make all pictures, and return the exit code."""
        from rich.console import Console

        from resshift import storage
        from resshift.progress import Progress

        contents, is_alone = self.contents, self.is_alone
        console = Console(stderr=True)
        progress = Progress("pictures", len(contents.tasks) + len(contents.refused))
        todo = contents.tasks
        if not is_alone and not self.options.overwrite:
            todo = [task for task in todo if not storage.exists(task.target)]
            progress.before = len(contents.tasks) - len(todo)
        for uri, why in contents.refused:
            _tell_failed(uri, why)
            progress.add("failed")
        if todo:
            up = self.load(console)
            with self.display(progress, console), self.decoder() as decoder:
                for task in todo:
                    progress.add(self.make(task, up, decoder, progress))
        if not is_alone:
            self.summarise(progress)
        return Exit.FINISHED_WITH_FAILED_ITEMS if progress.counts["failed"] else Exit.COMPLETE

    @property
    def is_alone(self) -> bool:
        """Whether one picture was asked for, by its name."""
        return len(self.options.source) == 1 and not os.path.isdir(self.options.source[0])

    def load(self, console: Console) -> Upscaler:
        """Return the model that is ready."""
        shown = console.status(f"loading {self.model.name}") if console.is_terminal else nullcontext()
        with shown:
            from resshift import Upscaler
            from resshift.allocator import keep_freed_pages

            keep_freed_pages()
            return Upscaler.from_files(self.model)

    @contextmanager
    def display(self, progress: Progress, console: Console) -> Generator[None]:
        """Show a bar, or JSON lines where a folder is worked on without a terminal."""
        from resshift.progress import shown

        if self.is_alone and not console.is_terminal:
            yield
            return
        with shown(progress, console):
            yield

    def decoder(self) -> Decoder:
        from resshift.images import ImageLimits
        from resshift.images.sandbox import Decoder, DecoderLimits

        limits = ImageLimits(max_pixels=int(self.options.max_megapixels * 1e6))
        return Decoder(DecoderLimits(images=limits))

    def make(self, task: Task, up: Upscaler, decoder: Decoder, progress: Progress) -> str:
        """Make one picture; return its status."""

        def report(share: float) -> None:
            progress.share = share

        started = time.monotonic()
        try:
            frames, size = self.upscaled(task, up, decoder, report)
        except _Failed as error:
            _tell_failed("standard input" if task.source == PIPE else task.source, error.why)
            return "failed"
        if self.is_alone and task.target != PIPE:
            first = frames.pictures[0]
            seconds = time.monotonic() - started
            sizes = f"{size[0]}x{size[1]} -> {first.width}x{first.height}"
            print(f"{task.target}: {sizes}, {seconds:.1f} s")
            for note in first.notes:
                print(f"  {note}")
        return "ok"

    def upscaled(
        self, task: Task, up: Upscaler, decoder: Decoder, report: Callable[[float], None]
    ) -> tuple[Frames, tuple[int, int]]:
        """Read, decode, upscale, encode and write; return the result, and the size of the picture.

        Raises:
            _Failed: The picture cannot be made.
            StorageError: Nothing can be written.
        """
        from resshift import images
        from resshift.images import ImageError
        from resshift.images.animation import encode_frames, fit_frames
        from resshift.images.sandbox import DecoderDied, DecoderTimeout
        from resshift.output_names import output_format
        from resshift.storage import StorageError

        asked = self.options.format or ("png" if task.target == PIPE else self._format_of(task.target))
        format, _ = output_format("" if task.source == PIPE else task.source, asked)
        try:
            data = _read(task.source, decoder.limits.images.max_bytes)
            frames = decoder.decode(data)
            self.check_memory(frames, up)
            images.check_sizes(frames.sizes(self.sampling.outscale or up.scale), format)
            size = (frames.pictures[0].width, frames.pictures[0].height)
            made = frames.map(lambda picture: up.upscale(picture, self.sampling, report))
            fitted = fit_frames(made.map(images.in_own_profile), format)
            encoded = encode_frames(fitted, format, self.options.quality)
        except StorageError as error:
            raise _Failed(f"{error.reason}: {error.detail}") from None
        except ImageError as error:
            raise _Failed(f"{error.reason}: {error}") from None
        except (DecoderDied, DecoderTimeout) as error:
            raise _Failed(str(error)) from None
        except Exception as error:
            # The boundary of a picture: what a model or an encoder raises is due to it, and others go on.
            raise _Failed(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        _write(task.target, encoded, format)
        return fitted, size

    def _format_of(self, target: str) -> OutputFormat:
        from resshift.output_names import format_name

        return cast("OutputFormat", format_name(os.path.splitext(target)[1]))

    def check_memory(self, frames: Frames, up: Upscaler) -> None:
        """Refuse a result that this machine cannot hold.

        Raises:
            _Failed: It is too large.
        """
        from resshift.models.files import machine_bytes

        factor = self.sampling.outscale or up.scale
        needed, memory = 2 * frames.num_bytes * factor**2, machine_bytes()  # pixels and their encoded copy
        if memory is not None and needed > memory:
            raise _Failed(
                f"too_large: the result needs {needed / 1e9:.1f} GB, this machine has {memory / 1e9:.1f} GB; "
                f"--outscale makes a smaller one, got {factor:g}"
            )

    def summarise(self, progress: Progress) -> None:
        """Print what became of a folder."""
        counts = progress.counts
        parts = [f"{counts['ok']} made in {self.options.target}"]
        if progress.before:
            parts.append(f"{progress.before} were there (--overwrite makes them again)")
        if counts["failed"]:
            parts.append(f"{counts['failed']} failed")
        if self.contents.num_others:
            parts.append(f"{self.contents.num_others} other files left out")
        print(", ".join(parts))


def _read(source: str, max_bytes: int) -> bytes:
    from resshift import storage

    if source != PIPE:
        return storage.read_bytes(source, max_bytes)
    data = sys.stdin.buffer.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise _Failed(f"too_large: standard input has more than {max_bytes} bytes")
    return data


def _write(target: str, data: bytes, format: Format) -> None:
    from resshift import storage
    from resshift.output_names import CONTENT_TYPES

    if target == PIPE:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        storage.write_bytes(target, data, content_type=CONTENT_TYPES[format])
