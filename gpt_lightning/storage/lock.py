"""Lock file of a folder that only one process at a time writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Hold the lock ``path`` and remove its file at the end.

    Raises:
        filelock.Timeout: Another process holds it.
    """
    lock = FileLock(path, timeout=0)
    lock.acquire()
    try:
        yield
    finally:
        # while it is held: after the release it may be the lock of another process
        is_removed = _remove(path)
        lock.release()
        if not is_removed:
            _remove(path)


def _remove(path: Path) -> bool:
    """Remove a lock file; ``False`` on Windows while a process, this or another one, holds the lock."""
    try:
        path.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True
