"""How many optimizer steps a run has."""

import math
from typing import NamedTuple

from lightning.pytorch import Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.epochs import EpochShape


class Progress(NamedTuple):
    """What a run has done before it starts or resumes."""

    steps: int = 0
    tokens: int = 0


def epoch_shape(trainer: Trainer) -> EpochShape | None:
    """Return the batches and steps of an epoch; ``None`` if the data are not a :class:`TextDataModule`."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.epoch_shape() if isinstance(data, TextDataModule) else None


def run_steps(
    epoch: EpochShape | None, trainer: Trainer, max_tokens: int | None, done: Progress
) -> int | None:
    """Return the optimizer steps of a run from its start to its end; ``None`` if it has no end.

    The steps that are done count as they were; what is left has the batches of ``epoch``, because a run may be resumed
    with others.

    Args:
        epoch: Batches and steps of an epoch; ``None``: not known, so Lightning counts.
    """
    if epoch is None:
        steps = trainer.estimated_stepping_batches
        return int(steps) if math.isfinite(steps) and steps >= 0 else None
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    tokens = [] if max_tokens is None else [max_tokens]
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        tokens.append(trainer.max_epochs * epoch.tokens)
    if tokens:
        left = max(0, min(tokens) - done.tokens)
        batches = done.tokens % epoch.tokens // epoch.tokens_per_batch
        limits.append(done.steps + epoch.steps_for(left, after_batches=batches))
    return min(limits, default=None)
