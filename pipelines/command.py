"""What all commands share: exit codes, one-line errors, and the connection to Ray."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

_POSITIONAL = {"source": "SRC", "target": "DST"}


class Exit(IntEnum):
    """Exit codes of every command."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    FINISHED_WITH_FAILED_ITEMS = 3


class UsageError(ValueError):
    """The command cannot do what it was asked; the message is one line for the user."""


def check_places(source: str, target: str, made: str) -> None:
    """Refuse a target inside its source.

    Args:
        source: Where inputs are listed.
        target: Where outputs go.
        made: What they are, for the message.

    Raises:
        OptionError: The target lies there.
    """
    from resshift import storage
    from resshift.config import OptionError

    if storage.is_inside(target, source):
        message = f"must not lie inside {source}, got {target}: {made} would become inputs of the next run"
        raise OptionError("target", message)


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help is the module docstring of the command, examples included."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def add_model(options: argparse.ArgumentParser, **how: Any) -> None:
    """Add `--model`, and the flags for what bare weights do not say themselves.

    Args:
        options: Command line.
        how: Arguments of `add_argument` for `--model`.
    """
    told = "name, path, s3:// or hf://OWNER/NAME; @bfloat16 may follow"
    options.add_argument("--model", help=told + (" (tiny-x4)" if how else ""), **how)
    options.add_argument("--preset", help="preset of a bare weight file, if its shapes fit several")
    options.add_argument(
        "--first-stage", metavar="FILE", help="autoencoder of a bare weight file (beside it)"
    )


def model_of(model: str, flags: argparse.Namespace) -> str:
    """Return a model with the flags of `add_model`, as one text that every process understands."""
    from resshift.models import model_with

    return model_with(model, flags.preset, flags.first_stage)


def min_max(flag: str, text: str, least: int = 1) -> tuple[int, int]:
    """Return (MIN, MAX) of a flag that takes `MIN:MAX`, or N for N:N.

    Args:
        flag: Name of the flag, for the message.
        text: What the flag was given.
        least: Smallest MIN; MAX is at least 1.

    Raises:
        UsageError: The text is neither, or the numbers are out of range.
    """
    match = re.fullmatch(r"([0-9]+)(?::([0-9]+))?", text)
    low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not least <= low <= high or high < 1:
        ends = " and 1 <= MAX" if least < 1 else ""
        raise UsageError(f"{flag} must be N or MIN:MAX with {least} <= MIN <= MAX{ends}, got {text!r}")
    return low, high


def run(
    command: Callable[[argparse.Namespace], Exit],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, and turn expected errors into one line on standard error and an exit code."""
    options = arguments.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%H:%M:%S"
    )
    # Imported here so that --help waits for nothing; none of them brings torch, which the driver of a bulk
    # job never needs.
    from resshift.config import ConfigError, OptionError
    from resshift.models import WeightsError
    from resshift.storage import StorageError

    try:
        return int(command(options))
    except OptionError as error:
        flag = _POSITIONAL.get(error.option) or f"--{error.option.replace('_', '-')}"
        sys.stderr.write(f"error: {flag} {error.message}\n")
        return int(Exit.USAGE)
    except (UsageError, ConfigError, WeightsError) as error:
        sys.stderr.write(f"error: {error}\n")
        return int(Exit.USAGE)
    except StorageError as error:
        sys.stderr.write(f"error: {error}\n")
        return int(Exit.FAILED)


def connect_to_ray(num_cpus: int | None = None) -> None:
    """Join the cluster that started this job (RAY_ADDRESS), or start one on this machine.

    Logical CPUs of a local cluster: two more than there are cores. Ray Data's own actors hold a CPU each, and
    a pipeline whose CPUs are all held hangs without an error.

    Args:
        num_cpus: Logical CPUs of a local cluster.
    """
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # "local": without it, init would find a cluster that somebody started on this machine, and refuse
    # num_cpus.
    ray.init(
        address="local", num_cpus=num_cpus or max(4, (os.cpu_count() or 2) + 2), logging_level=logging.WARNING
    )


def quiet_ray_data() -> None:
    """Leave progress to the command: Ray Data's plan lines and bars off."""
    import ray.data

    from pipelines.cluster.ray_internals import PROGRESS_LOGGER

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
