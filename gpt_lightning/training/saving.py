"""When a run is saved: ``last`` at intervals and when it stops, ``best`` with it."""

import math
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpt_lightning.training.checkpoint import (
    BEST,
    LAST,
    DurableCheckpointIO,
    copy_of,
    remove_leftovers,
)
from gpt_lightning.training.progress import total_steps

OnFailure = Literal["go_on", "stop"]


def checkpointing(
    folder: Path,
    every_n_train_steps: int | None = None,
    best: bool = True,
    keep_previous: bool = True,
    asynchronous: bool = False,
    on_failure: OnFailure = "go_on",
) -> tuple["RunCheckpoints", DurableCheckpointIO]:
    """What is behind the settings ``checkpoint.*``.

    Args:
        folder: The run's.
        every_n_train_steps: Updates from one save of last.ckpt to the next; none: at each epoch's end.
        best: Whether best.ckpt, the one with the lowest val_loss, is kept too; costs a checkpoint's size
            in memory.
        keep_previous: Whether the last.ckpt before is kept as previous.ckpt, should the newest be damaged.
        asynchronous: Whether training goes on while a copy is written; costs a checkpoint's size in memory.
        on_failure: What a save that fails does, on a full disk say: 'go_on' and try again at the next
            interval, or 'stop'. The one before stays whole either way.
    """
    io = DurableCheckpointIO(asynchronous, keep_previous)
    return RunCheckpoints(folder, io, every_n_train_steps, best, on_failure), io


class RunCheckpoints(Checkpoint):
    """``last.ckpt`` and ``best.ckpt``, the one with the lowest validation loss so far.

    Both are written at the same intervals and at the end. In between the best is a copy in memory, as a
    run that has just begun is at its best with every evaluation; a killed run finds it again when it is
    resumed. The ``last`` of Lightning's ``ModelCheckpoint`` is the last of its best, and may be steps old.

    Args:
        folder: The run's.
        io: What writes the files.
        every_n_train_steps: Updates from one save to the next; none: at the end of each epoch.
        best: Whether the best is kept too.
        on_failure: Whether training goes on after a save that failed. One at the end always stops.
    """

    def __init__(
        self,
        folder: Path,
        io: DurableCheckpointIO,
        every_n_train_steps: int | None = None,
        best: bool = True,
        on_failure: OnFailure = "go_on",
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_train_steps: {every_n_train_steps} is too small; give 1 or more"
            )
        self.folder = folder
        self.io = io
        self.every_n_train_steps = every_n_train_steps
        self.best = best
        self.on_failure = on_failure
        self.best_val_loss: float | None = None
        self._best: dict[str, Any] | None = None  # not yet written
        self._seen_step = -1
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
            self._check_room(pl_module)

    def _check_room(self, module: LightningModule) -> None:
        """``OSError`` where two checkpoints, or one more than there is, do not fit, or none may be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        probe = self.folder / ".probe.tmp"
        probe.write_bytes(b"")
        probe.unlink()
        # weights and AdamW's two moments
        size = 3 * sum(p.numel() * p.element_size() for p in module.parameters())
        needed = size if (self.folder / LAST).exists() else 2 * size
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise OSError(
                f"checkpoint: {self.folder} needs {needed / 1e9:.2f} GB for checkpoints of "
                f"{size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, or give "
                "--trainer.default_root_dir"
            )

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Everything is saved from this hook: what Lightning saves in later ones says that the epoch is
        # over, also where max_steps cut it, and a resumed run would leave out the rest of it.
        step = trainer.global_step
        if step == self._seen_step:
            return
        self._seen_step = step
        val_loss = trainer.callback_metrics.get("val_loss")
        if self.best and val_loss is not None and self._is_lowest(float(val_loss)):
            self.best_val_loss = float(val_loss)
            self._best = None  # its memory is free before the next copy takes as much
            self._best = copy_of(trainer._checkpoint_connector.dump_checkpoint())
        ends = trainer.should_stop or step == total_steps(trainer)
        if ends or self._is_due(trainer):
            self._save(trainer, pl_module, ends=ends)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._saved_step:  # something else ended the run early
            self._save(trainer, pl_module, ends=True)

    def _is_lowest(self, val_loss: float) -> bool:
        if self.best_val_loss is None:
            return math.isfinite(val_loss)
        return val_loss < self.best_val_loss

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_n_train_steps is None:
            return trainer.is_last_batch
        return trainer.global_step % self.every_n_train_steps == 0

    def _save(self, trainer: Trainer, module: LightningModule, *, ends: bool) -> None:
        if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
            raise FloatingPointError(
                f"step {trainer.global_step - 1}: has made parameters that are not finite; "
                f"{self.folder / LAST} stays the one before"
            )
        self._saved_step = trainer.global_step
        if self._best is not None:
            trainer.strategy.save_checkpoint(self._best, self.folder / BEST)
            self._best = None
        trainer.save_checkpoint(self.folder / LAST)
        if ends:
            self.io.finish()
        failure, self.io.failure = self.io.failure, None
        # every rank hears of what happened on the one that writes
        if trainer.strategy.reduce_boolean_decision(failure is None, all=True):
            return
        if ends or self.on_failure == "stop":
            raise failure or OSError(
                f"{self.folder / LAST}: cannot be written by rank 0; see there"
            )
        if failure is not None:
            print(
                f"gpt_lightning: {failure}; training goes on, the next save tries again",
                file=sys.stderr,
                flush=True,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]
