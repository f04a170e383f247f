"""Models from and to other tools.

    resshift convert weights.pth --to mine --preset realsr-x4-s4
    resshift export tiny-x4 --to onnx

`resshift COMMAND --help` has the options and more examples.
"""

from __future__ import annotations

from collections.abc import Sequence

from resshift.command import convert, exit_code, export, parser

# A sub-command is a module of this package: the first line of its docstring is its help, `add_arguments` adds
# its arguments to a parser, `run` does the work. It imports torch in `run` only, so that --help waits for
# nothing.
COMMANDS = {"convert": convert, "export": export}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run the sub-command, and return the exit code."""
    arguments = parser(__doc__ or "")
    arguments.prog = "resshift"
    commands = arguments.add_subparsers(metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        doc = module.__doc__ or ""
        inner = commands.add_parser(
            name,
            help=doc.split("\n", 1)[0],
            description=doc,
            formatter_class=arguments.formatter_class,
            allow_abbrev=False,
        )
        module.add_arguments(inner)
        inner.set_defaults(run=module.run)
    options = arguments.parse_args(argv)
    return exit_code(options.run, options)
