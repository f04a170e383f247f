"""The command `resshift`: pictures by default, and a few sub-commands beside."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from resshift.command import convert, doctor, exit_code, export, models, parser, settings, upscale
from resshift.openmp import wait_passively

# A command is a module of this package: the first line of its docstring is its help, `add_arguments` adds
# its arguments to a parser, `run` does the work. It imports torch in `run` only, so that --help waits for
# nothing.
COMMANDS = {"models": models, "settings": settings, "doctor": doctor, "convert": convert, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run the command, and return the exit code."""
    wait_passively()
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words and words[0] in COMMANDS else None
    module = upscale if name is None else COMMANDS[name]
    arguments = parser(module.__doc__ or "")
    arguments.prog = "resshift" if name is None else f"resshift {name}"
    if name is None:
        arguments.epilog = _others()
    module.add_arguments(arguments)
    options = arguments.parse_args(words if name is None else words[1:])
    return exit_code(module.run, options)


def _others() -> str:
    """Return the list of the other commands."""
    lines = (
        f"  resshift {name:<9}{(module.__doc__ or '').splitlines()[0]}" for name, module in COMMANDS.items()
    )
    return "\n".join(("other commands (a file of such a name is ./NAME):", *lines))
