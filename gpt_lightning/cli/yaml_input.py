"""YAML loader for jsonargparse that first checks size, depth, aliases and duplicate keys, in bounded time."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from jsonargparse.typing import Path
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

from gpt_lightning.data.unicode import decode_text

MAX_CHARACTERS = 1_000_000
MAX_VALUES = 20_000  # each alias counts as many values as it stands for
MAX_DEPTH = 50

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_load = get_loader("yaml")
_read_text = Path.read_text


def use_checked_yaml() -> None:
    """Make all parsers of jsonargparse read files as UTF-8, and YAML with :func:`load_checked`."""
    set_loader("yaml", load_checked, (yaml.YAMLError,))
    Path.read_text = _read_utf8  # type: ignore[method-assign, assignment]


def _read_utf8(path: Path) -> str:
    """The text of a file; jsonargparse reads it in the system's encoding, which is not UTF-8 on Windows."""
    if not os.path.exists(path.absolute):  # standard input
        return _read_text(path)
    with open(path.absolute, "rb") as file:
        content = file.read()
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"config: {path} {error}; convert it to UTF-8") from error


def load_checked(text: str, path: str = "") -> Any:
    """Load YAML: the content of the file ``path``, or, without ``path``, the value of one option.

    Raises:
        ValueError: The text is too large or nested too deeply, has a cycle or a duplicate key. Of a file: it is not
            YAML, or not a mapping.
        yaml.YAMLError: The value of an option is not YAML; it may still be plain text.
    """
    try:
        check_yaml(text)
        value = _load(text)
    except yaml.YAMLError as error:
        if not path:
            raise
        raise ValueError(f"{path}: {_explain_yaml_error(error)}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}" if path else str(error)) from error
    if not path:
        return value
    if isinstance(value, str):  # jsonargparse reads 'model:' as text
        value = yaml.load(text, _LOADER)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no settings; give lines such as 'run: NAME'")
    return value


@dataclass
class _OpenCollection:
    """Mapping or sequence whose end has not been read yet."""

    path: str
    is_mapping: bool
    anchor: str | None
    size_before: int
    key: str | None = None  # in a mapping: the key whose value comes next
    items: int = 0


def check_yaml(text: str) -> None:
    """Check a document without building it.

    Keys are compared by their full path, so ``model.lr`` and ``lr`` in ``model`` are the same key.

    Raises:
        ValueError, yaml.YAMLError: See :func:`load_checked`.
    """
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"has more than {MAX_CHARACTERS:,} characters; it is not a configuration")
    open_collections: list[_OpenCollection] = []
    lines: dict[str, int] = {}  # line of each key
    sizes: dict[str, int] = {}  # number of values below each anchor; 0 before its end
    values = 0
    for event, line in _events(text):
        if isinstance(event, CollectionEndEvent):
            ended = open_collections.pop()
            if ended.anchor:
                sizes[ended.anchor] = values - ended.size_before
            continue
        path = _path_of_node(event, open_collections, lines, line)
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
            if len(open_collections) == MAX_DEPTH:
                raise ValueError(f"line {line}: is nested more than {MAX_DEPTH} levels deep")
            is_mapping = isinstance(event, MappingStartEvent)
            open_collections.append(_OpenCollection(path, is_mapping, event.anchor, values - 1))
            if event.anchor:
                sizes[event.anchor] = 0
        elif isinstance(event, ScalarEvent) and event.anchor:
            sizes[event.anchor] = 1


def _events(text: str) -> Iterator[tuple[Event, int]]:
    """Nodes and ends of mappings and sequences, each with its line number, from 1."""
    documents = 0
    for event in yaml.parse(text, Loader=_LOADER):
        assert event.start_mark is not None
        line = event.start_mark.line + 1
        documents += isinstance(event, DocumentStartEvent)
        if documents > 1:
            raise ValueError(f"line {line}: begins a second document; give only one")
        if isinstance(event, NodeEvent | CollectionEndEvent):
            yield event, line


def _path_of_node(
    event: Event, open_collections: list[_OpenCollection], lines: dict[str, int], line: int
) -> str:
    """The path of a node, or '' for a key, whose line is added to ``lines``."""
    if not open_collections:
        return ""
    parent = open_collections[-1]
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


def _explain_yaml_error(error: yaml.YAMLError) -> str:
    """One line about what is wrong with the YAML of a file, with the line number."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        line = error.problem_mark.line + 1
        remedy = "check the colons, quotes and brackets before it"
        if "cannot start any token" in str(error.problem):
            remedy = (
                "indent with spaces, not tabs, and put text that begins with a symbol in quotes"
            )
        elif "tag" in str(error.problem):
            remedy = "only plain values are allowed"
        return f"line {line}: is not YAML ({error.problem}); {remedy}"
    return f"is not YAML ({' '.join(str(error).split())[:100]}); check the file"
