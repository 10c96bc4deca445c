"""Metrics of training: their values, resumed in the middle of an interval, and without a wait for a GPU."""

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_lightning import RunConfig
from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.training import train_metrics
from gpt_lightning.training.build import build_run
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.run import setup_data_early
from gpt_lightning.training.run_files import Row, read_rows
from gpt_lightning.training.train_metrics import TrainMetrics
from helpers import TINY_MODEL, Command
from runs import RUN


def training_rows(run: str = "quickstart") -> list[Row]:
    """The rows of ``TrainMetrics`` in the run's metrics.csv."""
    return [row for row in read_rows(Path(f"checkpoints/{run}/metrics.csv")) if "lr" in row]


def without_speed(rows: list[Row]) -> list[Row]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_metrics_equal_those_of_a_plain_loop(fit: Command, accumulation: int) -> None:
    """Three sinks have the numbers of a loop in plain PyTorch: metrics.csv, TensorBoard, and a CSVLogger."""
    settings = ("--trainer.max_steps=7", "--trainer.log_every_n_steps=3", "--model.lr=0.01",
                "--model.warmup_steps=5", f"--trainer.accumulate_grad_batches={accumulation}",
                "--trainer.gradient_clip_val=0.01", "--data.stride=8", "--model.config.drop_rate=0", *TINY_MODEL)  # fmt: skip
    fit(*settings)
    fit(*settings, "--run=csv", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs")
    board = EventAccumulator(str(RUN))
    board.Reload()
    (table,) = Path("logs").rglob("metrics.csv")
    with table.open() as file:
        logged = [row for row in csv.DictReader(file) if row["train/loss"]]

    expected = plain_loop(steps=7, every=3, accumulation=accumulation)
    rows = training_rows()
    assert [row["step"] for row in rows] == [2, 5]
    assert [int(row["step"]) for row in logged] == [2, 5]
    for tag in ("train/loss", "lr", "train/grad_norm"):
        values = [row[tag] for row in expected]
        assert [row[tag] for row in rows] == pytest.approx(values, rel=1e-5)
        assert [event.value for event in board.Scalars(tag)] == pytest.approx(values, rel=1e-5)
        assert [float(row[tag]) for row in logged] == pytest.approx(values, rel=1e-5)
    assert all(row["tokens_per_second"] > 0 for row in rows)


def plain_loop(steps: int, every: int, accumulation: int) -> list[Row]:
    """Mean losses, learning rates and gradient norms of the run in ``RUN``, by a loop in plain PyTorch."""
    import yaml

    recorded = yaml.safe_load((RUN / "config.yaml").read_text())
    config = RunConfig(
        model=recorded["model"], data=recorded["data"], seed_everything=recorded["seed_everything"],
        run="plain", trainer={"accelerator": "cpu", "logger": False},
    )  # fmt: skip
    for part in (config.model, config.data):
        part.pop("seed", None), part.pop("rng", None)
    built = build_run(config)
    setup_data_early(built)
    built.module.configure_model()
    model, batches = built.module.model, iter(built.datamodule.train_dataloader())
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recorded["model"]["lr"],
        weight_decay=recorded["model"]["weight_decay"],
    )
    rows, losses = [], []
    for step in range(steps):
        rate = recorded["model"]["lr"] * min(1.0, (step + 1) / recorded["model"]["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        micro = []
        for _ in range(accumulation):
            x, y = next(batches)
            loss = cross_entropy(model(x).flatten(0, 1), y.flatten())
            (loss / accumulation).backward()
            micro.append(loss.item())
        losses.append(sum(micro) / accumulation)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        if (step + 1) % every == 0:
            mean = sum(losses) / len(losses)
            rows.append({"train/loss": mean, "lr": rate, "train/grad_norm": norm})
            losses = []
    return rows


def test_run_resumed_within_an_interval_has_the_same_rows(fit: Command) -> None:
    settings = ("--trainer.log_every_n_steps=4", "--model.config.drop_rate=0.1", *TINY_MODEL)
    fit("--run=whole", "--trainer.max_steps=13", *settings)
    for steps in (3, 6, 8, 13):
        fit("--run=parts", f"--trainer.max_steps={steps}", "--ckpt_path=auto", *settings)
    rows = training_rows("whole")
    assert [row["step"] for row in rows] == [3, 7, 11]
    assert without_speed(training_rows("parts")) == without_speed(rows)


def test_metrics_are_logged_every_ten_steps_unless_told_otherwise(fit: Command) -> None:
    fit("--trainer.max_steps=21", *TINY_MODEL)
    assert [row["step"] for row in training_rows()] == [9, 19]
    fit("--trainer.max_steps=3", "--run=none", "--trainer.log_every_n_steps=0", *TINY_MODEL)
    assert training_rows("none") == []


def test_skipped_step_is_left_out_of_the_mean(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps=4", "--trainer.log_every_n_steps=1", "--run=each", *TINY_MODEL)
    first, second, *_ = (row["train/loss"] for row in training_rows("each"))
    loss = GPTLightningModule.loss

    def third_is_infinite(self: GPTLightningModule, batch: Any) -> torch.Tensor:
        is_bad = torch.is_grad_enabled() and self.trainer.global_step == 2
        return loss(self, batch) * (math.inf if is_bad else 1.0)

    monkeypatch.setattr(GPTLightningModule, "loss", third_is_infinite)
    fit("--trainer.max_steps=4", "--trainer.log_every_n_steps=3", "--bad_steps=skip", *TINY_MODEL)
    (row,) = training_rows()
    assert row["train/loss"] == pytest.approx((first + second) / 2, rel=1e-6)


class _CountsReads(TorchDispatchMode):
    """Count values that Python reads from tensors; on a GPU each read waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_gpu_is_not_waited_for(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hook reads a value, except from a copy that was started one step before. A CPU stands in for the GPU."""
    counter, copies, step = _CountsReads(), [], [0]
    in_hook = [False]

    def forbidden(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def call(self: torch.Tensor, *arguments: Any, **settings: Any) -> Any:
            assert not in_hook[0], f"a hook calls Tensor.{name}"
            return method(self, *arguments, **settings)

        return call

    class Copy(AsyncHostCopy):
        def __init__(self, tensor: torch.Tensor) -> None:
            super().__init__(tensor)
            self.made_in = step[0]

        def read(self) -> torch.Tensor:
            copies.append((self.made_in, step[0]))
            in_hook[0] = False  # from here on there is a value of the host
            return super().read()

    def counted(hook: Any) -> Any:
        def call(self: Any, trainer: Any, *arguments: Any) -> None:
            step[0] = trainer.global_step
            in_hook[0] = True
            with counter:
                hook(self, trainer, *arguments)
            in_hook[0] = False

        return call

    fit("--run=now", "--trainer.max_steps=9", "--trainer.log_every_n_steps=2", *TINY_MODEL)
    monkeypatch.setattr(train_metrics, "_reads_later", lambda device: True)
    monkeypatch.setattr(train_metrics, "AsyncHostCopy", Copy)
    for name in ("tolist", "numpy", "cpu", "__array__"):  # which the mode does not see
        monkeypatch.setattr(torch.Tensor, name, forbidden(name))
    for name in ("on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(TrainMetrics, name, counted(getattr(TrainMetrics, name)))
    fit("--trainer.max_steps=9", "--trainer.log_every_n_steps=2", *TINY_MODEL)
    assert counter.reads == 0
    assert copies == [(2, 3), (4, 5), (6, 7), (8, 9)]
    assert without_speed(training_rows()) == without_speed(training_rows("now"))
