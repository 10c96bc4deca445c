"""jsonargparse's parsers, with a user's mistake as one line that says what to write instead."""

import re
from argparse import ArgumentError
from collections.abc import Iterable
from difflib import get_close_matches

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from gpt_lightning.cli.text_options import (
    check_given,
    configs_first,
    take_texts,
    values_of,
)

# a class_path in a YAML file is code; from elsewhere it is refused before it is imported
ALLOWED_IMPORTS = ["gpt_lightning", "lightning", "torch"]

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --?(?P<key>[^\s=]+)")
_UNKNOWN_IN_GROUP = re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'")
_UNKNOWN_KEY = re.compile(r"[Oo]ption '(?P<key>[^']+)' is not accepted")
_NOT_ALLOWED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed")
_GIVEN = re.compile(r"Given value: (?P<value>.*)$")
_BAD_VALUE = re.compile(r'Parser key "(?P<key>[^"]+)":\s*(?P<cause>.*)', re.DOTALL)


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse with a parser made with ``exit_on_error=False``; its errors come as one-line ``ValueError``.

    The command line wins over ``--config``, and of several configurations the last.
    """
    check_given(parser, arguments)
    # of the command line alone: a YAML file cannot allow what it names
    allowed = ALLOWED_IMPORTS + values_of("--allow_import", arguments)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)
    try:
        settings = parser.parse_args(configs_first(parser, arguments))
    except ArgumentError as error:
        raise ValueError(_explain(str(error), parser)) from error
    except RecursionError as error:
        raise ValueError(
            "config: is nested too deeply; give settings and groups of them"
        ) from error
    take_texts(parser, settings)
    return settings


def suggest(word: str, known: Iterable[str]) -> str:
    known = list(known)
    near = get_close_matches(word, known, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]}?"
    return f"give one of {', '.join(known)}" if len(known) <= 12 else "see --help"


def _explain(message: str, parser: ArgumentParser) -> str:
    known = {action.dest for action in parser._actions}
    known |= {dest.split(".")[0] for dest in known}
    if match := _NOT_ALLOWED.search(message):
        return (
            f"{match['path']}: is not imported from a configuration, which may come from anywhere; "
            f"only from {', '.join(ALLOWED_IMPORTS)}, or what --allow_import names"
        )
    if match := _UNKNOWN_IN_GROUP.search(message):
        key = f"{match['group']}.{match['key']}"
        return f"{key}: is no setting; {suggest(key, known)}"
    if match := _UNKNOWN_OPTION.search(message) or _UNKNOWN_KEY.search(message):
        return f"{match['key']}: is no setting; {suggest(match['key'], known)}"
    if match := _BAD_VALUE.search(message):
        cause = " ".join(match["cause"].split()).rstrip(".")
        if "Expected a <class 'list'>" in cause and (given := _GIVEN.search(cause)):
            return f"{match['key']}: {given['value']} is no list; give one, such as '[1, 2]'"
        return f"{match['key']}: {cause}; see --help"
    return " ".join(message.split()) + "; see --help"
