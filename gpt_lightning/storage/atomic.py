"""Files and folders that are complete under their name, or not there at all, even after a power cut."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Windows refuses to replace a file while another program has it open, as virus scanners do for a moment
RETRY_SECONDS = 2.0 if os.name == "nt" else 0.0


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
    replace(temporary, dest)
    if durable:
        fsync_folder(dest.parent)  # a rename is durable when its folder is


def replace(source: Path, dest: Path) -> None:
    """Rename a file or folder to ``dest``; on Windows, try again for :data:`RETRY_SECONDS` if it is refused."""
    end = time.monotonic() + RETRY_SECONDS
    while True:
        try:
            os.replace(source, dest)
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.02)


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
    """A UTF-8 file with the same bytes on every system, by :func:`atomic_output`."""
    with atomic_output(dest, concurrent=concurrent, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def temporary_path(dest: Path) -> Path:
    """Where ``dest`` is written before it has its name."""
    return dest.with_name(f".{dest.name}.tmp")


def process_path(dest: Path) -> Path:
    """Where this process writes ``dest`` while others may write it too."""
    return dest.with_name(f".{dest.name}.{os.getpid()}.tmp")


def fsync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system has a call for it.

    Windows opens no folder. There NTFS keeps a journal of renames, so after a power cut a name has its old file or
    its new one.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        if os.access(folder, os.R_OK):  # the system refuses every folder, not this one
            return
        raise
    _fsync_and_close(descriptor)


def _fsync_all(path: Path) -> None:
    """Wait until a file, or a folder with everything in it, is on the disk."""
    if not path.is_dir():
        _fsync_and_close(os.open(path, os.O_RDWR))  # Windows syncs only what is open for writing
        return
    for inner in sorted(path.iterdir()):
        _fsync_all(inner)
    fsync_folder(path)


def _fsync_and_close(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
