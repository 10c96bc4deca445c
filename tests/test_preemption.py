"""Signals, kills and restarts: a run that is stopped anywhere goes on as if it never had been."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from conftest import ROOT, SMALL, Command, python
from lightning.pytorch import Callback

from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import stopping
from gpt_lightning.training.stopping import GracefulStop
from gpt_lightning.training.verify_resume import compare_checkpoints, plan_short_run

UPDATES = 400
FIT = [
    "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--trainer.max_epochs=-1",
    "--evaluation.eval_freq=50", "--evaluation.prompt=null", "--model.config.drop_rate=0.1",
    "--allow_import=test_preemption", "--trainer.callbacks+=test_preemption.HashEachStep",
    "--checkpoint.every_n_train_steps=1000", "--checkpoint.save_best=false",
]  # fmt: skip
DDP = ["--trainer.devices=2", "--trainer.strategy=ddp"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "PYTHONUNBUFFERED": "1"}


class HashEachStep(Callback):
    """A line an update: its number and the sum over all parameters after it."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            total = hashlib.sha256()
            for parameter in module.parameters():
                total.update(parameter.detach().numpy().tobytes())
            with Path(trainer.default_root_dir, "hashes").open("a") as file:
                print(trainer.global_step, total.hexdigest(), file=file)


def hashes(folder: Path) -> dict[str, str]:
    """By update; one that was done twice must have been the same twice."""
    found: dict[str, str] = {}
    for line in (folder / "hashes").read_text().splitlines():
        step, value = line.split()
        assert found.setdefault(step, value) == value, f"step {step}"
    return found


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", *FIT, f"--trainer.default_root_dir={folder}",
         *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


def is_training(folder: Path) -> Callable[[], bool]:
    return lambda: (folder / "hashes").exists() and len(hashes_so_far(folder)) > 5


def hashes_so_far(folder: Path) -> list[str]:
    return (folder / "hashes").read_text().splitlines()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The run that is never stopped, long enough for all that are."""
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, f"--trainer.max_steps={UPDATES}")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return hashes(folder)


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("straight")
    process = start(folder, f"--trainer.max_steps={UPDATES}", *DDP)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return hashes(folder)


def stop_and_go_on(
    folder: Path, signum: signal.Signals, rank: int | None, expected: dict[str, str]
) -> None:
    """Signal the process of ``rank``; none: there is but one. Then three more updates."""
    processes = DDP if rank is not None else []
    process = start(folder, f"--trainer.max_steps={UPDATES}", *processes)
    wait_until(is_training(folder))
    if rank == 1:
        (other,) = psutil.Process(process.pid).children()
        other.send_signal(signum)
    else:
        process.send_signal(signum)
    _, said = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else 143), said
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "stopping after" in line]
    assert line.startswith(f"gpt_lightning: {signum.name}: stopping after ")
    step = int(line.split()[-2])
    last = folder / "checkpoints" / "quickstart" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == step < UPDATES
    assert f"{step}" in hashes(folder)

    process = start(folder, f"--trainer.max_steps={step + 3}", "--ckpt_path=last", *processes)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
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
def test_signals(tmp_path: Path, straight: dict[str, str], signum: signal.Signals) -> None:
    stop_and_go_on(tmp_path / "run", signum, None, straight)


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
def test_signals_to_either_of_two(
    tmp_path: Path, straight_on_two: dict[str, str], signum: signal.Signals, rank: int
) -> None:
    stop_and_go_on(tmp_path / "run", signum, rank, straight_on_two)


class VeryLong(Callback):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 8:
            Path(trainer.default_root_dir, "asleep").touch()
            time.sleep(100)


def test_a_second_interrupt_leaves_at_once(tmp_path: Path) -> None:
    """Here the first is noted in an update that takes very long."""
    folder = tmp_path / "run"
    process = start(folder, "--trainer.callbacks+=test_preemption.VeryLong")
    wait_until((folder / "asleep").exists)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.splitlines()[-1].startswith("gpt_lightning: interrupted")
    assert "Traceback" not in said


def test_slurm_is_asked_to_run_the_job_again_after_the_save(tmp_path: Path) -> None:
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
         f"--trainer.max_steps={UPDATES}"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    wait_until(is_training(folder))
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 77", str(last)]


@pytest.mark.slow
def test_sigkill_again_and_again() -> None:
    """benchmarks/kill.py, with fewer kills than there."""
    done = python(
        str(ROOT / "benchmarks" / "kill.py"), "--kills=8", "--combinations=3", timeout=900
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(target["passed"] for target in result["targets"]), done.stdout


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    folder = tmp_path / "run"
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "--max_restarts=10", "-m", "gpt_lightning", *FIT, f"--trainer.default_root_dir={folder}",
         f"--trainer.max_steps={UPDATES}", *DDP, "--ckpt_path=auto",
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
def test_a_rank_killed_under_torchrun(
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
    said, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, said[-3000:]
    found = hashes(folder)
    assert found == straight_on_two
    assert read_checkpoint(last)["global_step"] == UPDATES


def test_verify_resume(tmp_path: Path) -> None:
    small = [f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--evaluation.eval_freq=2"]
    done = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=3",
                  "--json", "--out=kept", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["exact"] is True
    assert [part["part"] for part in answer["compared"]] == [
        "weights", "optimizer", "counters", "windows"]  # fmt: skip
    for part in answer["compared"]:
        assert part["straight"] == part["resumed"]
        assert len(part["straight"]) == 64
    # an epoch has 3 of its 7 steps; one kill is at its end, two more lose steps that are repeated
    assert (answer["kills"], answer["epoch_steps"]) == ([3, 4, 5], 3)
    assert "6 steps, ended by max_epochs; 3 steps per epoch (instead of 7," in done.stderr
    lines = [
        json.loads(line)
        for line in (tmp_path / "kept/cut/windows-0.jsonl").read_text().splitlines()
    ]
    assert [line[0] for line in lines] == [0, 1, 2, 3, 3, 4, 3, 4, 5]
    last = Path("checkpoints/verified/last.ckpt")
    compared = compare_checkpoints(tmp_path / "kept/straight" / last, tmp_path / "kept/cut" / last)
    assert not any(part.difference for part in compared)


@pytest.mark.parametrize("batches", [1, 2, 7, 9, 10, 21, 252, 100_000])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("ends_by", ["max_epochs", "max_steps", "max_tokens"])
def test_short_run_has_a_kill_at_the_end_of_an_epoch(
    batches: int, accumulate: int, ends_by: Any
) -> None:
    epoch = EpochShape(batches, accumulate, 32)
    for steps, more_steps, kills in itertools.product((1, 2, 7, 10), (1, 3, 10), (1, 2, 3)):
        if kills > more_steps:
            continue
        plan = plan_short_run(epoch, ends_by, steps, more_steps, kills)
        assert plan.steps >= steps + more_steps
        if ends_by != "max_epochs":
            assert plan.steps == steps + more_steps
        assert list(plan.kills) == sorted(set(plan.kills))
        assert all(steps <= kill < plan.steps for kill in plan.kills)
        assert plan.kills[0] in (steps, steps + 1)
        assert any(kill % plan.epoch_steps == 0 for kill in plan.kills)
        assert any(kill >= plan.save_every for kill in plan.kills)
        assert plan.epoch_steps <= epoch.steps
        assert any(option.startswith(f"--{'' if ends_by == 'max_tokens' else 'trainer.'}{ends_by}=") for option in plan.limits)  # fmt: skip


class LosesAnEpoch(Callback):
    """Callback that loses an epoch, as Lightning 2.6.6 does when a run resumes at the end of an epoch."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        progress = trainer.fit_loop.epoch_progress
        loader = trainer.fit_loop.epoch_loop.batch_progress
        if trainer.global_step and loader.is_last_batch:
            for counts in (progress.total, progress.current):
                counts.ready -= 1
                counts.started -= 1


@pytest.mark.slow
def test_verify_resume_finds_a_lost_epoch(tmp_path: Path) -> None:
    small = [f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--allow_import=test_preemption",
             "--trainer.callbacks+=test_preemption.LosesAnEpoch"]  # fmt: skip
    done = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=3",
                  cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "error: counters: " in done.stderr.splitlines()[-1]


class Disturbed(Callback):
    """Callback that makes resume inexact: its noise differs in each process."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 4:
            noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
            next(module.parameters()).grad.add_(torch.randn(1, 16, generator=noise))


@pytest.mark.slow
def test_verify_resume_finds_inexact_weights(tmp_path: Path) -> None:
    small = [f"--config={ROOT}/configs/quickstart.yaml", *SMALL, "--allow_import=test_preemption",
             "--trainer.callbacks+=test_preemption.Disturbed"]  # fmt: skip
    done = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=2",
                  cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert done.returncode == 1
    assert "weights" in done.stdout
    assert "DIFFERENT" in done.stdout
    assert "error: weights: model." in done.stderr.splitlines()[-1]


def test_verify_resume_refuses(command: Command, tmp_path: Path) -> None:
    for arguments, cause in [
        (["--steps=0"], "steps: 0 is too small"),
        (["--model.lrr=1"], "model.lrr: is not a setting; did you mean model.lr?"),
        (["--out=full"], "out: full is not empty"),
    ]:
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "x").touch()
        done = command("verify-resume", *arguments)
        assert done.code == 2
        assert cause in done.err.splitlines()[-1]


@pytest.mark.slow
def test_verify_resume_on_two_processes(tmp_path: Path) -> None:
    done = python("-m", "gpt_lightning", "verify-resume", f"--config={ROOT}/configs/quickstart.yaml",
                  *SMALL, *DDP, "--steps=3", "--more_steps=3", "--json", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exact"] is True


@pytest.mark.parametrize(("later", "stops_after"), [(False, 2), (True, 3)])
def test_ranks_stop_after_the_same_update(
    monkeypatch: pytest.MonkeyPatch, later: bool, stops_after: int
) -> None:
    """Two, of which the second is sent a signal in the second update; GPUs read what they compared an update later."""
    ranks = [GracefulStop(), GracefulStop()]
    monkeypatch.setattr(stopping, "_reads_later", lambda device: later)
    monkeypatch.setattr(
        torch.distributed, "all_reduce", lambda t, op: t.fill_(max(r._pending for r in ranks))
    )
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    stopped = []
    for step in range(1, 6):
        if step == 2:
            ranks[1]._note(signal.SIGTERM, None)
        for rank, its in enumerate(ranks):
            loop = SimpleNamespace(min_epochs=1, epoch_loop=SimpleNamespace(min_steps=9))
            trainer: Any = SimpleNamespace(global_step=step, world_size=2, is_global_zero=rank == 0,
                                           fit_loop=loop, should_stop=False)  # fmt: skip
            its.on_train_batch_end(trainer, module, None, None, 0)
            if trainer.should_stop:
                stopped.append((rank, step))
    assert stopped == [(0, stops_after), (1, stops_after)]
    assert [its.received for its in ranks] == [signal.SIGTERM] * 2
