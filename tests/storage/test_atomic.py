"""Atomic writes: a file or folder appears complete or not at all."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.storage import atomic
from gpt_lightning.storage.atomic import atomic_output, fsync_folder, temporary_path, write_text


def test_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    dest = tmp_path / "a.txt"
    dest.write_text("before")

    def fail() -> None:
        with atomic_output(dest) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert dest.read_text() == "before"
    with atomic_output(dest) as temporary:
        assert temporary == temporary_path(dest)
        temporary.write_text("after")
        assert dest.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert dest.read_text() == "after"


def test_folder_appears_complete_and_does_not_replace_another(tmp_path: Path) -> None:
    dest = tmp_path / "folder"

    def write(content: str) -> None:
        with atomic_output(dest, overwrite=False) as temporary:
            temporary.mkdir()
            (temporary / "a.txt").write_text(content)
            assert not dest.exists() or (dest / "a.txt").read_text() == "first"

    write("first")
    with pytest.raises(FileExistsError):
        write("second")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
    assert (dest / "a.txt").read_text() == "first"


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def name_of(what: Any) -> str:
        if not isinstance(what, int):
            return Path(what).name
        paths = (tmp_path, *tmp_path.rglob("*"))
        return next(p.name for p in paths if os.path.samestat(p.stat(), os.fstat(what)))

    def recorded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(what: Any, *rest: Any) -> Any:
            calls.append(f"{name} {name_of(what)}")
            return real(what, *rest)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, recorded(name, getattr(os, name)))
    write_text(tmp_path / "a.txt", "content")
    assert calls == ["fsync .a.txt.tmp", "replace .a.txt.tmp", f"fsync {tmp_path.name}"]
    calls.clear()
    with atomic_output(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "b.txt").write_text("content")
    assert calls == [
        "fsync b.txt", "fsync .folder.tmp", "replace .folder.tmp", f"fsync {tmp_path.name}",
    ]  # fmt: skip


def test_processes_write_under_different_temporary_paths(tmp_path: Path) -> None:
    with atomic_output(tmp_path / "a", concurrent=True) as temporary:
        assert temporary.name == f".a.{os.getpid()}.tmp"
        temporary.write_text("content")
    assert (tmp_path / "a").read_text() == "content"


# --- what Windows refuses -------------------------------------------------------------------------


def refuse_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refused(path: Any, *rest: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refused)


def test_system_that_opens_no_folder_writes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_folders(monkeypatch)
    write_text(tmp_path / "a.txt", "content")
    with atomic_output(tmp_path / "folder") as temporary:
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / "b.txt").write_text("content")
    assert (tmp_path / "a.txt").read_text() == "content"
    assert (tmp_path / "folder" / "inner" / "b.txt").read_text() == "content"


def test_folder_that_may_not_be_read_is_still_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere a folder that cannot be synced makes a rename that may be lost."""
    refuse_folders(monkeypatch)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError):
        fsync_folder(tmp_path)


def test_files_are_synced_by_a_descriptor_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    modes = []
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(
        (os.path.isdir(f"/proc/self/fd/{fd}"), fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE)))  # fmt: skip
    write_text(tmp_path / "a.txt", "content")
    assert modes == [(False, os.O_RDWR), (True, os.O_RDONLY)]


def test_replacing_a_file_that_is_open_elsewhere_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refusals = os.replace, 3

    def refused(source: Any, dest: Any) -> None:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise PermissionError(errno.EACCES, "Access is denied", dest)
        real(source, dest)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):  # on this system a refusal is final
        write_text(tmp_path / "a.txt", "first")
    assert refusals == 2
    monkeypatch.setattr(atomic, "RETRY_SECONDS", 60.0)
    write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
