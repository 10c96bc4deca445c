"""Signals, kills and restarts: every later step has the same bits."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback

from gpt_lightning.pretrained.weights import read_checkpoint
from helpers import (
    DDP,
    ENVIRONMENT,
    ROOT,
    SMALL_QUICKSTART,
    python,
)

STEPS = 400


def hashes(folder: Path) -> dict[str, str]:
    """Hashes by step; a repeated step must give the same hash."""
    found: dict[str, str] = {}
    for line in (folder / "hashes").read_text().splitlines():
        step, value = line.split()
        assert found.setdefault(step, value) == value, f"step {step}"
    return found


class HashEachStep(Callback):
    """Callback that writes a line per optimizer step: its number and the checksum of all parameters after it."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            total = hashlib.sha256()
            for parameter in module.parameters():
                total.update(parameter.detach().numpy().tobytes())
            with Path(trainer.default_root_dir, "hashes").open("a") as file:
                print(trainer.global_step, total.hexdigest(), file=file)


FIT = [
    "fit", *SMALL_QUICKSTART, "--trainer.max_epochs=-1",
    "--evaluation.eval_freq=50", "--evaluation.prompt=null", "--model.config.drop_rate=0.1",
    f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.HashEachStep",
    "--checkpoint.every_n_train_steps=1000", "--checkpoint.save_best=false",
]  # fmt: skip


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", *FIT, f"--trainer.default_root_dir={folder}",
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of a run that is never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, f"--trainer.max_steps={STEPS}")
    _, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return hashes(folder)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def hashes_so_far(folder: Path) -> list[str]:
    return (folder / "hashes").read_text().splitlines()


def is_training(folder: Path) -> Callable[[], bool]:
    return lambda: (folder / "hashes").exists() and len(hashes_so_far(folder)) > 5


def stop_and_resume(
    folder: Path, signum: signal.Signals, rank: int | None, expected: dict[str, str]
) -> None:
    """Send a signal to the process of ``rank`` (``None``: one process), then resume for three steps."""
    processes = DDP if rank is not None else []
    process = start(folder, f"--trainer.max_steps={STEPS}", *processes)
    wait_until(is_training(folder))
    if rank == 1:
        (other,) = psutil.Process(process.pid).children()
        other.send_signal(signum)
    else:
        process.send_signal(signum)
    _, output = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else 143), output
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if "stopping after" in line]
    assert line.startswith(f"gpt_lightning: {signum.name}: stopping after ")
    step = int(line.split()[-2])
    last = folder / "checkpoints" / "quickstart" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == step < STEPS
    assert f"{step}" in hashes(folder)

    process = start(folder, f"--trainer.max_steps={step + 3}", "--ckpt_path=last", *processes)
    _, output = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found = hashes(folder)
    assert len(found) == step + 3
    assert found == {key: expected[key] for key in found}


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.nightly),
    ],
)
def test_run_stopped_by_a_signal_resumes_exactly(
    tmp_path: Path, straight: dict[str, str], signum: signal.Signals
) -> None:
    stop_and_resume(tmp_path / "run", signum, None, straight)


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, f"--trainer.max_steps={STEPS}", *DDP)
    _, output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return hashes(folder)


@pytest.mark.parametrize(
    ("signum", "rank"),
    [
        pytest.param(signal.SIGTERM, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.nightly),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR1, 0, marks=pytest.mark.nightly),
        pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.nightly),
    ],
)
def test_signal_to_one_of_two_processes_stops_both(
    tmp_path: Path, straight_on_two: dict[str, str], signum: signal.Signals, rank: int
) -> None:
    stop_and_resume(tmp_path / "run", signum, rank, straight_on_two)


class VeryLong(Callback):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 8:
            Path(trainer.default_root_dir, "asleep").touch()
            time.sleep(100)


@pytest.mark.slow
def test_second_interrupt_ends_the_run_at_once(tmp_path: Path) -> None:
    """The first interrupt comes in a step that takes very long."""
    folder = tmp_path / "run"
    process = start(folder, f"--trainer.callbacks+={__name__}.VeryLong")
    wait_until((folder / "asleep").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, output = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert output.splitlines()[-1].startswith("gpt_lightning: interrupted")
    assert "Traceback" not in output


def test_slurm_job_is_requeued_after_the_save(tmp_path: Path) -> None:
    tools, folder = tmp_path / "bin", tmp_path / "run"
    tools.mkdir()
    last = folder / "checkpoints" / "quickstart" / "last.ckpt"
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nls {last} >> {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_ID": "77"}
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", *FIT, f"--trainer.default_root_dir={folder}",
         f"--trainer.max_steps={STEPS}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    wait_until(is_training(folder))
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 77", str(last)]


@pytest.mark.slow
def test_repeatedly_killed_run_resumes_exactly() -> None:
    """benchmarks/kill.py with few kills."""
    completed = python(
        str(ROOT / "benchmarks" / "kill.py"), "--kills=3", "--combinations=2", timeout=900
    )
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert all(target["passed"] for target in result["targets"]), completed.stdout


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folder = tmp_path / "run"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max_restarts=10", "-m", "gpt_lightning", *FIT, f"--trainer.default_root_dir={folder}",
         f"--trainer.max_steps={STEPS}", *DDP, "--ckpt_path=auto",
         "--checkpoint.every_n_train_steps=10"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    yield process
    for child in (
        psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    ):
        child.kill()
    process.kill()


@pytest.mark.slow
def test_rank_killed_under_torchrun_resumes_exactly(
    torchrun: subprocess.Popen[str], straight_on_two: dict[str, str], tmp_path: Path
) -> None:
    folder, rng = tmp_path / "run", random.Random(5)
    last = folder / "checkpoints" / "quickstart" / "last.ckpt"
    for _ in range(2):
        wait_until(lambda: last.exists() and is_training(folder)(), 200)
        time.sleep(rng.random())
        ranks = [
            p for p in psutil.Process(torchrun.pid).children() if "gpt_lightning" in p.cmdline()
        ]
        if len(ranks) == 2:
            rng.choice(ranks).kill()
        before = len(hashes_so_far(folder))
        wait_until(
            lambda before=before: (
                torchrun.poll() is not None or len(hashes_so_far(folder)) > before + 3
            ),
            200,
        )
    output, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, output[-3000:]
    found = hashes(folder)
    assert found == straight_on_two
    assert read_checkpoint(last)["global_step"] == STEPS
