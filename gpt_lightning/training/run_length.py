"""How many optimizer steps a run has."""

from lightning.pytorch import Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.epochs import EpochShape


def epoch_shape(trainer: Trainer) -> EpochShape | None:
    """Return the batches and steps of an epoch; ``None`` if the data are not a :class:`TextDataModule`."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.epoch_shape() if isinstance(data, TextDataModule) else None


def run_steps(epoch: EpochShape | None, trainer: Trainer, max_tokens: int | None) -> int | None:
    """Return the optimizer steps of a run from its start to its end; ``None`` if it has no end.

    Args:
        epoch: Batches and steps of an epoch; ``None``: not known, so only ``trainer.max_steps`` ends the run.
    """
    if epoch is None:
        return trainer.max_steps if trainer.max_steps >= 0 else None
    return epoch.steps_of_run(trainer.max_steps, trainer.max_epochs, max_tokens)
