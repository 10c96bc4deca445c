"""Lock files."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from gpt_lightning.storage.lock import lock_file


def test_lock_is_held_and_then_removed(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock_file(path):
        with pytest.raises(Timeout), lock_file(path):
            pass
        assert path.exists()
    assert not path.exists()
    with lock_file(path):
        pass


def test_lock_is_removed_after_its_release_where_an_open_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ".lock"
    real = os.unlink

    def refuse_while_open(file: Any, *rest: Any, **settings: Any) -> None:
        links = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
        if os.path.realpath(file) in links:
            raise PermissionError(errno.EACCES, "used by another process", file)
        real(file, *rest, **settings)

    monkeypatch.setattr(os, "unlink", refuse_while_open)
    with lock_file(path):
        pass
    assert not path.exists()
    with lock_file(path):
        other = FileLock(path, timeout=0)
        with pytest.raises(Timeout):
            other.acquire()
    assert not path.exists()
