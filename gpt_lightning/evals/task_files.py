"""Files of the tasks: HellaSwag and other multiple choice, LAMBADA, WikiText.

The texts become those that lm-evaluation-harness gives to a model. Files may be compressed (bzip2, gzip).
"""

import bz2
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from gpt_lightning.data.unicode import decode_text, utf8_text

Example = TypeVar("Example")

LINES_PER_TASK = 6  # of HellaSwag's text form: context, label, four endings

# how WikiText's tokens become text again: pairs of old and new, in this order
_SPACED = (("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."))
_PUNCTUATION = tuple((f" {mark} ", f"{mark} ") for mark in ":;.!?,")
# The harness has \s* for \s*+. The results are the same, because what follows is never a blank. With \s* an open
# bracket before N blanks takes N³ steps.
_BRACKETS = (
    (r"\(\s*+([^\)]*?)\s*+\)", r"(\1)"),
    (r"\[\s*+([^\]]*?)\s*+\]", r"[\1]"),
    (r"{\s*+([^}]*?)\s*+}", r"{\1}"),
    (r"\"\s*+([^\"]*?)\s*+\"", r'"\1"'),
    (r"'\s*+([^']*?)\s*+'", r"'\1'"),
)
_OTHERS = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


@dataclass(frozen=True)
class ChoiceExample:
    """A context with endings, of which one is right.

    Attributes:
        label: Index of the right ending.
    """

    context: str
    endings: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class LastWordExample:
    """A text without its last word, and that word."""

    context: str
    word: str


def read_choices(name: str) -> list[ChoiceExample]:
    """Examples of a multiple-choice file.

    The file has JSON lines with ``endings``, ``label``, and either ``ctx`` or HellaSwag's ``activity_label``,
    ``ctx_a`` and ``ctx_b``. Or it has six lines per example: context, label, four endings.

    Raises:
        ValueError, OSError: The file cannot be read, or an example is damaged; the message has its line.
    """
    text = _read_text(name)
    read = _json_choices if text.lstrip().startswith("{") else _six_line_choices
    return _at_least_one(read(name, text), name)


def read_last_words(name: str) -> list[LastWordExample]:
    """Examples of LAMBADA's form: JSON lines with ``text``. Errors are those of :func:`read_choices`."""
    examples = []
    for where, row in _json_lines(name, _read_text(name)):
        context, space, word = _field(row, "text", str, where).rpartition(" ")
        if not space or not word.strip():
            raise ValueError(f"{where}: text does not end with a blank and a word; correct it")
        examples.append(LastWordExample(context, word))
    return _at_least_one(examples, name)


def read_pages(name: str) -> list[str]:
    """Pages of a file of WikiText. A page begins with its title, `` = Title = ``.

    Errors are those of :func:`read_choices`.
    """
    pages: list[list[str]] = [[]]
    for line in _read_text(name).split("\n"):
        if _is_title(line):
            pages.append([])
        pages[-1].append(line)
    return _at_least_one([text for page in pages if (text := "\n".join(page)).strip()], name)


def detokenize_wikitext(page: str) -> str:
    """A page of WikiText as plain text: no blanks before punctuation, no ``@-@``."""
    for old, new in (*_SPACED, *_PUNCTUATION):
        page = page.replace(old, new)
    for pattern, replacement in _BRACKETS:
        page = re.sub(pattern, replacement, page)
    for old, new in _OTHERS:
        page = page.replace(old, new)
    return page


def hellaswag_text(text: str) -> str:
    """A text of HellaSwag without the marks of WikiHow, such as ``[header]``."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _is_title(line: str) -> bool:
    """Whether a line is the title of a page, and not of a section (`` = = Section = = ``)."""
    line = line.replace("= = =", "===").replace("= =", "==").strip()
    return line.startswith("= ") and line.endswith(" =")


def _json_choices(name: str, text: str) -> list[ChoiceExample]:
    examples = []
    for where, row in _json_lines(name, text):
        endings = _field(row, "endings", list, where)
        if not all(isinstance(ending, str) for ending in endings):
            raise ValueError(f"{where}: endings are not all text; put them in quotes")
        endings = [_valid_text(ending, f"ending {i}", where) for i, ending in enumerate(endings)]
        if "ctx_a" in row:
            activity, first, second = (
                _field(row, key, str, where) for key in ("activity_label", "ctx_a", "ctx_b")
            )
            context = hellaswag_text(f"{activity}: {first} {second.capitalize()}")
            endings = [hellaswag_text(ending) for ending in endings]
        else:
            context = _field(row, "ctx", str, where)
        examples.append(_choice(context, endings, row.get("label"), where))
    return examples


def _six_line_choices(name: str, text: str) -> list[ChoiceExample]:
    lines = text.rstrip("\n").split("\n") if text.strip() else []
    if len(lines) % LINES_PER_TASK:
        raise ValueError(
            f"{name}: is neither JSON lines nor {LINES_PER_TASK} lines per example ({len(lines)} lines); "
            "give a complete file"
        )
    return [
        _choice(lines[i], lines[i + 2 : i + 6], lines[i + 1], f"{name}, lines {i + 1} to {i + 6}")
        for i in range(0, len(lines), LINES_PER_TASK)
    ]


def _choice(context: str, endings: list[str], label: object, where: str) -> ChoiceExample:
    """The checked example."""
    if len(endings) < 2:
        raise ValueError(f"{where}: has fewer than two endings; correct it")
    for number, ending in enumerate(endings):
        if not ending.strip():
            raise ValueError(f"{where}: ending {number} is empty; correct it")
    digits = str(label) if isinstance(label, int | str) and not isinstance(label, bool) else ""
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) >= len(endings):
        shown = (
            "missing" if label in (None, "") else f"{label!r:.20}, outside 0 to {len(endings) - 1}"
        )
        raise ValueError(f"{where}: label is {shown}; correct it")
    return ChoiceExample(context, tuple(endings), int(digits))


def _json_lines(name: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of JSON lines, and where they are, for messages. Blank lines are passed over."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            too_deep = isinstance(error, RecursionError)
            cause = "nested too deeply" if too_deep else "a number with too many digits"
            cause = getattr(error, "msg", cause)
            raise ValueError(f"{where}: is not JSON ({cause}); give an intact file") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: is not a JSON object; give one object per line")
        yield where, row


def _field(row: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """The value of ``key``, which must be of a type."""
    if key not in row:
        raise ValueError(f"{where}: has no {key}; give a file of this task")
    if not isinstance(row[key], kind):
        raise ValueError(
            f"{where}: {key} is not {'a list' if kind is list else 'text'}; correct it"
        )
    return _valid_text(row[key], key, where) if kind is str else row[key]


def _valid_text(text: str, what: str, where: str) -> str:
    """The text of a JSON string, in which an escape such as ``\\ud800`` may stand for half a character."""
    try:
        return utf8_text(text)
    except ValueError as error:
        raise ValueError(f"{where}: {what} {error}; correct it") from error


def _at_least_one(examples: list[Example], name: str) -> list[Example]:
    if not examples:
        raise ValueError(f"{name}: has no examples; give a file of this task")
    return examples


def _read_text(name: str) -> str:
    """The text of a UTF-8 file, uncompressed."""
    path = Path(os.path.expanduser(name))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise OSError(f"file: {name} cannot be read ({error.strerror}); give another") from error
    try:
        if content.startswith(b"BZh"):
            content = bz2.decompress(content)
        elif content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"file: {name} is damaged ({error}); give an intact copy") from error
    try:
        return decode_text(content)
    except ValueError as error:
        raise ValueError(f"file: {name} {error}; convert it to UTF-8") from error
