"""Format of complete help texts, also for the configuration page: types and values as in YAML, no markup."""

import re
from argparse import Action

from jsonargparse import DefaultHelpFormatter


class HelpFormatter(DefaultHelpFormatter):
    """Formatter that writes ``int or null`` and ``true`` instead of ``Optional[int]`` and ``True``."""

    def _get_type_str(self, action: Action) -> str | None:
        kind = super()._get_type_str(action)
        return None if kind is None else readable_type(kind)

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        if isinstance(action.default, bool):
            text = text.replace("%(default)s", str(action.default).lower())
        if action.nargs == 0:  # a flag: its default says nothing
            text = text.replace(" (default: false)", "")
        return _plain_text(text)


def readable_type(kind: str) -> str:
    """``Union[Literal['a', 'b'], null]`` → ``a or b or null``; ``Optional[int]`` → ``int or null``."""
    if match := re.fullmatch(r"Optional\[(.*)\]", kind):
        kind = f"Union[{match[1]}, null]"
    if match := re.fullmatch(r"Union\[(.*)\]", kind):
        kind = " | ".join(_split(", ", match[1]))
    parts = []
    for part in _split(r" \| ", kind):
        if match := re.fullmatch(r"Literal\[(.*)\]", part):
            part = " or ".join(value.strip("'") for value in _split(", ", match[1]))
        parts.append(part)
    return " or ".join(parts).replace(" | ", " or ")


def _split(separator: str, text: str) -> list[str]:
    """Split at the separators that are not in brackets."""
    return re.split(rf"{separator}(?![^\[]*\])", text)


def _plain_text(text: str) -> str:
    """Remove Lightning's reStructuredText, and the default where it is in the text and after it."""
    text = re.sub(r":\w+:`~?([\w.]+)`", lambda match: f"`{match[1].rpartition('.')[2]}`", text)
    return re.sub(r" ?Default: ``[^`]*``\.", "", text).replace("``", "`")
