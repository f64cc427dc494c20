"""The `nnfast` command. Each module here whose name has no leading underscore is a subcommand.

Such a module has a docstring (its first line is the help), `add_arguments(parser)` and `run(args) -> int`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence


class CommandError(Exception):
    """A subcommand cannot do what was asked; the message says why and what is needed."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, by default the process's own.

    Returns:
        The exit code: 0, or 2 if the subcommand could not do what was asked.

    Raises:
        SystemExit: from argparse, for --help and for arguments that it cannot parse.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except CommandError as error:
        print(f"nnfast {args.command}: {error}", file=sys.stderr)
        return 2
    return code


def _parser() -> argparse.ArgumentParser:
    from .. import __version__

    parser = argparse.ArgumentParser(
        prog="nnfast", description="Drop-in PyTorch modules: same, never slower."
    )
    parser.add_argument("--version", action="version", version=f"nnfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for found in pkgutil.iter_modules(__path__):
        if not found.name.startswith("_"):
            module = importlib.import_module(f"{__name__}.{found.name}")
            text = (module.__doc__ or "").strip()
            command = commands.add_parser(found.name, help=text.partition("\n")[0], description=text)
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser
