"""Tables for the terminal, and files for what a report found."""

import csv
import os
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_lightning.data.unicode import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Row = dict[str, str]
_WIDTH = 160  # characters of a line that is not for a terminal
_TEXT_WIDTH = 16  # characters that a column of texts has at least


def print_table(
    title: str, rows: Sequence[Row], *, texts: Collection[str] = (), lines: bool = False
) -> None:
    """``texts``: the columns that are read rather than compared, and fold; ``lines``: between the rows.

    Where the table is too wide for the terminal its names are broken and its gaps are narrow; where that is not
    enough and it has fewer rows than columns, a row becomes a column. Nothing is cut off. Control characters are
    escaped.
    """
    console = _console()
    rows = [{printable(name): printable(value) for name, value in row.items()} for row in rows]
    columns = list(rows[0])
    print(printable(title))
    for gap in (3, 2, 1):
        headers = columns if gap == 3 else [_broken(name, rows) for name in columns]
        needed = sum(_widths(rows, headers, texts)) + gap * len(columns) + gap - 2
        fits = needed <= console.width
        if fits or (gap == 1 and len(rows) >= len(columns)):
            console.print(_table(rows, headers, texts if fits else columns, lines, gap))
            break
    else:
        console.print(_turned(rows))


def print_texts(title: str, texts: Sequence[tuple[str, str]]) -> None:
    """Texts with their names, each folded to the width of the terminal."""
    width = min(_console().width, 100)
    print(title)
    for name, text in texts:
        print()
        for paragraph, indent in ((name, "  "), (" ".join(text.split()), "    ")):
            print(
                textwrap.fill(
                    printable(paragraph), width, initial_indent=indent, subsequent_indent=indent
                )
            )
    print()


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=_WIDTH)


def _widths(rows: Sequence[Row], headers: Sequence[str], texts: Collection[str]) -> list[int]:
    """What each column needs; of a column of texts only the least that can be read."""
    from rich.cells import cell_len

    widths = []
    for name, header in zip(rows[0], headers, strict=True):
        width = max(cell_len(line) for line in (*header.split("\n"), *(row[name] for row in rows)))
        widths.append(min(width, _TEXT_WIDTH) if name in texts else width)
    return widths


def _broken(name: str, rows: Sequence[Row]) -> str:
    """A column's name over several lines: as wide as its values, or as the longest part that is not broken."""
    longest = max(map(len, name.replace("-", "- ").split()))
    return textwrap.fill(name, max(longest, *(len(row[name]) for row in rows)))


def _table(
    rows: Sequence[Row], headers: Sequence[str], texts: Collection[str], lines: bool, gap: int
) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        show_lines=lines,
        show_edge=gap > 1,
        padding=(0, min(1, gap - 1)),
        collapse_padding=gap == 2,
        pad_edge=gap == 3,
    )
    for name, header in zip(rows[0], headers, strict=True):
        is_text = name in texts
        table.add_column(
            Text(header),
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))  # a user's text is not markup
    return table


def _turned(rows: Sequence[Row]) -> "Table":
    """The first column's values are the names of the columns, the other columns' names those of the rows."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    first, *others = rows[0]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(Text(first), overflow="fold")
    for row in rows:
        table.add_column(Text(row[first]), justify="right", overflow="fold")
    for name in others:
        table.add_row(Text(name), *(Text(row[name]) for row in rows))
    return table


def value_or_all(value: object) -> str:
    """A filter's setting as it is shown: none leaves all tokens."""
    return "all" if value is None else f"{value}"


def writable_folder(name: str) -> Path:
    """``--out``, made if need be; ``OSError`` where nothing can be written there."""
    folder = Path(os.path.expanduser(name))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out: {name} cannot be written ({error.strerror}); give another") from error
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    # a path that is not UTF-8 may be among the values
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
