"""The command `resshift`, and what all commands share: exit codes, parsers and one-line errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from enum import IntEnum

_POSITIONAL = {"source": "SRC", "target": "DST"}


class Exit(IntEnum):
    """Exit codes of every command."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    FINISHED_WITH_FAILED_ITEMS = 3


class UsageError(ValueError):
    """The command cannot do what it was asked; the message is one line for the user."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Return a parser whose help is the module docstring of the command, examples included."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def exit_code(command: Callable[[argparse.Namespace], Exit], options: argparse.Namespace) -> int:
    """Run a command, and turn expected errors into one line on standard error and an exit code."""
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
