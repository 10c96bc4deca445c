"""jsonargparse's parsers, with a user's mistake as one line that says what to write instead."""

import math
import os
import re
from argparse import ArgumentError
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Union, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from gpt_lightning.cli.errors import explain
from gpt_lightning.cli.suggestions import nearest_config
from gpt_lightning.cli.text_options import (
    check_argument_texts,
    configs_first,
    normalize_texts,
    values_of,
)
from gpt_lightning.cli.yaml_input import MAX_CHARACTERS, use_checked_yaml
from gpt_lightning.data.unicode import decode_text

# a class_path in a YAML file is code; from elsewhere it is refused before it is imported
ALLOWED_IMPORTS = ["gpt_lightning", "lightning", "torch"]


def parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    """Parse with a parser made with ``exit_on_error=False``; its errors come as one-line ``ValueError``.

    The command line wins over ``--config``, and of several configurations the last. Every group of settings is
    there, every number is finite, and what may not be null is not.
    """
    check_argument_texts(arguments)
    # of the command line alone: a YAML file cannot allow what it names
    allowed = ALLOWED_IMPORTS + values_of("--allow_import", arguments)
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=allowed)
    use_checked_yaml()
    parser.allow_abbrev = False  # a later setting may begin with the same letters
    _try_int_before_float(parser)
    for name in values_of("--config", arguments) + values_of("-c", arguments):
        _check_config_file(name)
    try:
        config = parser.parse_args(configs_first(parser, arguments))
    except ArgumentError as error:
        raise ValueError(explain(str(error), parser, ALLOWED_IMPORTS)) from error
    except RecursionError as error:
        raise ValueError(
            "config: is nested too deeply; give settings and groups of them"
        ) from error
    normalize_texts(parser, config)
    _check_nulls(parser, config)
    _check_values(config)
    _expand_home(config)
    return config


def _try_int_before_float(parser: ArgumentParser) -> None:
    """Else ``trainer.limit_train_batches`` of 1, one batch, may become 1.0, all batches.

    ``Optional[Union[int, float]]`` is the object that typing has in its cache, which may be in another
    order: that of whatever was imported before.
    """
    for action in parser._actions:
        typehint = getattr(action, "_typehint", None)
        kinds = get_args(typehint)
        if get_origin(typehint) is Union and float in kinds:
            ordered = tuple(sorted(kinds, key=lambda kind: kind is not int))
            vars(action)["_typehint"] = Union[ordered]  # noqa: UP007


def _check_config_file(name: str) -> None:
    """``name`` may also be ``-`` for standard input, or YAML itself."""
    path = Path(os.path.expanduser(name))
    try:
        if path.is_dir():
            raise ValueError(f"config: {name} is a folder; give a YAML file")
        if path.is_file():  # what is read once, such as a pipe, is not looked at
            if path.stat().st_size > 4 * MAX_CHARACTERS:
                raise ValueError(f"config: {name} is too large for a configuration; give another")
            try:
                decode_text(path.read_bytes())
            except ValueError as error:
                raise ValueError(f"config: {name} {error}; convert it to UTF-8") from error
        elif not path.exists() and name != "-" and not set(name) & set("{:\n"):
            near = nearest_config(name)
            remedy = f"did you mean {near}?" if near else "give a YAML file"
            raise FileNotFoundError(f"config: {name} does not exist; {remedy}")
    except OSError as error:
        if error.strerror is None:
            raise
        raise OSError(f"config: {name} cannot be read ({error.strerror}); check it") from error


def _check_nulls(parser: ArgumentParser, config: Namespace) -> None:
    """``model:`` without anything below it takes the defaults of all that is in it away."""
    dests = list(parser.get_defaults(skip_validation=True).keys())
    missing = {dest for dest in dests if dest not in config}
    if missing:
        first = next(dest for dest in dests if dest in missing)
        parts = first.split(".")
        groups = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
        # the outermost of which nothing is left
        group = next(
            g for g in groups if {d for d in dests if f"{d}.".startswith(f"{g}.")} <= missing
        )
        raise ValueError(f"{group}: has no settings; give some, or leave it out")
    for action in parser._actions:
        typehint = getattr(action, "_typehint", None)
        if typehint in (None, Any) or action.default is None or action.dest not in config:
            continue
        if config[action.dest] is None and NoneType not in get_args(typehint):
            raise ValueError(f"{action.dest}: is null; give a value, or leave it out")


def _check_values(config: Namespace) -> None:
    for key, value in _leaves(config, ""):
        of_class = ".init_args." in f".{key}."  # which may mean 'no limit' by infinity
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and not of_class)):
            setting = key.replace(".init_args.", ".")
            raise ValueError(f"{setting}: {value} is not a finite number; give one")
        if isinstance(value, dict) and not of_class:
            for name in value:
                if not isinstance(name, str):
                    raise ValueError(f"{key}: {name} is not text; put it in quotes")


def _expand_home(value: Any, of_class: bool = False) -> None:
    """``~`` in the paths that a class is given; our own settings are expanded where they are read."""
    if isinstance(value, list):
        for inner in value:
            _expand_home(inner)
    if not isinstance(value, Namespace):
        return
    for name, inner in vars(value).items():
        if of_class and isinstance(inner, str) and re.search("(dir|path|folder|file|root)$", name):
            value[name] = os.path.expanduser(inner)
        _expand_home(inner, of_class=name == "init_args")


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """All values with their keys; a mapping that is one value is one of them."""
    if isinstance(value, Namespace | dict):
        for name, inner in vars(value).items() if isinstance(value, Namespace) else value.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner, key)
    if not isinstance(value, Namespace):
        yield key, value
