"""Tables for the terminal, and files for what a report found."""

import csv
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gpt_lightning.data.folders import user_path


def print_table(
    title: str, rows: list[dict[str, str]], *, texts: Collection[str] = (), lines: bool = False
) -> None:
    """``texts``: the columns that are read rather than compared; ``lines``: between the rows."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(title)
    table = Table(box=box.SIMPLE_HEAD, show_lines=lines)
    for name in rows[0]:
        text = name in texts
        table.add_column(
            Text(name), justify="left" if text else "right", no_wrap=not text, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))  # a user's text is no markup
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)


def all_or(value: object) -> str:
    """A filter's setting as it is shown: none leaves all tokens."""
    return "all" if value is None else f"{value}"


def writable_folder(name: str) -> Path:
    """``--out``, made if need be; ``OSError`` where nothing can be written there."""
    folder = user_path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out: {name} cannot be written ({error.strerror}); give another") from error
    return folder


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
