"""The command `resshift`, and what all commands share: exit codes, parsers and one-line errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from resshift.config import Sampling

_POSITIONAL = {"source": "SRC", "target": "DST"}


class Exit(IntEnum):
    """Exit codes of every command."""

    COMPLETE = 0
    FAILED = 1
    USAGE = 2
    FINISHED_WITH_FAILED_ITEMS = 3
    INTERRUPTED = 130  # as a shell says of Ctrl-C


class UsageError(ValueError):
    """The command cannot do what it was asked; the message is one line for the user."""


class _Parser(argparse.ArgumentParser):
    """A parser with a text at the end of its help that is made when the help is asked for."""

    ending: Callable[[], str] | None = None

    def format_help(self) -> str:
        """Return the help."""
        if self.ending is not None:
            self.epilog = self.ending()
        return super().format_help()


def parser(doc: str, ending: Callable[[], str] | None = None) -> argparse.ArgumentParser:
    """Return a parser whose help is the module docstring of the command, examples included.

    Args:
        doc: Docstring.
        ending: Function that returns what stands at the end of the help.
    """
    made = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    made.ending = ending
    return made


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


def add_sampling(options: argparse.ArgumentParser) -> None:
    """Add the flags of `Sampling` that every command with a model has."""
    add = options.add_argument
    add("--steps", type=int, help="steps of the chain; fewer cost less (default: the model's)")
    add("--sampler", choices=["posterior", "ddim"], help="ddim: no noise after the first step")
    add("--fidelity", type=float, metavar="F", help="0, the model, to 1, which invents nothing (default: 0)")
    add("--seed", type=int, default=0, help="seed of the noise; same seed, same bytes (default 0)")
    add("--tile", type=int, metavar="PX", help="side of a tile in input pixels (default: chosen, up to 256)")


def add_outscale(options: argparse.ArgumentParser) -> None:
    """Add `--outscale`, `--cascade` and `--faces`."""
    add = options.add_argument
    add("--outscale", type=float, help="scale of the result (the model's); costs as much as the model's")
    add("--cascade", action="store_true", help="beyond the model's scale run it again instead of bicubic")
    add("--faces", metavar="FILE", help="restore faces only, which YuNet's ONNX file finds (scale 1)")


def add_format(options: argparse.ArgumentParser, default: str) -> None:
    """Add `--format`, of which None is the default, and `--quality`.

    Args:
        options: Command line.
        default: What the default means.
    """
    from resshift.output_names import OutputFormat, format_name

    told = f"format of the result; keep: as the input (default: {default})"
    options.add_argument("--format", type=format_name, choices=get_args(OutputFormat), help=told)
    told = "quality of jpeg, webp, avif, jxl (default 95)"
    options.add_argument("--quality", type=int, default=95, help=told)


def sampling_of(flags: argparse.Namespace) -> Sampling:
    """Return the flags of `add_sampling`, and of `add_outscale` if there are any, as a value."""
    from resshift.config import Sampling

    return Sampling(
        seed=flags.seed,
        outscale=getattr(flags, "outscale", None),
        cascade=getattr(flags, "cascade", False) or None,
        steps=flags.steps,
        sampler=flags.sampler,
        fidelity=flags.fidelity,
        faces=getattr(flags, "faces", None),
        tile_px=flags.tile,
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
    except BrokenPipeError:  # whoever read the output has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(Exit.COMPLETE)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return int(Exit.INTERRUPTED)
