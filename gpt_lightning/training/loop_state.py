"""Lightning's loop counters in a checkpoint, corrected so that every checkpoint means the same position.

A checkpoint is a position after a batch of an epoch. ``batch_progress`` says whether the hooks at the end of the batch
have run: ``completed`` is one behind ``ready`` if they have not, as in ``on_train_batch_end``, where runs are saved.
``epoch_progress`` says whether the epoch is complete. A resumed run continues there:
:class:`gpt_lightning.training.lightning_compat.FastTrainingEpochLoop`.
"""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.training.lightning_compat import set_logged_steps

logger = logging.getLogger(__name__)


class LoopState(Callback):
    """Callback that saves the counters in that form, and corrects them by the data's position when a run resumes.

    The data loader knows the epoch and the number of windows it has returned. Lightning's counters are changed to
    agree with it:

    - Lightning 2.6.6 misses an epoch when a run resumes at the end of an epoch, and repeats one at the next resume.
      Such a checkpoint is corrected, with a warning.
    - A checkpoint counts the batches of the run that saved it. With another number of devices or another
      ``batch_size``, the same windows are another number of batches.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.ckpt_path = None  # else Lightning would load it again for a later validate or fit

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        _normalize(checkpoint["loops"]["fit_loop"])

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        loaders = loop["state_dict"].get("combined_loader", [])
        data = trainer.datamodule  # type: ignore[attr-defined]
        if loaders and isinstance(data, TextDataModule):
            _agree_with(loaders[0], loop, data.windows_per_batch)
        _normalize(loop)
        current = loop["epoch_loop.batch_progress"]["current"]
        at_batch_end = current["completed"] < current["ready"]
        # Lightning counts the last step only after the hooks at the end of its batch.
        set_logged_steps(loop, max(0, checkpoint["global_step"] - at_batch_end))


def _normalize(loop: dict[str, Any]) -> None:
    """Count the last epoch as complete only if it is over and the hooks at the end of its last batch have run.

    A run that stops within an epoch runs the hooks at the epoch's end, and Lightning counts this epoch as complete.
    """
    batches = loop["epoch_loop.batch_progress"]
    ended = batches["current"]["completed"] == batches["current"]["ready"]
    is_over = ended and batches["is_last_batch"]
    for counts in loop["epoch_progress"].values():
        counts["ready"] = counts["started"]
        counts["processed"] = counts["completed"] = max(0, counts["started"] - (not is_over))


def _agree_with(loader: dict[str, Any], loop: dict[str, Any], windows_per_batch: int) -> None:
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
    batches, rest = divmod(loader["windows_seen"], windows_per_batch)
    current = loop["epoch_loop.batch_progress"]["current"]
    if rest or current["ready"] == batches:  # the loader refuses what does not fit
        return
    shift = batches - current["ready"]
    for stage in current:
        current[stage] += shift
