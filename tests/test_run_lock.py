"""One process at a time trains a run; what is left over from others does not disturb it."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, SMALL, Command, python

from gpt_lightning.cli.launcher import remove_stale_ranks
from gpt_lightning.training import run_lock
from gpt_lightning.training.run_lock import LOCK, RunLock

QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
RUN = Path("checkpoints/quickstart")
OTHER_HOST = {"host": "elsewhere", "pid": 1, "since": "2026-01-01T00:00:00+00:00"}


@pytest.fixture
def other() -> Iterator[subprocess.Popen[bytes]]:
    """Another process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def lock_of(pid: int, **changed: Any) -> dict[str, Any]:
    """What a process on this machine writes into its lock."""
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


def write_lock(content: dict[str, Any] | str, age: float = 0.0) -> None:
    RUN.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (RUN / LOCK).write_text(text, encoding="utf-8")
    os.utime(RUN / LOCK, (time.time() - age,) * 2)


def test_a_second_fit_of_a_run_is_refused_and_changes_nothing(
    command: Command, fit: Command, other: subprocess.Popen[bytes]
) -> None:
    fit("--trainer.max_steps=2")
    write_lock(lock_of(other.pid))
    before = {path: path.stat().st_mtime_ns for path in RUN.iterdir()}
    for arguments in (["--ckpt_path=last"], ["--ckpt_path=auto"], []):
        done = command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=4", *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
        for part in (f"process {other.pid} on {socket.gethostname()}", "since 2026-01-01T00:00:00"):
            assert part in done.err
    assert {path: path.stat().st_mtime_ns for path in RUN.iterdir()} == before
    # commands that only read take no lock
    for verb in ("validate", "generate", "plan"):
        arguments = {
            "validate": ["--ckpt_path=last", "--run=quickstart"],
            "generate": [f"--from={RUN}", "--prompt=A", "--max_new_tokens=1"],
            "plan": [QUICKSTART, *SMALL],
        }[verb]
        assert command(verb, *arguments).code == 0
    # another run is free
    fit("--run=another", "--trainer.max_steps=1")


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
def test_a_stale_lock_does_not_block(
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
def test_a_heartbeat_tells_of_a_process_that_cannot_be_asked_for(
    command: Command, fit: Command, other: subprocess.Popen[bytes], held: str
) -> None:
    match held:
        case "another machine":
            write_lock(OTHER_HOST, 50.0)
        case "another container":
            write_lock(lock_of(other.pid, namespace="pid:[1]"), 50.0)
        case "torn":
            write_lock('{"ho', 50.0)
        case _:  # a process of this machine that has ended and was not waited for
            write_lock(lock_of(other.pid))
            psutil.Process(other.pid).kill()
            time.sleep(0.2)
            fit("--trainer.max_steps=1")
            return
    done = command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1")
    assert done.code == 2
    assert "is being trained by process" in done.err


def test_of_many_that_begin_at_once_one_has_the_run(tmp_path: Path) -> None:
    """Also where all of them find the same stale lock."""
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


def test_a_restart_by_torchrun_is_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: subprocess.Popen[bytes]
) -> None:
    """Also on another machine whose process has just died."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    for holder in (OTHER_HOST, lock_of(other.pid)):
        (tmp_path / LOCK).write_text(json.dumps({**holder, "job": "job-7"}))
        with RunLock() as lock:
            lock.acquire(tmp_path)
        (tmp_path / LOCK).write_text(json.dumps({**holder, "job": "job-8"}))
        with RunLock() as lock, pytest.raises(ValueError, match="is being trained"):
            lock.acquire(tmp_path)


@pytest.mark.usefixtures("messages")
def test_the_holder_renews_its_heartbeat_and_says_when_it_has_lost_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_lock, "HEARTBEAT_SECONDS", 0.05)
    path = tmp_path / LOCK
    with RunLock() as lock:
        lock.acquire(tmp_path)
        os.utime(path, (1, 1))
        end = time.monotonic() + 10
        while path.stat().st_mtime < 2 and time.monotonic() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 2
        path.write_text(json.dumps(OTHER_HOST))
        time.sleep(0.5)
    assert "now belongs to another process" in capsys.readouterr().err
    assert path.exists()  # it is not ours to remove


def test_two_fits_at_once(tmp_path: Path) -> None:
    """Through the command: one trains the run, the other is refused."""
    arguments = [sys.executable, "-m", "gpt_lightning", "fit", QUICKSTART, *SMALL,
                 "--trainer.max_steps=40", "--trainer.max_epochs=-1", "--ckpt_path=auto"]  # fmt: skip
    both = [
        subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True)
        for _ in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in both]
    codes = sorted(process.returncode for process in both)
    if codes == [0, 0]:  # they did not overlap: the second found the run finished
        assert any("already finished" in err for _, err in said)
    else:
        assert codes == [0, 2]
        assert any("is being trained by process" in err for _, err in said)
    rows = (tmp_path / RUN / "metrics.csv").read_text().splitlines()
    assert len(rows) == len(set(rows)) == 1 + 2  # steps 0 and 20


# --- what launchers leave in the environment --------------------------------------------------------


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_a_leftover_rank_is_ignored(tmp_path: Path, name: str) -> None:
    """The run as without it: events, samples, and a finished run that is not overwritten."""
    fit = ("-m", "gpt_lightning", "fit", QUICKSTART, *SMALL, "--trainer.max_steps=2")
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {name: "1"}
    done = python(*fit, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2  # losses and a sample
    assert list((tmp_path / RUN).glob("events.*"))
    again = python(*fit, cwd=tmp_path, env=environment)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_a_rank_of_a_launcher_with_one_device_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    done = python("-m", "gpt_lightning", "fit", QUICKSTART, *SMALL, "--trainer.max_steps=2",
                  cwd=tmp_path, env=environment)  # fmt: skip
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "this process number 1 of several" in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_ranks_that_a_launcher_has_set_are_kept() -> None:
    for launcher in (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"},
        {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
    ):
        environment = dict(launcher)
        remove_stale_ranks(environment)
        assert environment == launcher
    environment = {"RANK": "1", "SLURM_PROCID": "1", "HOME": "/"}
    remove_stale_ranks(environment)
    assert environment == {"HOME": "/"}


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield listening.getsockname()[1]


def running_below(folder: Path) -> list[psutil.Process]:
    """Processes whose working directory is ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_a_port_in_use_is_not_taken(tmp_path: Path, used_port: int) -> None:
    environment = os.environ | {"MASTER_PORT": str(used_port), "MASTER_ADDR": "192.0.2.1"}
    done = python("-m", "gpt_lightning", "fit", QUICKSTART, *SMALL, "--trainer.max_steps=2",
                  "--trainer.devices=2", cwd=tmp_path, env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not running_below(tmp_path)


@pytest.mark.slow
def test_a_launchers_port_in_use_is_one_line_and_leaves_no_process(
    tmp_path: Path, used_port: int
) -> None:
    environment = os.environ | {
        "MASTER_PORT": str(used_port), "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0",
        "LOCAL_RANK": "0", "WORLD_SIZE": "2",
    }  # fmt: skip
    done = python("-m", "gpt_lightning", "fit", QUICKSTART, *SMALL, "--trainer.max_steps=2",
                  "--trainer.devices=2", cwd=tmp_path, env=environment)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("gpt_lightning: error: MASTER_PORT: ")
    assert "Traceback" not in done.stderr
    assert not running_below(tmp_path)
