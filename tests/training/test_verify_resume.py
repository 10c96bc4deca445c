"""``verify-resume``: finds exact and inexact runs."""

import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from lightning.pytorch import Callback

from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.training.verify_resume import (
    _kill_rest,
    compare_checkpoints,
    plan_short_run,
)
from helpers import DDP, ENVIRONMENT, SMALL_QUICKSTART, Command, python


@pytest.mark.slow
def test_verify_resume_finds_an_exact_run(tmp_path: Path) -> None:
    small = [*SMALL_QUICKSTART, "--evaluation.eval_freq=2"]
    result = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=3",
                  "--json", "--out=kept", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["exact"] is True
    assert [part["part"] for part in answer["compared"]] == [
        "weights", "optimizer", "counters", "windows"]  # fmt: skip
    for part in answer["compared"]:
        assert part["straight"] == part["resumed"]
        assert len(part["straight"]) == 64
    # an epoch has 3 of its 7 steps; one kill is at its end, two more lose steps that are repeated
    assert (answer["kills"], answer["epoch_steps"]) == ([3, 4, 5], 3)
    assert "6 steps, ended by max_epochs; 3 steps per epoch (instead of 7," in result.stderr
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
    small = [*SMALL_QUICKSTART, f"--allow_import={__name__}",
             f"--trainer.callbacks+={__name__}.LosesAnEpoch"]  # fmt: skip
    result = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=3",
                  cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "error: counters: " in result.stderr.splitlines()[-1]


class Disturbed(Callback):
    """Callback that makes resume inexact: its noise differs in each process."""

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if trainer.global_step == 4:
            noise = torch.Generator().manual_seed(int.from_bytes(os.urandom(7)))
            next(module.parameters()).grad.add_(torch.randn(1, 8, generator=noise))


@pytest.mark.slow
def test_verify_resume_finds_inexact_weights(tmp_path: Path) -> None:
    small = [*SMALL_QUICKSTART, f"--allow_import={__name__}",
             f"--trainer.callbacks+={__name__}.Disturbed"]  # fmt: skip
    result = python("-m", "gpt_lightning", "verify-resume", *small, "--steps=3", "--more_steps=2",
                  cwd=tmp_path, env=ENVIRONMENT)  # fmt: skip
    assert result.returncode == 1
    assert "weights" in result.stdout
    assert "DIFFERENT" in result.stdout
    assert "error: weights: model." in result.stderr.splitlines()[-1]


def test_verify_resume_refuses_bad_input(command: Command, tmp_path: Path) -> None:
    for arguments, cause in [
        (["--steps=0"], "steps: 0 is too small"),
        (["--model.lrr=1"], "model.lrr: is not a setting; did you mean model.lr?"),
        (["--out=full"], "out: full is not empty"),
    ]:
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "x").touch()
        result = command("verify-resume", *arguments)
        assert result.code == 2
        assert cause in result.err.splitlines()[-1]


@pytest.mark.slow
def test_verify_resume_on_two_processes(tmp_path: Path) -> None:
    result = python("-m", "gpt_lightning", "verify-resume", *SMALL_QUICKSTART, *DDP, "--steps=3", "--more_steps=3", "--json", cwd=tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["exact"] is True


@pytest.mark.slow
def test_verify_resume_with_mixture_documents_and_workers(tmp_path: Path) -> None:
    result = python(
        "-m", "gpt_lightning", "verify-resume", *SMALL_QUICKSTART, "--steps=4", "--more_steps=3",
        "--data.global_batch_tokens=64", "--data.num_workers=2", "--data.document_mask=true",
        f'--data.mixture={{"sample": 1, "{__file__}": 2}}', "--data.train_ratio=0.5",
        "--max_tokens=100000000", "--json", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["exact"] is True


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("has_sessions", [True, False])
def test_all_processes_of_a_run_are_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_sessions: bool
) -> None:
    """The first process has ended, as after a kill; the other ranks have the same options."""
    option = f"--trainer.default_root_dir={tmp_path}"
    rank = [sys.executable, "-c", "import time; time.sleep(600)", option]
    start_rank = f"import subprocess; print(subprocess.Popen({rank}).pid)"
    command = [sys.executable, "-c", start_rank]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as first:
        assert first.stdout is not None
        pid = int(first.stdout.readline())
        assert first.wait() == 0
        if not has_sessions:
            monkeypatch.delattr(os, "killpg")
        _kill_rest(first.pid, option)
        first.stdout.read()  # ends when the rank closes it
    end = time.monotonic() + 60
    while is_running(pid):
        assert time.monotonic() < end
        time.sleep(0.01)
