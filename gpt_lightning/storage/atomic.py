"""Files and folders that are complete under their name, or not there at all, even after a power cut."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_output(
    dest: Path, *, concurrent: bool = False, overwrite: bool = True, durable: bool = True
) -> Iterator[Path]:
    """Temporary path beside ``dest``, to write a file or a folder under; at the end it is renamed to ``dest``.

    It is removed if an error is raised.

    Args:
        concurrent: Whether several processes may write ``dest`` at once; each then has another temporary path.
        overwrite: Whether a file ``dest`` is replaced. A folder replaces only an empty folder.
        durable: Whether the content is on the disk before it gets its name. Without it a power cut may
            leave an empty file, which is enough for what can be computed again.

    Raises:
        FileExistsError: ``dest`` exists, and ``overwrite`` is False.
        OSError: It cannot be written.
    """
    temporary = process_path(dest) if concurrent else temporary_path(dest)
    try:
        yield temporary
        move_into_place(temporary, dest, overwrite=overwrite, durable=durable)
    finally:
        remove(temporary)


def move_into_place(
    temporary: Path, dest: Path, *, overwrite: bool = True, durable: bool = True
) -> None:
    """Rename a complete file or folder to ``dest`` beside it; arguments as for :func:`atomic_output`."""
    if durable:
        _fsync_all(temporary)
    if not overwrite and os.path.lexists(dest):
        raise FileExistsError(f"{dest} exists")
    os.replace(temporary, dest)
    if durable:
        fsync(dest.parent)  # a rename is durable when its folder is


@contextmanager
def created_folder(folder: Path) -> Iterator[None]:
    """Create a folder with its missing parents. At the end, those that are still empty are removed."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for path in missing:
            with suppress(OSError):  # it is not empty
                path.rmdir()


def write_text(dest: Path, text: str, *, concurrent: bool = False, durable: bool = True) -> None:
    """A UTF-8 file, by :func:`atomic_output`."""
    with atomic_output(dest, concurrent=concurrent, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8")


def temporary_path(dest: Path) -> Path:
    """Where ``dest`` is written before it has its name."""
    return dest.with_name(f".{dest.name}.tmp")


def process_path(dest: Path) -> Path:
    """Where this process writes ``dest`` while others may write it too."""
    return dest.with_name(f".{dest.name}.{os.getpid()}.tmp")


def fsync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_all(path: Path) -> None:
    if path.is_dir():
        for inner in sorted(path.rglob("*")):
            fsync(inner)
    fsync(path)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
