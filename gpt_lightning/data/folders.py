"""Files of a folder that are read: one rule for ``data.text`` and ``prepare``."""

import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from gpt_lightning.data.unicode import printable

logger = logging.getLogger(__name__)


def files_in(folder: Path, is_read: Callable[[Path], bool]) -> list[Path]:
    """A folder's files that ``is_read`` accepts, in the order of their paths, subfolders included.

    Links are followed. A file with several names is read once, under the first of them. Hidden files and
    folders (``.git``, ``.ipynb_checkpoints``, macOS's ``._book.txt``) are left out. A warning names both once.

    Raises:
        OSError: A subfolder cannot be read.
    """
    paths, hidden = _walk(folder, is_read)
    files = without_duplicates(paths)
    if files:
        duplicates = tuple(path for path in paths if path not in set(files))
        _warn_of_left_out(folder, tuple(sorted(hidden)), duplicates)
    return files


def without_duplicates(paths: Iterable[Path]) -> list[Path]:
    """The first path of each file; symbolic and hard links are further paths of the same file."""
    first: dict[object, Path] = {}
    for path in paths:
        first.setdefault(_identity(path), path)
    return list(first.values())


def _identity(path: Path) -> object:
    state = path.stat()
    # some network file systems have no inode numbers
    return (state.st_dev, state.st_ino) if state.st_ino else path.resolve()


def _walk(folder: Path, is_read: Callable[[Path], bool]) -> tuple[list[Path], list[Path]]:
    """Files to read, sorted by path, and hidden files and folders. No folder is entered twice."""
    seen: set[str] = set()
    paths: list[Path] = []
    hidden: list[Path] = []
    for name, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(name)) in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden += [Path(name, each) for each in folders if each.startswith(".")]
        folders[:] = sorted(each for each in folders if not each.startswith("."))
        for path in (Path(name, each) for each in names if is_read(Path(each))):
            if path.name.startswith("."):
                hidden.append(path)
            elif path.is_file():
                paths.append(path)
    return sorted(paths), hidden


def _raise(error: OSError) -> None:
    raise error


@cache
def _warn_of_left_out(folder: Path, hidden: tuple[Path, ...], duplicates: tuple[Path, ...]) -> None:
    parts = []
    if hidden:
        what = "file or folder" if len(hidden) == 1 else "files or folders"
        parts.append(f"{len(hidden)} hidden {what} ({_first_names(hidden)})")
    if duplicates:
        what = "link to a file" if len(duplicates) == 1 else "links to files"
        parts.append(f"{len(duplicates)} {what} already read ({_first_names(duplicates)})")
    if parts:
        line = f"{folder}: left out: {', '.join(parts)}"
        logger.warning(printable(line))


def _first_names(paths: tuple[Path, ...]) -> str:
    names = ", ".join(path.name for path in paths[:3])
    return f"{names}, …" if len(paths) > 3 else names
