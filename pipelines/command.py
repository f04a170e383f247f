"""What the commands on Ray share: ranges and places, logging, and the connection to Ray. Exit codes, parsers,
the flags of models and one-line errors are those of `resshift.command`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence

from pipelines.cluster.ray_internals import NO_CLUSTER_BY_ITSELF, SKIPPED_LINES
from resshift.command import Exit as Exit
from resshift.command import UsageError as UsageError
from resshift.command import add_format as add_format
from resshift.command import add_model as add_model
from resshift.command import add_outscale as add_outscale
from resshift.command import add_sampling as add_sampling
from resshift.command import exit_code
from resshift.command import model_of as model_of
from resshift.command import parser as parser
from resshift.command import sampling_of as sampling_of
from resshift.openmp import wait_passively


class NoCluster(RuntimeError):
    """Ray can be neither reached nor started; the message is one line."""


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


def bulk_settings() -> str:
    """Return the settings of bulk jobs, for the end of a help."""
    from pipelines.bulk.settings import BulkSettings
    from resshift.settings import listing

    shown = listing(BulkSettings(), ("output", "limits", "select", "work", "engine", "source"))
    return f"settings:\n{shown}\ntarget.*: as source.*"


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


def add_settings(options: argparse.ArgumentParser) -> None:
    """Add `--set`, for commands with the configuration of a run."""
    options.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="change one setting; may be repeated (`resshift settings PRESET` lists them)",
    )


def positive(text: str) -> int:
    """Return a whole number of at least 1, for the `type` of a flag."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """Return a share of 0 to 1 that is given in per cent ("0.1%"), for the `type` of a flag."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", text)
    if match is None or float(match[1]) > 100:
        raise argparse.ArgumentTypeError(f"must be a percentage such as 0.1%, got {text!r}")
    return float(match[1]) / 100


def run(
    command: Callable[[argparse.Namespace], Exit],
    arguments: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:
    """Parse, run, and turn expected errors into one line on standard error and an exit code."""
    options = arguments.parse_args(argv)
    for name, value in (SKIPPED_LINES | NO_CLUSTER_BY_ITSELF).items():  # before anything imports Ray
        os.environ.setdefault(name, value)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("aiobotocore.credentials").setLevel(logging.WARNING)  # where it found them
    try:
        return exit_code(command, options)
    except NoCluster as error:
        sys.stderr.write(f"error: {error}\n")
        return int(Exit.FAILED)


def on_a_cluster() -> bool:
    """Tell whether this command has a cluster to join; else it starts one on this machine."""
    import ray

    return bool(os.environ.get("RAY_ADDRESS")) or ray.is_initialized()


def connect_to_ray(num_cpus: int | None = None) -> None:
    """Join the cluster that started this job (RAY_ADDRESS), or start one on this machine.

    Logical CPUs of a local cluster: two more than there are cores. Ray Data's own actors hold a CPU each, and
    a pipeline whose CPUs are all held hangs without an error.

    Args:
        num_cpus: Logical CPUs of a local cluster.

    Raises:
        NoCluster: The cluster does not answer, it wants a token that is not here, or none can be started.
    """
    import ray
    from ray.exceptions import AuthenticationError

    from pipelines.cluster.ray_internals import TOKEN_LOGGER

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(logging_level=logging.WARNING)
        except (ConnectionError, AuthenticationError) as error:
            told = str(error).splitlines()[0]
            raise NoCluster(f"no cluster answers at RAY_ADDRESS={address}: {told}") from error
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    wait_passively()
    logging.getLogger(TOKEN_LOGGER).setLevel(logging.ERROR)
    num_cpus = num_cpus or max(4, (os.cpu_count() or 2) + 2)
    for is_last in (False, True):
        try:
            # "local": without it, init would find a cluster that somebody started on this machine, and refuse
            # num_cpus.
            ray.init(address="local", num_cpus=num_cpus, logging_level=logging.WARNING)
            return
        except Exception as error:  # Ray has no class of its own for a node that is not up within 30 s
            if "timed out during startup" not in str(error):
                raise
            if is_last:
                raise NoCluster(
                    "Ray did not start within the time that it gives itself (30 s), twice; this machine may "
                    "be too busy: run the command again when it is not"
                ) from error


def quiet_ray_data() -> None:
    """Leave progress to the command: Ray Data's plan lines and bars off."""
    import ray.data

    from pipelines.cluster.ray_internals import PROGRESS_LOGGER

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(PROGRESS_LOGGER).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
