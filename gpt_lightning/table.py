"""Tables that a notebook shows as HTML.

The module is at the top of the package because training and reports both use it, and neither imports the other.
"""

import html
from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsIndex, TypeVar, final, overload

from gpt_lightning.data.unicode import printable

ALL = "all"  # a filter that keeps all tokens
MAX_ROWS = 60  # a table of a whole vocabulary would stop the browser


class AsText(Protocol):
    """Row of a table."""

    def as_text(self) -> dict[str, str]:
        """Return the cells by the names of their columns."""
        ...


Row = TypeVar("Row", bound=AsText)


@final
class Table(list[Row]):
    """List that a notebook shows as a table. A part, such as ``table[:5]``, is a table too.

    The notebook's table has no column for a filter that keeps all tokens in every row.
    """

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> "Table[Row]": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Row | Table[Row]":
        if isinstance(index, slice):
            return Table(super().__getitem__(index))
        return super().__getitem__(index)

    def _repr_html_(self) -> str:
        rows = [row.as_text() for row in self[:MAX_ROWS]]
        used = {name for row in rows for name, text in row.items() if text != ALL}
        shown = html_table([{name: row[name] for name in row if name in used} for row in rows])
        more = len(self) - MAX_ROWS
        return f"{shown}<p>and {more:,} more rows</p>" if more > 0 else shown


def value_or_all(value: object) -> str:
    """Return the text of a filter's setting: ``None`` keeps all tokens."""
    return ALL if value is None else f"{value}"


def html_table(rows: Sequence[dict[str, str]]) -> str:
    """Return the rows as an HTML table, with the keys of the first row as its head."""
    if not rows:
        return "<p>no rows</p>"
    head = _html_row("th", rows[0])
    body = "".join(_html_row("td", row.values()) for row in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table>"


def _html_row(tag: str, cells: Iterable[str]) -> str:
    parts = (f"<{tag}>{html.escape(printable(cell))}</{tag}>" for cell in cells)
    return f"<tr>{''.join(parts)}</tr>"
