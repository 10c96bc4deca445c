"""What commands share that run ``fit`` in child processes and take its settings: verify-resume and tune."""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from gpt_lightning.cli.errors import explain
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND


def parser_beside_fit(verb: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for a command's own options. It is argparse's, which returns unknown arguments: they are for ``fit``."""
    return argparse.ArgumentParser(
        prog=f"gpt_lightning {verb}",
        description=description,
        epilog=OPTIONS_OF_EVERY_COMMAND,
        allow_abbrev=False,
        exit_on_error=False,
    )


def split_arguments(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and the remaining arguments, which are for ``fit``."""
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), parser)) from error
    for option in parser._option_string_actions:
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and option.startswith(name):
                raise ValueError(f"{name[2:]}: is not a setting; did you mean {option[2:]}?")
    return options, rest


@contextmanager
def terminated_by_exit() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the running ``fit`` ends and ``finally`` blocks are executed."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
