"""Metrics to a trainer's loggers. A full disk costs metrics, and does not stop the run."""

import logging
import sys
import types
from collections.abc import Callable, Mapping
from functools import partial

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

logger = logging.getLogger(__name__)


def log_metrics(trainer: Trainer, figures: Mapping[str, float], step: int) -> None:
    """To all loggers of the trainer."""
    for logger in trainer.loggers:
        attempt(partial(logger.log_metrics, dict(figures), step=step))


_said: set[str] = set()


def attempt(write: Callable[[], object]) -> None:
    """Write figures; where that fails it is said, each cause once, and training goes on."""
    try:
        write()
    except (OSError, ValueError) as error:
        # Lightning's logger turns whatever it meets into a ValueError
        disk = error if isinstance(error, OSError) else error.__cause__
        if not isinstance(disk, OSError):
            raise
        cause = disk.strerror or str(disk)
        if cause not in _said:
            _said.add(cause)
            logger.warning(f"figures cannot be written ({cause}); training goes on without")


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files in the run's folder, without ``hparams.yaml``: config.yaml says it all."""

    def save(self) -> None:
        attempt(self.experiment.flush)

    def finalize(self, status: str) -> None:
        attempt(lambda: super(RunTensorBoardLogger, self).finalize(status))


def block_tensorflow() -> None:
    """TensorBoard imports TensorFlow where it is installed, 6 s and 500 MB, unless this module exists."""
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, types.ModuleType(name))
