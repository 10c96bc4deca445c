"""Sending metrics to the trainer's loggers. If the disk is full they are lost, and the run continues."""

import logging
import os
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepPosition:
    """Position of an optimizer step in the run.

    Attributes:
        step: Steps before it, so that the first step is step 0, as in the book.
        epochs: Epochs with this step, a fraction.
    """

    step: int
    epochs: float

    @classmethod
    def of(cls, trainer: Trainer, batch_idx: int) -> "StepPosition":
        """Return the position of the step that has just ended with the micro-batch ``batch_idx`` of its epoch."""
        share = (batch_idx + 1) / int(trainer.num_training_batches)
        return cls(trainer.global_step - 1, trainer.current_epoch + share)


@runtime_checkable
class MetricsListener(Protocol):
    """Any callback of the trainer with this method receives the metrics of training and of evaluations."""

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: Mapping[str, float],
        position: StepPosition,
    ) -> None:
        """Act on the metrics of a step: ``TrainMetrics.TAGS``, or ``EvaluationCallback.TAGS`` after an evaluation.

        With ``evaluation.tasks`` also the metrics of a task evaluation, which begin with ``eval/``.

        An evaluation's metrics come before ``on_step_end`` of its step. On a GPU those of training come one step later.
        """
        ...


def publish_metrics(
    trainer: Trainer,
    module: LightningModule,
    metrics: Mapping[str, float],
    position: StepPosition,
) -> None:
    """Log metrics to all loggers of the trainer, and give them to each :class:`MetricsListener` of its callbacks."""
    log_metrics(trainer, metrics, position.step)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MetricsListener):
            callback.on_metrics(trainer, module, metrics, position)


def log_metrics(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Log to all loggers of the trainer."""
    for each in trainer.loggers:
        ignore_full_disk(partial(each.log_metrics, dict(metrics), step=step))


_logged_causes: set[str] = set()


def ignore_full_disk(write: Callable[[], object]) -> None:
    """Write metrics; if the disk refuses, log the cause once and continue."""
    try:
        write()
    except (OSError, ValueError) as error:
        # Lightning's logger raises a ValueError from whatever happens.
        disk = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(disk, OSError):
            raise
        cause = disk.strerror or str(disk)
        if cause not in _logged_causes:
            _logged_causes.add(cause)
            logger.warning(f"metrics cannot be written ({cause}); training continues without them")


# folder → tag; the losses that TensorBoard draws in one chart
_CHART = {"train": "train/loss", "val": "val_loss", "val_ema": "val_loss_ema"}


class RunTensorBoardLogger(TensorBoardLogger):
    """Logger that writes TensorBoard's event files to the run's folder; config.yaml replaces ``hparams.yaml``.

    TensorBoard draws the values of one tag in one chart, with a line for each folder. So the losses of training and
    validation are also written with the tag ``loss`` to the folders ``train`` and ``val``, and that of averaged weights
    to ``val_ema``.

    Args:
        folder: Folder of the run.
        purge_step: Step from which on TensorBoard removes what is there, because it is logged again.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        super().__init__(
            save_dir=folder.parent,
            name=folder.name,
            version="",
            default_hp_metric=False,
            purge_step=purge_step,
        )
        self._purge_step = purge_step
        self._chart: dict[str, SummaryWriter] = {}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        for name, tag in _CHART.items():
            writer = self._chart_writer(name) if tag in metrics or self._is_resumed(name) else None
            if writer is not None and tag in metrics:
                writer.add_scalar("loss", metrics[tag], step)

    def _is_resumed(self, name: str) -> bool:
        """Return whether a folder of the chart has points that the writer must remove."""
        return os.path.isdir(os.path.join(self.log_dir, name))

    def _chart_writer(self, name: str) -> "SummaryWriter":
        if name not in self._chart:
            from torch.utils.tensorboard import SummaryWriter

            folder = os.path.join(self.log_dir, name)
            self._chart[name] = SummaryWriter(folder, purge_step=self._purge_step)
        return self._chart[name]

    def save(self) -> None:
        for writer in (self.experiment, *self._chart.values()):
            ignore_full_disk(writer.flush)

    def finalize(self, status: str) -> None:
        ignore_full_disk(lambda: super(RunTensorBoardLogger, self).finalize(status))
        for writer in self._chart.values():
            ignore_full_disk(writer.close)


def block_tensorflow() -> None:
    """Keep TensorBoard from importing TensorFlow, which takes 6 s and 500 MB where it is installed."""
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, types.ModuleType(name))
