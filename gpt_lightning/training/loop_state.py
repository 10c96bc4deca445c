"""Lightning's loop counters in a checkpoint: one form, whichever hook saved them and whatever reads them.

A checkpoint is a position after a batch of an epoch. ``batch_progress`` says whether the hooks at the batch's end
are still to run (``completed`` is one behind, as in ``on_train_batch_end``, where runs are saved) or have run.
``epoch_progress`` says that the epoch is in progress, or that it is complete. A resumed run continues there:
:class:`gpt_lightning.training.epoch_loop.FastTrainingEpochLoop`.
"""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.datamodule import TextDataModule

logger = logging.getLogger(__name__)


class LoopState(Callback):
    """Keeps the counters in that form, and corrects them by the position of the data when a run resumes.

    The data loader knows the epoch and the windows it has handed out. Lightning's counts are made to agree with it:

    - Lightning 2.6.6 leaves an epoch out of its counts when a run resumes at an epoch's end, and repeats an epoch
      at the next resume. Checkpoints that were written so are corrected, with a warning.
    - Batches are counted in the batches of the run that saves. On another number of devices, or with another
      ``batch_size``, as many windows are another number of batches.
    """

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _normalise(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        loaders = loop["state_dict"].get("combined_loader", [])
        data = trainer.datamodule  # type: ignore[attr-defined]
        if loaders and isinstance(data, TextDataModule):
            _agree_with(loaders[0], loop, data.windows_per_batch)
        _normalise(loop)
        current = loop["epoch_loop.batch_progress"]["current"]
        at_batch_end = current["completed"] < current["ready"]
        # not yet counted for the last update where its batch's end is still to come
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(
            0, checkpoint["global_step"] - at_batch_end
        )


def _normalise(loop: dict[str, Any]) -> None:
    """Count the epoch of the last batch as complete only if it is over and the batch's end hooks have run.

    A run that is stopped in mid-epoch runs the epoch's end hooks, and Lightning counts that epoch as complete.
    """
    batches = loop["epoch_loop.batch_progress"]
    ended = batches["current"]["completed"] == batches["current"]["ready"]
    is_over = ended and batches["is_last_batch"]
    for counts in loop["epoch_progress"].values():
        counts["ready"] = counts["started"]
        counts["processed"] = counts["completed"] = max(0, counts["started"] - (not is_over))


def _agree_with(loader: dict[str, Any], loop: dict[str, Any], windows_at_a_time: int) -> None:
    """Take the epoch, and the batches of it, from the saved state of the data loader."""
    epochs = loader["epoch"] + 1
    recorded = loop["epoch_progress"]["current"]["started"]
    if recorded != epochs:
        logger.warning(
            f"ckpt_path: the checkpoint counts {recorded} epochs, its data are in epoch {epochs} (an earlier "
            "version miscounted after a resume at an epoch's end); the data's count is used"
        )
        for counts in loop["epoch_progress"].values():
            counts["started"] = epochs
    batches, rest = divmod(loader["windows_seen"], windows_at_a_time)
    current = loop["epoch_loop.batch_progress"]["current"]
    if rest or current["ready"] == batches:  # the loader refuses what does not fit
        return
    shift = batches - current["ready"]
    for stage in current:
        current[stage] += shift
