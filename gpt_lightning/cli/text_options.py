"""Options whose values are texts or lists of texts, on the command line and in YAML files."""

from argparse import Action
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.data.unicode import clean_text, utf8_text

# options whose text goes to the tokenizer and must be UTF-8; paths are not here, since they may be any bytes
_TEXTS = ("prompt", "evaluation.prompt", "stop", "token", "tokens", "add_tokens")
_PROMPTS = ("prompt", "evaluation.prompt")


class TextList(Action):
    """An option with several texts: repeated on the command line, a text or a list in a YAML file.

    The texts of the command line replace those of the file and are not parsed as YAML. ``nargs="+"`` allows
    several texts after one option. :func:`normalize_texts` checks the texts of a file.
    """

    _texts: list[str] | None = None

    def __call__(
        self,
        parser: object,
        namespace: Any,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        new = [values] if isinstance(values, str) else list(values or ())
        previous: list[str] | None = getattr(namespace, self.dest, None)
        if previous is not None and previous is self._texts:
            new = previous + new  # any other list comes from a file or an earlier parse
        self._texts = new
        setattr(namespace, self.dest, self._texts)


def normalize_texts(parser: ArgumentParser, settings: Namespace) -> None:
    """Make each :class:`TextList` a list of texts or ``None``, and check all options with text.

    Raises:
        ValueError: A value is not text, or not valid UTF-8.
    """
    for action in parser._actions:
        if isinstance(action, TextList):
            settings[action.dest] = _as_list(action.dest, settings[action.dest])
    for name in _TEXTS:
        value = settings.get(name)
        if isinstance(value, str):
            settings[name] = _checked(name, value)
        elif isinstance(value, list):
            settings[name] = [_checked(name, text) for text in value]


def _as_list(name: str, value: object) -> list[str] | None:
    if value is None:
        return None
    texts: list[str] = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str):
            raise ValueError(f"{name}: {text!r} is not text; put it in quotes")
        texts.append(text)
    return texts


def _checked(name: str, text: str) -> str:
    try:
        text = utf8_text(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; give valid UTF-8") from error
    return clean_text(text) if name in _PROMPTS else text


# --- the command line and --config ------------------------------------------------------------------


def configs_first(parser: ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with each ``--config FILE`` first, so that other arguments always have priority."""
    configs: list[str] = []
    others: list[str] = []
    for group, is_config in _split(parser, arguments):
        (configs if is_config else others).extend(group)
    return configs + others


def check_argument_texts(arguments: Sequence[str]) -> None:
    """Check the texts of the command line before it is parsed: the parser's errors do not name the option.

    Raises:
        ValueError: A text is not valid UTF-8.
    """
    for name in _TEXTS:
        for text in values_of(f"--{name}", arguments):
            _checked(name, text)


def values_of(option: str, arguments: Sequence[str], *aliases: str) -> list[str]:
    """The values of an option on the command line, in their order, without those of a YAML file."""
    values = []
    for before, argument in pairwise(["", *arguments]):
        name, equals, value = argument.partition("=")
        if before in (option, *aliases):
            values.append(argument)
        elif equals and name in (option, *aliases):
            values.append(value)
    return values


def _split(parser: ArgumentParser, arguments: Sequence[str]) -> Iterator[tuple[list[str], bool]]:
    """Groups of arguments in their order, and whether a group is ``--config FILE``."""
    action = parser._option_string_actions.get("--config")
    flags = () if action is None else tuple(action.option_strings)
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            yield [argument, *rest], False
        elif argument in flags:
            yield [argument, *([value] if (value := next(rest, None)) is not None else [])], True
        else:
            yield [argument], argument.startswith(tuple(f"{flag}=" for flag in flags))
