"""When checkpoints are saved, and what happens when a save fails."""

import errno
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from callbacks import RemovesFiles
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training import checkpoint_callback
from gpt_lightning.training.checkpoint_io import corruption_reason, read_manifest
from gpt_lightning.training.resume import latest_valid_checkpoint
from gpt_lightning.training.run_files import read_rows
from gpt_lightning.training.throughput import Stopwatch
from helpers import SMALL_QUICKSTART, Command, assert_refused
from runs import RUN, THREE_EPOCHS, same_runs, same_weights


def test_best_is_the_lowest_validation_loss(fit: Command) -> None:
    fit(
        "--trainer.max_steps=12",
        "--evaluation.eval_freq=2",
        "--model.lr=0.3",
        "--model.config.emb_dim=16",
    )  # which soon raises the loss again
    rows = read_rows(Path("checkpoints/quickstart/metrics.csv"))
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    best_step = min(losses, key=lambda step: losses[step])
    assert best_step != max(losses)
    best = torch.load("checkpoints/quickstart/best.ckpt", weights_only=True)
    assert best["global_step"] == best_step + 1


@pytest.mark.parametrize(("threshold", "warnings"), [(0.0, 1), (30.0, 0)])
def test_slow_saves_of_the_best_checkpoint_are_reported_once(
    fit: Command, monkeypatch: pytest.MonkeyPatch, threshold: float, warnings: int
) -> None:
    """Training takes no time here, so that each save takes longer."""
    ticks = itertools.count(1)
    monkeypatch.setattr(Stopwatch, "seconds", lambda _: next(ticks) * 1e-9)
    monkeypatch.setattr(checkpoint_callback, "SLOW_SECONDS", threshold)
    err = fit("--trainer.max_steps=5", "--evaluation.eval_freq=1").err
    assert err.count("checkpoint.save_best: saving the best checkpoints has taken") == warnings


def test_asynchronous_save_changes_nothing(fit: Command) -> None:
    settings = (*THREE_EPOCHS, "--checkpoint.save_best=true")
    fit("--run=waiting", *settings)
    fit("--run=background", *settings, "--checkpoint.async_save=true")
    assert same_runs("waiting", "background")
    for name in ("last", "best"):
        assert same_weights(
            f"checkpoints/waiting/{name}.ckpt", f"checkpoints/background/{name}.ckpt"
        )


FULL_DISK = (f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.FullDisk",
             "--checkpoint.save_best=false", "--checkpoint.every_n_train_steps=1")  # fmt: skip


class StopAfterTwoEpochs(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 1


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_failed_last_save_is_repeated_at_the_end(fit: Command, asynchronous: str) -> None:
    """The save at the end of the second epoch fails, and a callback stops the run there."""
    arguments = [a for a in FULL_DISK if "every_n" not in a]
    fit("--trainer.max_epochs=9", f"--checkpoint.async_save={asynchronous}", *arguments,
        f"--trainer.callbacks+={__name__}.StopAfterTwoEpochs")  # fmt: skip
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 14


class FullDisk(Callback):
    """Callback with which the second save fails as on a full disk."""

    failing_save = 2

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        io = trainer.strategy.checkpoint_io
        real, saves = io.write, []

        def write(checkpoint: Any, path: Path) -> None:
            saves.append(path)
            if len(saves) == self.failing_save:
                raise OSError(28, "No space left on device")
            real(checkpoint, path)

        io.write = write


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_checkpoint_that_was_not_saved_is_not_the_best(
    fit: Command, asynchronous: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All losses are equal, so the first one is the lowest; its save fails."""
    monkeypatch.setattr(FullDisk, "failing_save", 1)
    fit("--trainer.max_steps=4", *FULL_DISK, "--checkpoint.save_best=true", "--model.lr=0",
        f"--checkpoint.async_save={asynchronous}", "--evaluation.eval_freq=1")  # fmt: skip
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == 2
    assert read_checkpoint(RUN / "last.ckpt")["global_step"] == 4


@pytest.mark.parametrize("max_steps", [3, 4])
@pytest.mark.parametrize("before", ["no best.ckpt", "an older best.ckpt"])
def test_resumed_run_names_the_best_checkpoint_that_a_kill_left_unnamed(
    fit: Command, before: str, max_steps: int
) -> None:
    """Evaluations follow steps 1 and 3, and the second one is better; with 3 steps the run had reached its end."""
    arguments = ["--evaluation.eval_freq=2", "--checkpoint.every_n_train_steps=100"]
    fit("--trainer.max_steps=1", *arguments)
    older = (RUN / "best.ckpt").read_bytes()
    fit("--trainer.max_steps=3", *arguments, "--ckpt_path=last")
    assert (RUN / "best.ckpt").samefile(RUN / "last.ckpt")
    (RUN / "best.ckpt").unlink()
    if before == "an older best.ckpt":
        (RUN / "best.ckpt").write_bytes(older)
    fit(f"--trainer.max_steps={max_steps}", *arguments, "--ckpt_path=last")
    assert read_checkpoint(RUN / "best.ckpt")["global_step"] == 3
    assert corruption_reason(RUN / "best.ckpt", read_manifest(RUN)) == ""
    assert read_checkpoint(RUN / "last.ckpt")["global_step"] == max_steps


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_training_continues_after_a_full_disk(fit: Command, asynchronous: str) -> None:
    result = fit("--trainer.max_steps=4", f"--checkpoint.async_save={asynchronous}", *FULL_DISK)
    lines = [line for line in result.err.splitlines() if "No space left" in line]
    assert len(lines) == 1
    assert "last.ckpt: cannot be written" in lines[0]
    assert "training continues" in lines[0]
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 4


def test_training_stops_after_a_full_disk_if_asked(command: Command, fit: Command) -> None:
    result = command("fit", *SMALL_QUICKSTART, *FULL_DISK,
                   "--trainer.max_steps=4", "--checkpoint.on_failure=stop")  # fmt: skip
    assert result.code == 2
    assert "No space left on device" in result.err.splitlines()[-1]
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 1
    fit("--trainer.max_steps=4", "--ckpt_path=last")


@pytest.mark.parametrize(
    "names",
    [["last.ckpt"], ["last.ckpt", "previous.ckpt", "best.ckpt"], ["manifest.json", "last.ckpt"]],
)
def test_removed_files_are_saved_again_at_once(
    fit: Command, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(RemovesFiles, "names", names)
    result = fit("--trainer.max_steps=3", "--checkpoint.every_n_train_steps=1", "--evaluation.eval_freq=1",
               "--allow_import=callbacks", "--trainer.callbacks+=callbacks.RemovesFiles")  # fmt: skip
    assert f"{RUN / 'last.ckpt'} is gone" in result.err
    assert "cannot be written" not in result.err
    assert read_checkpoint(latest_valid_checkpoint(RUN))["global_step"] == 3
    fit("--trainer.max_steps=5", "--ckpt_path=last")


@pytest.mark.parametrize(
    ("precision", "average"),
    [
        ("bf16-true", ()),
        ("32-true", ()),
        ("64-true", ()),
        ("bf16-true", ("--model.ema_decay=0.9",)),
    ],
)
def test_needed_disk_space_depends_on_precision_and_average(
    fit: Command,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    average: tuple[str, ...],
) -> None:
    fit("--run=real", "--trainer.max_steps=1", f"--trainer.precision={precision}", *average)
    real = Path("checkpoints/real/last.ckpt").stat().st_size
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * real * 98 // 100))
    arguments = ["fit", *SMALL_QUICKSTART, "--trainer.max_steps=1",
                 f"--trainer.precision={precision}", *average]  # fmt: skip
    result = command(*arguments)
    assert result.code == 2
    assert f"for 4 files of {real / 1e9:.2f} GB" in result.err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=4 * real * 102 // 100))
    assert command(*arguments).code == 0


def test_missing_disk_space_is_refused_before_the_first_step(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=14_000_000))
    result = command("fit", *SMALL_QUICKSTART,
                   "--trainer.max_steps=1")  # fmt: skip
    assert result.code == 2
    assert "needs 0.04 GB for 4 files of 0.01 GB, 0.01 GB are free" in result.err.splitlines()[-1]
    assert not RUN.exists()


# --- what Windows refuses -------------------------------------------------------------------------


def mapped_files() -> str:
    return Path("/proc/self/maps").read_text(errors="replace")


class RecordsMappedFiles(Callback):
    """Callback that records the mapped checkpoints when the first batch starts."""

    mapped: list[str] = []  # noqa: RUF012

    def on_train_batch_start(self, *_: Any) -> None:
        if not self.mapped:
            self.mapped.extend(line for line in mapped_files().splitlines() if ".ckpt" in line)
            self.mapped.append("end")


@pytest.mark.parametrize("rng", ["step", "global"])
def test_resumed_run_does_not_keep_its_checkpoint_mapped(
    fit: Command, monkeypatch: pytest.MonkeyPatch, rng: str
) -> None:
    fit("--trainer.max_steps=2", f"--rng={rng}")
    monkeypatch.setattr(RecordsMappedFiles, "mapped", [])
    fit("--trainer.max_steps=4", f"--rng={rng}", "--ckpt_path=last", f"--allow_import={__name__}",
        f"--trainer.callbacks+={__name__}.RecordsMappedFiles")  # fmt: skip
    assert RecordsMappedFiles.mapped == ["end"]


@pytest.mark.parametrize(("call", "cause"), [
    ("fsync", "Bad file descriptor"), ("link", ""), ("replace", "Access is denied"),
])  # fmt: skip
def test_system_that_refuses_a_step_of_a_save_is_found_before_the_first_step(
    command: Command, monkeypatch: pytest.MonkeyPatch, call: str, cause: str
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, cause or "Operation not permitted")

    monkeypatch.setattr(os, call, refuse)
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=2")
    if not cause:  # without hard links a save copies
        assert result.code == 0, result.err
        return
    assert_refused(result, "checkpoint: checkpoints/quickstart cannot be written", cause)
    assert not Path("checkpoints").exists()


def test_checkpoint_that_cannot_be_replaced_is_found_before_the_first_step(
    fit: Command, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps=2")
    real = os.replace

    def refuse_last(source: Any, dest: Any) -> None:
        if Path(dest).absolute() == Path("checkpoints/quickstart/last.ckpt").absolute():
            raise PermissionError(errno.EACCES, "used by another process", dest)
        real(source, dest)

    monkeypatch.setattr(os, "replace", refuse_last)
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=4", "--ckpt_path=last")
    assert result.code == 2
    assert "last.ckpt cannot be replaced (used by another process)" in result.err.splitlines()[-1]
    assert "(Step 000002)" not in result.out
    assert not list(Path("checkpoints/quickstart").glob(".*.tmp"))
