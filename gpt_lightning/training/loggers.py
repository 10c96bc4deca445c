"""Figures to a trainer's loggers. A disk that is full costs figures, and not the run."""

import logging
from collections.abc import Callable, Mapping
from functools import partial

from lightning.pytorch import Trainer

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
