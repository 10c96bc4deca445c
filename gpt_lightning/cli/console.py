"""Tables and progress bars on the terminal, and the files that a command writes for its report."""

import csv
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_lightning.data.unicode import printable
from gpt_lightning.storage.atomic import created_folder

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

logger = logging.getLogger(__name__)

Row = dict[str, str]
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal
_WIDTH = 160  # characters of a table that is not on a terminal
_MIN_TEXT_WIDTH = 16  # characters of a text column


def print_table(
    title: str, rows: Sequence[Row], *, texts: Collection[str] = (), lines: bool = False
) -> None:
    """Print a table that fits the terminal. Nothing is cut off, and control characters are escaped.

    If the table is too wide, its headers are wrapped and its gaps get narrower. If that is not enough and it has
    fewer rows than columns, rows and columns are swapped.

    Args:
        texts: The columns with text, which may wrap.
        lines: Draw lines between the rows.
    """
    console = _console()
    rows = [{printable(name): printable(value) for name, value in row.items()} for row in rows]
    columns = list(rows[0])
    print(printable(title))
    for gap in (3, 2, 1):
        headers = columns if gap == 3 else [_wrapped_header(name, rows) for name in columns]
        needed = sum(_widths(rows, headers, texts)) + gap * len(columns) + gap - 2
        fits = needed <= console.width
        if fits or (gap == 1 and len(rows) >= len(columns)):
            console.print(_table(rows, headers, texts if fits else columns, lines, gap))
            break
    else:
        console.print(_transposed(rows))


def without(row: Row, columns: Collection[str]) -> Row:
    """The row without some columns."""
    return {name: value for name, value in row.items() if name not in columns}


def print_texts(title: str, texts: Sequence[tuple[str, str]]) -> None:
    """Print texts with their names, wrapped to the width of the terminal."""
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
    """The width that each column needs. A column of texts can be as narrow as ``_MIN_TEXT_WIDTH``."""
    from rich.cells import cell_len

    widths = []
    for name, header in zip(rows[0], headers, strict=True):
        width = max(cell_len(line) for line in (*header.split("\n"), *(row[name] for row in rows)))
        widths.append(min(width, _MIN_TEXT_WIDTH) if name in texts else width)
    return widths


def _wrapped_header(name: str, rows: Sequence[Row]) -> str:
    """A column's name in several lines: as wide as the values, or as the longest word of the name."""
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
        table.add_row(*(Text(value) for value in row.values()))  # Text: not parsed as markup
    return table


def _transposed(rows: Sequence[Row]) -> "Table":
    """The table with one column for each row. The first value of a row is the name of its column."""
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


def byte_progress() -> "Progress":
    """A progress bar in bytes on standard error. It is disabled if that is not a terminal, or with ``--quiet``."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=_stderr_console(),
        disable=not _draws_progress(),
    )


@contextmanager
def progress(unit: str, total: int) -> Iterator[Callable[[], None]]:
    """Show the progress of ``total`` units: a bar on a terminal, otherwise a line now and then.

    Yields:
        A function to call after each unit.
    """
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        show(done, "")

    with progress_to(unit, total) as show:
        yield advance


@contextmanager
def progress_to(unit: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Show how many of ``total`` units are done, as :func:`progress` does.

    Yields:
        A function to call with the number, and with text to show beside it.
    """
    from rich.progress import Progress

    last_line = time.monotonic()

    def show(done: int, text: str) -> None:
        nonlocal last_line
        bar.update(task, completed=done, description=unit + text)
        if bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            logger.info(f"{done} of {total} {unit}{text}")

    with Progress(console=_stderr_console(), disable=not _draws_progress()) as bar:
        task = bar.add_task(unit, total=total)
        yield show


def _stderr_console() -> "Console":
    """Standard error without the escapes of ``cli/streams.py``, which would show a bar's control characters."""
    from rich.console import Console

    return Console(file=getattr(sys.stderr, "unescaped", sys.stderr))


def _draws_progress() -> bool:
    return sys.stderr.isatty() and logger.isEnabledFor(logging.INFO)


@contextmanager
def output_folder(name: str) -> Iterator[Path]:
    """The folder of ``--out``, created if necessary. A command that fails before it writes leaves no new folder.

    Raises:
        OSError: No file can be written there.
    """
    folder = Path(os.path.expanduser(name))
    with ExitStack() as stack:
        try:
            stack.enter_context(created_folder(folder))
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise OSError(
                f"out: {name} cannot be written ({error.strerror}); give another"
            ) from error
        yield folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write the rows as CSV, with their keys as header."""
    # a value may be a path that is not UTF-8
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
