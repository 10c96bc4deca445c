"""Parsing with jsonargparse, where each mistake of the user becomes one line that says what to write instead."""

import math
import os
import re
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from gpt_lightning.cli.config_files import config_names
from gpt_lightning.cli.errors import explain
from gpt_lightning.cli.help_format import HelpFormatter
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND
from gpt_lightning.cli.text_options import (
    check_argument_texts,
    configs_first,
    normalize_texts,
    values_of,
)
from gpt_lightning.cli.yaml_input import MAX_CHARACTERS, use_checked_yaml
from gpt_lightning.data.unicode import decode_text
from gpt_lightning.suggestions import nearest, nearest_config

# a class_path in a YAML file runs code, so other packages are refused before they are imported
ALLOWED_IMPORTS = ["gpt_lightning", "lightning", "torch"]


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the arguments with a parser that has ``exit_on_error=False``.

    The command line has priority over ``--config``, and a later configuration over an earlier one. In the result
    every group of settings is present, every number is finite, and no setting is null that must have a value.

    Raises:
        ValueError, OSError: The user made a mistake; the message is one line.
    """
    check_argument_texts(arguments)
    # only from the command line: a YAML file must not allow its own imports
    allowed = ALLOWED_IMPORTS + values_of("--allow_import", arguments)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)
    use_checked_yaml()
    parser.epilog = OPTIONS_OF_EVERY_COMMAND
    parser.formatter_class = HelpFormatter
    parser.allow_abbrev = False  # a new setting could make an abbreviation ambiguous
    _try_int_before_float(parser)
    for name in values_of("--config", arguments, "-c"):
        check_config_file(name)
    try:
        config = parser.parse_args(configs_first(parser, arguments))
    except ArgumentError as error:
        raise ValueError(explain(str(error), parser, ALLOWED_IMPORTS)) from error
    except RecursionError as error:
        raise ValueError(
            "config: is nested too deeply; give settings in groups, as --print_config shows them"
        ) from error
    normalize_texts(parser, config)
    _check_null_settings(parser, config)
    _check_values(config)
    _expand_home(config)
    return config


def _try_int_before_float(parser: ArgumentParser) -> None:
    """Make parsers of ``int | float`` try ``int`` first.

    Otherwise ``trainer.limit_train_batches`` of 1 (one batch) may become 1.0 (all batches): typing caches unions
    without regard to order, so the order is that of the module that was imported first.
    """
    for action in parser._actions:
        typehint = getattr(action, "_typehint", None)
        types = get_args(typehint)
        if get_origin(typehint) is Union and float in types:
            ordered = tuple(sorted(types, key=lambda each: each is not int))
            vars(action)["_typehint"] = Union[ordered]  # noqa: UP007


def check_config_file(name: str, option: str = "config") -> None:
    """Check that a configuration file exists and is UTF-8.

    ``name`` may also be ``-`` for standard input, or YAML text.

    Args:
        option: Option that gives it, for messages.
    """
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            raise ValueError(f"{option}: {name} is a folder; give a YAML file")
        if path.is_file():  # not a pipe, which can only be read once
            if path.stat().st_size > 4 * MAX_CHARACTERS:
                raise ValueError(
                    f"{option}: {name} is too large for a configuration; give another file"
                )
            try:
                decode_text(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"{option}: {name} {error}; convert it to UTF-8") from error
        elif (
            not path.exists()
            and name != "-"
            and not set(name.removeprefix(path.drive)) & set("{:\n")
        ):
            near = nearest_config(name) or nearest(Path(name).stem, config_names())
            remedy = f"did you mean {near}?" if near else "give a YAML file"
            raise FileNotFoundError(f"{option}: {name} does not exist; {remedy}")
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(
            f"{option}: {name} cannot be read ({error.strerror}); check the file"
        ) from error


def setting_types(parser: ArgumentParser) -> dict[str, Any]:
    """Setting → its type, without groups of settings and options that are not settings."""
    types = {
        action.dest: (action, getattr(action, "_typehint", None)) for action in parser._actions
    }
    return {
        name: kind
        for name, (action, kind) in types.items()
        if kind is not None and f"--{name}" in action.option_strings and not name.endswith(".help")
    }


def _check_null_settings(parser: ArgumentParser, config: Namespace) -> None:
    """Refuse groups without settings and null where a setting needs a value.

    With an empty ``model:`` jsonargparse drops the defaults of all settings in the group.
    """
    dests = list(parser.get_defaults(skip_validation=True).keys())
    missing = {dest for dest in dests if dest not in config}
    if missing:
        first = next(dest for dest in dests if dest in missing)
        parts = first.split(".")
        groups = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        # the outermost group without any setting
        group = next(
            g for g in groups if {d for d in dests if f"{d}.".startswith(f"{g}.")} <= missing
        )
        raise ValueError(f"{group}: has no settings; give settings, or leave it out")
    for action in parser._actions:
        typehint = getattr(action, "_typehint", None)
        if typehint in (None, Any) or action.default is None or action.dest not in config:
            continue
        if config[action.dest] is None and NoneType not in get_args(typehint):
            raise ValueError(f"{action.dest}: is null; give a value, or leave it out")


def _check_values(config: Namespace) -> None:
    """Refuse numbers that are not finite, and mapping keys that are not text."""
    for key, value in _walk(config, ""):
        in_init_args = ".init_args." in f".{key}."  # a class may accept infinity as "no limit"
        if isinstance(value, float) and (
            math.isnan(value) or (math.isinf(value) and not in_init_args)
        ):
            setting = key.replace(".init_args.", ".")
            raise ValueError(f"{setting}: {value} is not a finite number; give one")
        if isinstance(value, dict) and not in_init_args:
            for name in value:
                if not isinstance(name, str):
                    raise ValueError(f"{key}: {name} is not text; put it in quotes")


def _expand_home(value: Any, in_init_args: bool = False) -> None:
    """Expand ``~`` in paths in ``init_args``; our own settings are expanded where they are read."""
    if isinstance(value, list):
        for inner in value:
            _expand_home(inner)
    if not isinstance(value, Namespace):
        return
    for name, inner in vars(value).items():
        if (
            in_init_args
            and isinstance(inner, str)
            and re.search("(dir|path|folder|file|root)$", name)
        ):
            value[name] = os.path.expanduser(inner)
        _expand_home(inner, in_init_args=name == "init_args")


def _walk(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All values with their keys, depth first; a mapping is yielded too, after its values."""
    if isinstance(value, Namespace | dict):
        for name, inner in vars(value).items() if isinstance(value, Namespace) else value.items():
            yield from _walk(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _walk(inner, key)
    if not isinstance(value, Namespace):
        yield key, value
