"""When a run is saved: ``last`` at intervals and when it stops, ``best`` with it."""

import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.flops import parameters
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.training.checkpoint_io import (
    BEST,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    check_content,
    copy_of,
    remove_leftovers,
)
from gpt_lightning.training.distributed import local
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.lightning_compat import dump_checkpoint
from gpt_lightning.training.loggers import attempt
from gpt_lightning.training.stopping import ends_run
from gpt_lightning.training.throughput import Stopwatch

logger = logging.getLogger(__name__)

OnFailure = Literal["continue", "stop"]


def checkpointing(
    folder: Path,
    losses: EvaluationCallback,
    clock: Stopwatch,
    every_n_train_steps: int | None = None,
    save_best: bool = True,
    keep_previous: bool = True,
    async_save: bool = False,
    on_failure: OnFailure = "continue",
) -> tuple["CheckpointCallback", AtomicCheckpointIO]:
    """What is behind the settings ``checkpoint.*``.

    Args:
        folder: The run's.
        losses: What evaluates it.
        clock: Stopped during a save.
        every_n_train_steps: Updates from one save of last.ckpt to the next; none: at each epoch's end.
        save_best: Whether best.ckpt, the one with the lowest val_loss, is kept too; costs a checkpoint's size
            in memory.
        keep_previous: Whether the last.ckpt before is kept as previous.ckpt, should the newest be damaged.
        async_save: Whether training goes on while a copy is written; costs a checkpoint's size in memory.
        on_failure: What a save that fails does, on a full disk say: 'continue' and try again at the next
            interval, or 'stop'. The one before stays whole either way.
    """
    io = AtomicCheckpointIO(async_save, keep_previous)
    return CheckpointCallback(
        folder, io, losses, clock, every_n_train_steps, save_best, on_failure
    ), io


class CheckpointCallback(Checkpoint):
    """``last.ckpt`` and ``best.ckpt``, the one with the lowest validation loss so far.

    Both are written at the same intervals and at the end. In between the best is a copy in memory, as a
    run that has just begun is at its best with every evaluation; a killed run finds it again when it is
    resumed. The ``last`` of Lightning's ``ModelCheckpoint`` is the last of its best, and may be steps old.

    Args:
        folder: The run's.
        io: What writes the files.
        losses: By whose val_loss a checkpoint is the best.
        clock: Stopped during a save.
        every_n_train_steps: Updates from one save to the next; none: at the end of each epoch.
        save_best: Whether the best is kept too.
        on_failure: Whether training goes on after a save that failed. One at the end always stops.
    """

    def __init__(
        self,
        folder: Path,
        io: AtomicCheckpointIO,
        losses: EvaluationCallback,
        clock: Stopwatch,
        every_n_train_steps: int | None = None,
        save_best: bool = True,
        on_failure: OnFailure = "continue",
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_train_steps: {every_n_train_steps} is too small; give 1 or more"
            )
        self.folder = folder
        self.io = io
        self.losses = losses
        self.clock = clock
        self.every_n_train_steps = every_n_train_steps
        self.save_best = save_best
        self.on_failure = on_failure
        self.best_val_loss: float | None = None
        self._best: dict[str, Any] | None = None  # not yet written
        self._being_written: dict[str, Any] | None = None  # a best that may yet have failed
        self._seen_step = -1
        self._saved_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = self._saved_step = trainer.global_step
        # on all ranks alike, so that none waits for one that has refused
        try:
            check_content(dump_checkpoint(trainer))
        except ValueError:
            if trainer.is_global_zero:
                raise
            raise SystemExit(2) from None
        if trainer.is_global_zero:
            remove_leftovers(self.folder)

    def check_room(self, config: GPTConfig, precision: str) -> None:
        """``OSError`` where the files that the run will keep, and the one being written, do not fit.

        Args:
            precision: Lightning's name of it; weights and moments are saved as they are trained.
        """
        # a run that is refused leaves nothing, not its folder either
        place = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        try:
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise OSError(
                f"checkpoint: {self.folder} cannot be written ({error.strerror}); give another "
                "--trainer.default_root_dir"
            ) from error
        dtype = PRECISIONS[precision][0] if precision in PRECISIONS else torch.float32
        size = 3 * dtype.itemsize * parameters(config)  # weights and AdamW's two moments
        kept = [LAST, *([PREVIOUS] * self.io.keep_previous), *([BEST] * self.save_best)]
        missing = 1 + sum(not (self.folder / name).exists() for name in kept)
        free = shutil.disk_usage(place).free
        if missing * size > free:
            raise OSError(
                f"checkpoint: {self.folder} needs {missing * size / 1e9:.2f} GB for {missing} files of "
                f"{size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, give another "
                "--trainer.default_root_dir, or keep fewer: --checkpoint.save_best false, "
                "--checkpoint.keep_previous false"
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
        row = self.losses.row
        if self.save_best and row.get("step") == step - 1 and self._is_lowest(row["val_loss"]):
            self.best_val_loss = row["val_loss"]
            self._best = self._being_written = None  # memory for the copy
            with self.clock.stopped(pl_module.device):
                self._best = copy_of(dump_checkpoint(trainer))
        ends = ends_run(trainer)
        if ends or self._is_due(trainer):
            with self.clock.stopped(pl_module.device):
                self._save(trainer, pl_module, ends=ends)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # something else ended the run early, or the save under way has failed
        self.io.finish()
        if not self._is_written(trainer, ends=False) or trainer.global_step != self._saved_step:
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
        finite = all(bool(torch.isfinite(local(p)).all()) for p in module.parameters())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise FloatingPointError(
                f"step {trainer.global_step - 1}: has made parameters that are not finite; "
                f"{self.folder / LAST} stays the one before"
            )
        # a process that is killed after the save loses what its loggers hold back
        for logger in trainer.loggers:
            attempt(logger.save)
        if self._best is not None:
            self._being_written, self._best = self._best, None
            trainer.strategy.save_checkpoint(self._being_written, self.folder / BEST)
        trainer.save_checkpoint(self.folder / LAST)
        self._saved_step = trainer.global_step
        if ends:
            self.io.finish()
        self._is_written(trainer, ends=ends)

    def _is_written(self, trainer: Trainer, *, ends: bool) -> bool:
        """Whether all saves that have ended went well; every rank hears of the one that writes.

        Raises:
            OSError: One did not, and the run is to end with it.
        """
        failures = dict(self.io.failures)
        self.io.failures.clear()
        if trainer.strategy.reduce_boolean_decision(not failures, all=True):
            return True
        self._saved_step = -1
        if self._best is None:  # tried again with the next, unless a lower one comes
            self._best = self._being_written
        failure = next(iter(failures.values()), None)
        if ends or self.on_failure == "stop":
            if failure is None:
                raise SystemExit(2)
            raise failure
        if failure is not None:
            logger.warning(f"{failure}; training goes on, the next save tries again")
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best_val_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_val_loss = state_dict["best_val_loss"]
