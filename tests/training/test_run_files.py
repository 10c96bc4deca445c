"""The files of a run: folder, TensorBoard, metrics.csv."""

import os
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import RemovesFiles
from gpt_lightning import RunConfig
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.evaluation import EvaluationCallback, SampleTextCallback
from gpt_lightning.training.resume import latest_valid_checkpoint
from gpt_lightning.training.run_files import (
    SaveRunConfig,
    loss_figure,
    read_rows,
    recorded_settings,
)
from gpt_lightning.training.train_metrics import TrainMetrics
from helpers import Command
from runs import RUN


def test_run_folder_and_tensorboard(fit: Command) -> None:
    result = fit(
        "--trainer.max_epochs=2",
        "--evaluation.eval_freq=3",
        "--evaluation.log_next_token=true",
        "--trainer.log_every_n_steps=4",
    )
    folder = Path("checkpoints/quickstart")
    events = [name for name in os.listdir(folder) if name.startswith("events.out.tfevents")]
    assert sorted(os.listdir(folder)) == sorted(
        [
            "best.ckpt",
            "config.yaml",
            "last.ckpt",
            "loss.png",
            "manifest.json",
            "metrics.csv",
            "previous.ckpt",
            "train",
            "val",
            *events,
        ]
    )
    assert len(events) == 1

    board = EventAccumulator(str(folder))
    board.Reload()
    tags = board.Tags()
    assert {*EvaluationCallback.TAGS, *TrainMetrics.TAGS} <= set(tags["scalars"])
    assert set(SampleTextCallback.TAGS) <= set(tags["scalars"])
    assert [e.step for e in board.Scalars(SampleTextCallback.TAGS[0])] == [0, 3, 6, 9, 12]
    assert "losses" in tags["images"]
    assert "sample/text_summary" in tags["tensors"]
    assert "_hparams_/session_start_info" in board.summary_metadata
    assert [e.step for e in board.Scalars("train/loss")] == [3, 7, 11]
    for name, tag in (("train", "train/loss"), ("val", "val_loss")):  # one chart for both
        part = EventAccumulator(str(folder / name))
        part.Reload()
        assert part.Tags()["scalars"] == ["loss"]
        points, whole = part.Scalars("loss"), board.Scalars(tag)
        assert [(e.step, e.value) for e in points] == [(e.step, e.value) for e in whole]

    lines = [line for line in result.out.splitlines() if line.startswith("Ep ")]
    samples = [line for line in result.out.splitlines() if not line.startswith("Ep ")]
    assert len(samples) == 2
    logged = [event.value for event in board.Scalars("val_loss")]
    rows = read_rows(folder / "metrics.csv")
    assert len(lines) == len(logged) == sum("val_loss" in row for row in rows)
    assert [row["step"] for row in rows if "train/loss" in row] == [3, 7, 11]
    assert [f"{value:.3f}" for value in logged] == [line.split()[-1] for line in lines]
    assert [event.step for event in board.Scalars("val_loss")][:2] == [0, 3]
    assert all(event.value > 0 for event in board.Scalars("train/grad_norm"))
    assert all(event.value > 0 for event in board.Scalars("tokens_per_second"))


def test_one_evaluation_is_a_dot_in_the_figure() -> None:
    row = {"seen_epochs": 0.1, "tokens_seen": 32.0, "train_loss": 9.0, "val_loss": 9.5}
    for rows, marker in [([row], "o"), ([row, {**row, "seen_epochs": 0.2}], "")]:
        lines = loss_figure(rows).axes[0].lines
        assert [line.get_marker() for line in lines] == [marker, marker]


def test_metrics_that_cannot_be_written_do_not_stop_a_run(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils.tensorboard import SummaryWriter

    from gpt_lightning.training import loggers, run_files

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loggers, "_logged_causes", set())
    for name in ("add_scalar", "add_text", "add_figure", "flush", "close"):
        monkeypatch.setattr(SummaryWriter, name, full)
    monkeypatch.setattr(run_files.MetricsCSV, "_append", full)
    result = fit("--trainer.max_steps=3", "--evaluation.eval_freq=1")
    assert result.err.count("metrics cannot be written (No space left on device)") == 1
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 3


def test_truncated_line_of_metrics_is_removed(fit: Command) -> None:
    fit("--trainer.max_steps=4", "--evaluation.eval_freq=1")
    table = RUN / "metrics.csv"
    whole = table.read_text().splitlines()
    table.write_text("\n".join(whole)[:-40] + "\n20,1")
    fit("--trainer.max_steps=6", "--evaluation.eval_freq=1", "--ckpt_path=last")
    steps = [line.split(",")[0] for line in table.read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "4", "5"]


def test_removed_metrics_file_is_written_again(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemovesFiles, "names", ["metrics.csv"])
    result = fit("--trainer.max_steps=4", "--evaluation.eval_freq=1",
               "--allow_import=callbacks", "--trainer.callbacks+=callbacks.RemovesFiles")  # fmt: skip
    assert result.err.count("metrics.csv is gone") == 1
    steps = [line.split(",")[0] for line in (RUN / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3"]
    fit("--trainer.max_steps=5", "--evaluation.eval_freq=1", "--ckpt_path=last")
    steps = [line.split(",")[0] for line in (RUN / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "0", "1", "2", "3", "4"]


def test_recorded_paths_have_slashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sep", "\\")  # as on Windows
    config = RunConfig(init_from=r"runs\a", data={"text": r"texts\my.txt"},
                       trainer={"default_root_dir": r"C:\runs"})  # fmt: skip
    recorded = recorded_settings(config, GPTConfig())
    assert recorded["data"]["text"] == "texts/my.txt"
    assert recorded["trainer"]["default_root_dir"] == "C:/runs"
    header = SaveRunConfig(config, recorded).header
    assert header == "# started with --init_from runs/a\n"
    mixed = RunConfig(data={"mixture": {r"a\b.txt": 1.0, "sample": 2.0}})
    assert recorded_settings(mixed, GPTConfig())["data"]["mixture"] == {"a/b.txt": 1, "sample": 2}
