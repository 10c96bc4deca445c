"""One process at a time trains a run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gpt_lightning.training import run_lock
from gpt_lightning.training.run_files import read_rows
from gpt_lightning.training.run_lock import LOCK, RunLock
from helpers import (
    SMALL_QUICKSTART,
    Command,
)
from runs import (
    RUN,
)


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def lock_of(pid: int, **changed: Any) -> dict[str, Any]:
    """Content of the lock of a process on this machine."""
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": "2026-01-01T00:00:00+00:00",
        "started": psutil.Process(pid).create_time(),
        "boot": run_lock._boot_id(),
        "namespace": run_lock._pid_namespace(),
        "job": "",
        "token": "x",
        **changed,
    }


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def write_lock(content: dict[str, Any] | str, age: float = 0.0) -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (RUN / LOCK).write_text(text, encoding="utf-8")
    os.utime(RUN / LOCK, (time.time() - age,) * 2)


def test_second_fit_of_a_run_is_refused_and_changes_nothing(
    command: Command, fit: Command, other: subprocess.Popen[bytes]
) -> None:
    fit("--trainer.max_steps=2")
    write_lock(lock_of(other.pid))
    before = {path: path.stat().st_mtime_ns for path in RUN.iterdir()}
    for arguments in (["--ckpt_path=last"], ["--ckpt_path=auto"], []):
        result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=4", *arguments)
        assert (result.code, result.out, result.error.count("\n")) == (2, "", 1)
        for part in (f"process {other.pid} on {socket.gethostname()}", "since 2026-01-01T00:00:00"):
            assert part in result.err
    assert {path: path.stat().st_mtime_ns for path in RUN.iterdir()} == before
    # commands that only read take no lock
    for verb in ("validate", "generate", "plan"):
        arguments = {
            "validate": ["--ckpt_path=last", "--run=quickstart"],
            "generate": [f"--from={RUN}", "--prompt=A", "--max_new_tokens=1"],
            "plan": [*SMALL_QUICKSTART],
        }[verb]
        assert command(verb, *arguments).code == 0
    # another run is not locked
    fit("--run=another", "--trainer.max_steps=1")


OTHER_HOST = {"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}


@pytest.mark.parametrize(
    "stale",
    [
        "a process that is gone",
        "its number has another process",
        "another boot",
        "another machine's heartbeat is old",
        "torn, and old",
    ],
)
def test_stale_lock_does_not_block(
    fit: Command, other: subprocess.Popen[bytes], stale: str
) -> None:
    content: dict[str, Any] | str = lock_of(other.pid)
    age = 0.0
    assert isinstance(content, dict)
    match stale:
        case "a process that is gone":
            other.kill()
            other.wait()
        case "its number has another process":
            content["started"] -= 100
        case "another boot":
            content["boot"] = "another"
        case "another machine's heartbeat is old":
            content, age = OTHER_HOST, 61.0
        case _:
            content, age = '{"ho', 61.0
    write_lock(content, age)
    fit("--trainer.max_steps=1")
    assert not (RUN / LOCK).exists()
    assert not list(RUN.glob(f"{LOCK}*"))


@pytest.mark.parametrize("held", ["another machine", "another container", "torn", "a zombie"])
def test_recent_heartbeat_of_a_process_elsewhere_blocks(
    command: Command, fit: Command, other: subprocess.Popen[bytes], held: str
) -> None:
    match held:
        case "another machine":
            write_lock(OTHER_HOST, 50.0)
        case "another container":
            write_lock(lock_of(other.pid, namespace="pid:[1]"), 50.0)
        case "torn":
            write_lock('{"ho', 50.0)
        case _:  # a process of this machine that ended but still has an entry
            write_lock(lock_of(other.pid))
            zombie = psutil.Process(other.pid)
            zombie.kill()
            wait_until(lambda: zombie.status() == psutil.STATUS_ZOMBIE)
            fit("--trainer.max_steps=1")
            return
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1")
    assert result.code == 2
    assert "is being trained by process" in result.err


def test_one_of_many_simultaneous_starts_gets_the_lock(tmp_path: Path) -> None:
    """All of them may find the same stale lock."""
    for round_ in range(20):
        folder = tmp_path / str(round_)
        if round_ % 2:
            folder.mkdir()
            (folder / LOCK).write_text(json.dumps(lock_of(os.getpid(), boot="another")))
        locks = [RunLock() for _ in range(8)]
        barrier, refused = threading.Barrier(8), []

        def begin(
            lock: RunLock,
            folder: Path = folder,
            barrier: threading.Barrier = barrier,
            refused: list[str] = refused,
        ) -> None:
            barrier.wait()
            try:
                lock.acquire(folder)
            except ValueError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=begin, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 7
        for lock in locks:
            lock.release()
        assert not folder.exists() or not list(folder.iterdir())


def test_restart_by_torchrun_gets_the_lock_of_its_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[bytes]
) -> None:
    """The previous process may have died on another machine."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    for holder in (OTHER_HOST, lock_of(other.pid)):
        (tmp_path / LOCK).write_text(json.dumps({**holder, "job": "job-7"}))
        with RunLock() as lock:
            lock.acquire(tmp_path)
        (tmp_path / LOCK).write_text(json.dumps({**holder, "job": "job-8"}))
        with RunLock() as lock, pytest.raises(ValueError, match="is being trained"):
            lock.acquire(tmp_path)


@pytest.mark.usefixtures("messages")
def test_holder_renews_its_heartbeat_and_reports_a_lost_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / LOCK
    with RunLock() as lock:
        lock.acquire(tmp_path)
        os.utime(path, (1, 1))
        wait_until(lambda: path.stat().st_mtime > 2)
        path.write_text(json.dumps(OTHER_HOST))
        wait_until(lambda: "now belongs to another process" in capsys.readouterr().err)
    assert path.exists()  # it is not ours to remove


@pytest.mark.slow
def test_one_of_two_simultaneous_fits_is_refused(tmp_path: Path) -> None:
    """Through the command: one trains the run, the other is refused."""
    arguments = [sys.executable, "-m", "gpt_lightning", "fit", *SMALL_QUICKSTART,
                 "--trainer.max_steps=40", "--trainer.max_epochs=-1", "--ckpt_path=auto"]  # fmt: skip
    both = [
        subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    output = [process.communicate(timeout=300) for process in both]
    codes = sorted(process.returncode for process in both)
    if codes == [0, 0]:  # they did not overlap: the second found the run finished
        assert any("already finished" in err for _, err in output)
    else:
        assert codes == [0, 2]
        assert any("is being trained by process" in err for _, err in output)
    rows = read_rows(tmp_path / RUN / "metrics.csv")
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 20]
    assert [row["step"] for row in rows if "train/loss" in row] == [9, 19, 29, 39]
