"""When ``last.ckpt``, ``best.ckpt`` (lowest validation loss) and ``step-000500.ckpt`` are saved."""

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor
from torch.optim import Optimizer

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.flops import parameters
from gpt_lightning.model.precision import PRECISIONS
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_io import (
    BEST,
    LAST,
    PREVIOUS,
    AtomicCheckpointIO,
    remove_leftovers,
    step_checkpoints,
    step_name,
)
from gpt_lightning.training.config import OnFailure
from gpt_lightning.training.distributed import local
from gpt_lightning.training.lightning_compat import dump_checkpoint
from gpt_lightning.training.loggers import StepPosition, ignore_full_disk
from gpt_lightning.training.save_checks import check_content, check_is_replaceable, check_saves
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.stopping import ends_run
from gpt_lightning.training.throughput import Stopwatch

logger = logging.getLogger(__name__)

SLOW_SECONDS = 30.0  # of saves for best.ckpt alone; less is not worth a warning


@dataclass(frozen=True)
class BestCheckpoint:
    """Lowest validation loss that was saved, and the step that has it; infinite and ``None`` if there is none."""

    val_loss: float = math.inf
    step: int | None = None


class CheckpointCallback(StepEndCallback, Checkpoint):
    """Callback that saves ``last.ckpt``, and keeps the one with the lowest validation loss so far as ``best.ckpt``.

    It saves at intervals, when the run ends, and after each evaluation that is the best so far. The best one is
    saved as ``last.ckpt`` first, which then gets the second name ``best.ckpt``: a hard link, or a copy on a file
    system without hard links. A run that was killed between the two names gets the second one when it resumes, so
    that best.ckpt is always the one of an uninterrupted run at the same step. The checkpoints that are kept at
    intervals, such as ``step-000500.ckpt``, are further names in the same way.

    Early in a run nearly every evaluation is the best so far, so nearly every evaluation saves. A save that fails
    does not count: the next evaluations are compared with the best one that was saved before. The ``last`` of
    Lightning's ``ModelCheckpoint`` is its last best one, which may be many steps old.

    Args:
        folder: Folder of the run.
        io: Writer of the files.
        clock: Stopwatch that is stopped during a save.
        every_n_train_steps: Optimizer steps between two saves; ``None``: at the end of each epoch.
        save_best: Whether the best checkpoint is kept too.
        keep_every_n_train_steps: Optimizer steps between two checkpoints that are kept; ``None``: none is.
        on_failure: Whether training continues after a failed save. A failed save at the end always stops it.

    Attributes:
        best: The best evaluation that was saved.
    """

    def __init__(
        self,
        folder: Path,
        io: AtomicCheckpointIO,
        clock: Stopwatch,
        every_n_train_steps: int | None = None,
        save_best: bool = True,
        keep_every_n_train_steps: int | None = None,
        on_failure: OnFailure = "continue",
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise ValueError(
                f"checkpoint.every_n_train_steps: {every_n_train_steps} is too small; give 1 or more"
            )
        self.folder = folder
        self.io = io
        self.clock = clock
        self.every_n_train_steps = every_n_train_steps
        self.save_best = save_best
        self.keep_every_n_train_steps = keep_every_n_train_steps
        self.on_failure = on_failure
        self._evaluated = (-1, math.inf)  # steps and val_loss at the last evaluation
        self.best = BestCheckpoint()
        self._best_before = BestCheckpoint()  # stays the best one if the current save fails
        self._saved_step = -1
        self._start = 0.0
        self._best_seconds = 0.0  # of saves that only best.ckpt needs
        self._has_warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._saved_step = trainer.global_step
        self._start = self.clock.seconds()
        # On all ranks, so that no rank waits for one that has refused.
        try:
            check_content(dump_checkpoint(trainer))
        except ValueError:
            if trainer.is_global_zero:
                raise
            raise SystemExit(2) from None
        for optimizer in trainer.optimizers:
            _copy_from_mapped_file(optimizer)
        if trainer.is_global_zero:
            remove_leftovers(self.folder)
            self._check_last_is_replaceable()

    def _check_last_is_replaceable(self) -> None:
        path = self.folder / LAST
        if path.exists():
            try:
                check_is_replaceable(path)
            except OSError as error:
                raise OSError(
                    f"checkpoint: {path} cannot be replaced ({error.strerror}); close the program that reads it"
                ) from error

    def check_disk_space(
        self,
        config: GPTConfig,
        state_values: int,
        precision: str,
        run_steps: int | None,
        *,
        has_ema: bool = False,
    ) -> None:
        """Check that the disk has space for the files that the run keeps and the one that is being written.

        Args:
            state_values: Values that the optimizer saves, see :meth:`OptimizerConfig.state_values`.
            precision: Lightning's name; weights and moments are saved in the precision of training.
            run_steps: Optimizer steps of the run; ``None``: it has no end.
            has_ema: Whether the average of the weights is saved too, at least in float32.

        Raises:
            OSError: There is not enough space, or the system refuses a step of a save.
        """
        # The folder is not made here: a refused run leaves nothing behind.
        existing = next(p for p in (self.folder, *self.folder.absolute().parents) if p.exists())
        try:
            check_saves(existing)
        except OSError as error:
            raise OSError(
                f"checkpoint: {self.folder} cannot be written ({error}); give another --trainer.default_root_dir"
            ) from error
        dtype = PRECISIONS[precision][0] if precision in PRECISIONS else torch.float32
        size = dtype.itemsize * (parameters(config) + state_values)
        size += max(4, dtype.itemsize) * parameters(config) * has_ema
        kept = [LAST, *([PREVIOUS] * self.io.keep_previous), *([BEST] * self.save_best)]
        # several names may be links to one file
        paths = [*(self.folder / name for name in kept), *step_checkpoints(self.folder).values()]
        files = {path.stat().st_ino for path in paths if path.exists()}
        steps = kept_steps(run_steps, self.keep_every_n_train_steps, self.io.max_to_keep)
        missing = max(1, 1 + len(kept) + steps - len(files))
        free = shutil.disk_usage(existing).free
        if missing * size > free:
            raise OSError(
                f"checkpoint: {self.folder} needs {missing * size / 1e9:.2f} GB for {missing} files of "
                f"{size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; make room, give another "
                "--trainer.default_root_dir, or keep fewer: --checkpoint.save_best false, "
                f"--checkpoint.keep_previous false{', a smaller --checkpoint.max_to_keep' if steps else ''}"
            )

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Mapping[str, float],
        position: StepPosition,
    ) -> None:
        if "val_loss" in metrics:
            self._evaluated = (position.step + 1, metrics["val_loss"])

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        # All checkpoints are saved from this hook. In later hooks Lightning's counters say that the epoch is over,
        # also where max_steps ended it early, and a resumed run would skip the rest of the epoch.
        ends = ends_run(trainer)
        if self.save_best and self._evaluated[0] == trainer.global_step:
            self._is_written(trainer, ends=False)  # a failed save is not the best one
        if ends or self._is_due(trainer):
            with self.clock.stopped(pl_module.device):
                self._save(trainer, pl_module, ends=ends)
        elif self._is_best(trainer):
            start = time.perf_counter()
            with self.clock.stopped(pl_module.device):
                self._save(trainer, pl_module, ends=False)
            self._warn_if_slow(time.perf_counter() - start)

    def _warn_if_slow(self, seconds: float) -> None:
        """Warn once when the saves for best.ckpt alone take longer than the training between them."""
        self._best_seconds += seconds
        limit = max(SLOW_SECONDS, self.clock.seconds() - self._start)
        if self._best_seconds > limit and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"checkpoint.save_best: saving the best checkpoints has taken {self._best_seconds:.0f} s, more than "
                "training; give a larger --evaluation.eval_freq, or --checkpoint.save_best false"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Something else ended the run early, or an asynchronous save failed.
        self.io.finish()
        if not self._is_written(trainer, ends=False) or trainer.global_step != self._saved_step:
            self._save(trainer, pl_module, ends=True)

    def _is_best(self, trainer: Trainer) -> bool:
        """Return whether this step was just evaluated, with the lowest validation loss so far."""
        step, val_loss = self._evaluated
        return self.save_best and step == trainer.global_step and val_loss < self.best.val_loss

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A process that is killed after the save loses what the loggers buffer. The other callbacks have logged all
        # that they have until this step.
        for logger in trainer.loggers:
            ignore_full_disk(logger.save)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.training and trainer.is_global_zero and trainer.ckpt_path is not None:
            self.restore_names(Path(trainer.ckpt_path), checkpoint)

    def restore_names(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Give a checkpoint that is resumed the further names that it should have; a kill may have come just before."""
        step = checkpoint["global_step"]
        names = [step_name(step)] if self._is_kept(step) else []
        best_step = checkpoint["callbacks"].get(self.state_key, {}).get("best_step")
        if self.save_best and best_step == step:
            names.append(BEST)
        for other in (self.folder / name for name in names):
            is_there = other.exists() and other.samefile(path)
            if not is_there and path.resolve().parent == self.folder.resolve():
                self.io.add_name(path.resolve(), other.name)
        later = self.saved_best_step()
        if self.save_best and later is not None and later > step:
            logger.warning(
                f"{self.folder / BEST}: is of step {later - 1}, and the run continues from step {step}; it stays until an "
                "evaluation of this run is the best so far"
            )

    def saved_best_step(self) -> int | None:
        """Return the optimizer steps of best.ckpt; ``None`` if it cannot be read."""
        try:
            step: int = read_checkpoint(self.folder / BEST)["global_step"]
        except (OSError, ValueError, KeyError):
            return None
        return step

    def _is_kept(self, step: int) -> bool:
        """Return whether the checkpoint after ``step`` optimizer steps is kept."""
        every = self.keep_every_n_train_steps
        return every is not None and step > 0 and step % every == 0

    def _is_due(self, trainer: Trainer) -> bool:
        if self._is_kept(trainer.global_step):
            return True
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
        self.io.finish()
        self._is_written(trainer, ends=False)
        self._best_before, is_best = self.best, self._is_best(trainer)
        if is_best:
            self.best = BestCheckpoint(val_loss=self._evaluated[1], step=trainer.global_step)
        names = [step_name(trainer.global_step)] if self._is_kept(trainer.global_step) else []
        trainer.save_checkpoint(
            self.folder / LAST,
            weights_only=False,
            storage_options={"also_named": [*names, *([BEST] * is_best)]},
        )
        self._saved_step = trainer.global_step
        if ends:
            self.io.finish()
        self._is_written(trainer, ends=ends)

    def _is_written(self, trainer: Trainer, *, ends: bool) -> bool:
        """Return whether all finished saves succeeded, on every rank; rank 0 writes them.

        Raises:
            OSError: A save failed, and the run has to end.
        """
        failures = dict(self.io.failures)
        self.io.failures.clear()
        if trainer.strategy.reduce_boolean_decision(not failures, all=True):
            return True
        self._saved_step = -1
        self.best = self._best_before
        failure = next(iter(failures.values()), None)
        if ends or self.on_failure == "stop":
            if failure is None:
                raise SystemExit(2)
            raise failure
        if failure is not None:
            logger.warning(f"{failure}; training continues, the next save tries again")
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"best_val_loss": self.best.val_loss, "best_step": self.best.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        val_loss = state_dict["best_val_loss"]
        self.best = BestCheckpoint(
            math.inf if val_loss is None else val_loss, state_dict.get("best_step")
        )


def kept_steps(run_steps: int | None, every: int | None, max_to_keep: int | None) -> int:
    """Number of checkpoints of steps that a run keeps; of a run without an end, at least so many.

    Args:
        run_steps: Optimizer steps of the run; ``None``: it has no end.
        every: Optimizer steps between two; ``None``: none is kept.
        max_to_keep: Limit; ``None``: all.
    """
    if every is None:
        return 0
    if run_steps is None:
        return max_to_keep or 1
    count = run_steps // every
    return count if max_to_keep is None else min(count, max_to_keep)


def _copy_from_mapped_file(optimizer: Optimizer) -> None:
    """Copy an optimizer state that a resumed run has on the CPU: the tensors are views of the mapped last.ckpt.

    Windows refuses to replace a file while it is mapped. Elsewhere the copy is made too, so that it is tested.
    """
    for state in optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.device.type == "cpu":
                state[key] = value.clone()
