"""YAML as jsonargparse reads it, after a check that is bounded in time: size, depth, aliases, and each key once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingStartEvent,
    NodeEvent,
    ScalarEvent,
)

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000  # with every alias counted as what it stands for
MAX_DEPTH = 50

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load = get_loader("yaml")


def use_checked_yaml() -> None:
    """Have all parsers of jsonargparse read YAML by :func:`load_checked`."""
    set_loader("yaml", load_checked, (yaml.YAMLError,))


def load_checked(text: str, path: str = "") -> Any:
    """What ``text`` holds: a configuration file, or without ``path`` the value of one option.

    Raises:
        ValueError: It is too large or too deep, has a cycle or a key twice; a file: it is not YAML either, or no
            mapping.
        yaml.YAMLError: A value is not YAML; it may still be text.
    """
    try:
        check_yaml(text)
        value = _load(text)
    except yaml.YAMLError as error:
        if not path:
            raise
        raise ValueError(f"{path}: {_problem(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    if not path:
        return value
    if isinstance(value, str):  # jsonargparse takes 'model:' for text
        value = yaml.load(text, _LOADER)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no settings; give lines such as 'run: NAME'")
    return value


@dataclass
class _Open:
    """A mapping or sequence that has not ended yet."""

    path: str
    is_mapping: bool
    anchor: str | None
    size_before: int
    key: str | None = None  # of a mapping: the value comes next
    items: int = 0


def check_yaml(text: str) -> None:
    """Check a document without building it.

    Keys are compared by their path, so that ``model.lr`` and ``lr`` in ``model`` are one.

    Raises:
        ValueError, yaml.YAMLError: As :func:`load_checked`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has more than {MAX_CHARACTERS:,} characters; it is not a configuration")
    opened: list[_Open] = []
    lines: dict[str, int] = {}  # of each key
    sizes: dict[str, int] = {}  # of what each anchor names; 0 before its end
    values = 0
    for event, line in _events(text):
        if isinstance(event, CollectionEndEvent):
            ended = opened.pop()
            if ended.anchor:
                sizes[ended.anchor] = values - ended.size_before
            continue
        path = _place(event, opened, lines, line)
        if isinstance(event, AliasEvent):
            size = sizes.get(str(event.anchor), 1)
            if not size:
                raise ValueError(f"line {line}: *{event.anchor} contains itself; write it out")
            values += size
        else:
            values += 1
        if values > MAX_VALUES:
            raise ValueError(f"has more than {MAX_VALUES:,} values; it is not a configuration")
        if isinstance(event, CollectionStartEvent):
            if len(opened) == MAX_DEPTH:
                raise ValueError(f"line {line}: is nested more than {MAX_DEPTH} levels deep")
            is_mapping = isinstance(event, MappingStartEvent)
            opened.append(_Open(path, is_mapping, event.anchor, values - 1))
            if event.anchor:
                sizes[event.anchor] = 0
        elif isinstance(event, ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1


def _events(text: str) -> Iterator[tuple[Event, int]]:
    """Nodes, and the ends of mappings and sequences, with their lines, counted from 1."""
    documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        assert event.start_mark is not None
        line = event.start_mark.line + 1
        documents += isinstance(event, DocumentStartEvent)
        if documents > 1:
            raise ValueError(f"line {line}: begins a second document; give one")
        if isinstance(event, NodeEvent | CollectionEndEvent):
            yield event, line


def _place(event: Event, opened: list[_Open], lines: dict[str, int], line: int) -> str:
    """The path of a node, or '' of a key; a key is noted in ``lines``."""
    if not opened:
        return ""
    parent = opened[-1]
    if not parent.is_mapping:
        parent.items += 1
        return f"{parent.path}[{parent.items - 1}]"
    if parent.key is not None:
        path, parent.key = parent.key, None
        return path
    if not isinstance(event, ScalarEvent):
        raise ValueError(f"line {line}: a key must be one word")
    path = f"{parent.path}.{event.value}" if parent.path else str(event.value)
    if path in lines:
        where = f"lines {lines[path]} and {line}" if lines[path] != line else f"line {line}"
        raise ValueError(f"{path} is given twice, in {where}; keep one of them")
    lines[path] = line
    parent.key = path
    return ""


def _problem(error: yaml.YAMLError) -> str:
    """What is wrong with the YAML of a file, with its line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line + 1
        remedy = "check the colons, quotes and brackets before it"
        if "cannot start any token" in str(error.problem):
            remedy = "indent with blanks, not tabs, and quote text that begins with a sign"
        elif "tag" in str(error.problem):
            remedy = "only plain values are read"
        return f"line {line}: is not YAML ({error.problem}); {remedy}"
    return f"is not YAML ({' '.join(str(error).split())[:100]}); check the file"
