"""Throughput: what is measured, logged and left out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning import GPTConfig
from gpt_lightning.model import flops
from gpt_lightning.training import (
    evaluation,
    hardware,
    run_warnings,  # noqa: F401  # takes measured_peak before it is patched
    task_evaluation,
    throughput,
)
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.throughput import Stopwatch, speed_metrics
from helpers import TINY_MODEL, Command
from task_examples import write_tasks


def test_speed_metrics() -> None:
    found = speed_metrics(tokens=10_000, steps=5, seconds=2.0, loading_seconds=0.5,
                    flops_per_token=1_000_000, peak=20e9)  # fmt: skip
    assert found == {
        "throughput/tokens_per_second": 5000.0,
        "throughput/step_time": 0.4,
        "throughput/data_wait_fraction": 0.25,
        "throughput/mfu": 0.25,
    }
    assert "throughput/mfu" not in speed_metrics(
        tokens=1, steps=1, seconds=1.0, loading_seconds=0.0, flops_per_token=1, peak=None
    )


def test_stopwatch_does_not_run_while_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Stopwatch()
    began = clock.seconds()
    now[0] += 2
    with clock.stopped(torch.device("cpu")):
        now[0] += 50
    now[0] += 3
    assert clock.seconds() - began == 5


def test_throughput_excludes_what_is_not_training(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of work advances the clock by a different time; a step reports only the 1 s of training."""
    now = 0.0
    result = set()
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now))

    def takes(owner: Any, name: str, seconds: float) -> None:
        plain = getattr(owner, name)

        def slow(*arguments: Any, **settings: Any) -> Any:
            nonlocal now
            now += seconds
            result.add(name)
            return plain(*arguments, **settings)

        monkeypatch.setattr(owner, name, slow)

    monkeypatch.setattr(hardware, "measured_peak", lambda dtype: 1e9)
    kinds = [
        (hardware, "measured_peak"),
        (EvaluationCallback, "_mean_loss"),
        (evaluation, "entropy"),
        (evaluation, "generate"),
        (task_evaluation, "log_likelihoods"),
        (CheckpointCallback, "_save"),
        (GPTLightningModule, "validation_step"),
    ]
    for number, (owner, name) in enumerate(kinds):
        takes(owner, name, 10.0 * 2**number)
    takes(GPTLightningModule, "training_step", 1.0)
    write_tasks(Path())
    # an epoch has 15 steps
    fit("--trainer.max_steps=34", "--trainer.max_epochs=-1", "--throughput.every_n_steps=1",
        "--evaluation.eval_freq=1", "--evaluation.log_next_token=true", "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=1", "--evaluation.tasks.hellaswag=choices.jsonl", "--evaluation.task_freq=2",
        "--checkpoint.every_n_train_steps=3", *TINY_MODEL)  # fmt: skip
    assert result == {"training_step", *(name for _, name in kinds)}
    events = EventAccumulator("checkpoints/quickstart").Reload()
    steps = [event.value for event in events.Scalars("throughput/step_time")]
    assert len(steps) == 33
    assert set(steps) == {1.0}
    rates = [event.value for event in events.Scalars("tokens_per_second")]
    assert set(rates[1:]) <= {16.0, 32.0}  # the last batch of an epoch has one window


def test_run_logs_its_throughput(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "measured_peak", lambda dtype: 1e9)
    fit("--trainer.max_steps=14", "--trainer.max_epochs=-1", "--throughput.every_n_steps=4",
        "--trainer.accumulate_grad_batches=2", "--checkpoint.every_n_train_steps=1")  # fmt: skip
    events = EventAccumulator("checkpoints/quickstart").Reload()

    def logged(tag: str) -> Any:
        return {e.step: e.value for e in events.Scalars(f"throughput/{tag}")}

    rates = logged("tokens_per_second")
    assert list(rates) == [4, 8, 12]  # the first step is not counted
    for step, seconds in logged("step_time").items():
        assert 0 < seconds < 5
        # the last step of an epoch has one batch, not two
        assert rates[step] * seconds * 4 in (
            pytest.approx(2 * 2 * 16 * 4),
            pytest.approx(2 * 16 * 7),
        )
    assert all(0 <= share < 0.5 for share in logged("data_wait_fraction").values())
    config = GPTConfig(context_length=16, emb_dim=8, n_heads=2, n_layers=2)
    for step, share in logged("mfu").items():
        assert share == pytest.approx(
            rates[step] * flops.flops_per_token(config, 16) / 1e9, rel=1e-4
        )
    assert all(0.05 < gigabytes < 20 for gigabytes in logged("peak_memory_gb").values())
