"""When a run ends: after a number of tokens, and whether it does now."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.epochs import EpochShape
from gpt_lightning.training.module import GPTLightningModule


class MaxTokens(Callback):
    """Ends the run with the first update at which it has seen ``max_tokens`` tokens, or more."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens} is too small; give 1 or more")
        self.max_tokens = max_tokens
        self._seen_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step
        self._end_when_seen(trainer, pl_module)  # a resumed run may have been at its end

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._seen_step:
            self._seen_step = trainer.global_step
            self._end_when_seen(trainer, pl_module)

    def _end_when_seen(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, GPTLightningModule)
        if module.tokens_seen >= self.max_tokens:
            # as max_steps does, whatever the least number of epochs and steps
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None
            trainer.should_stop = True

    def last_step(self, trainer: Trainer) -> int | None:
        """The update that the run will end with; None: not known."""
        module, epoch = trainer.lightning_module, epoch_shape(trainer)
        if not isinstance(module, GPTLightningModule) or epoch is None:
            return None
        left = max(0, self.max_tokens - module.tokens_seen)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.global_step + epoch.steps_for(left, after_batches=done)


def ends_run(trainer: Trainer) -> bool:
    """Whether the step that was just done is the run's last."""
    if trainer.should_stop:
        return bool(trainer.fit_loop._can_stop_early)
    ends_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return ends_epochs or trainer.global_step == trainer.max_steps


def epoch_shape(trainer: Trainer) -> EpochShape | None:
    """Of a run on our data."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data.epoch_shape() if isinstance(data, TextDataModule) else None
