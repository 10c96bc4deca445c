"""Sending metrics to the trainer's loggers. If the disk is full they are lost, and the run continues."""

import logging
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

logger = logging.getLogger(__name__)


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


class RunTensorBoardLogger(TensorBoardLogger):
    """Logger that writes TensorBoard's event files to the run's folder; config.yaml replaces ``hparams.yaml``."""

    def save(self) -> None:
        ignore_full_disk(self.experiment.flush)

    def finalize(self, status: str) -> None:
        ignore_full_disk(lambda: super(RunTensorBoardLogger, self).finalize(status))


def block_tensorflow() -> None:
    """Keep TensorBoard from importing TensorFlow, which takes 6 s and 500 MB where it is installed."""
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, types.ModuleType(name))
