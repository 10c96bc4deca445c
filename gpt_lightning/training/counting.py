"""What a run counts: tokens until it ends, and its batches where they are of another size than before."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.loader import WindowLoader
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
        """The update that the run will end with if those to come are whole ones; none: not known."""
        module, loader = trainer.lightning_module, trainer.train_dataloader
        if not isinstance(module, GPTLightningModule) or not isinstance(loader, WindowLoader):
            return None
        an_update = loader.windows_at_a_time * loader.accumulate * (loader.windows.shape[1] - 1)
        return trainer.global_step + max(0, -(-(self.max_tokens - module.tokens_seen) // an_update))


class BatchCounts(Callback):
    """Lightning's count of an epoch's batches, in those of this run.

    A checkpoint has it in batches of the run that wrote it. On another number of devices, or with another
    batch_size, as many windows are another number of batches: where accumulation and epoch end depends on it.
    """

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        loaders = loop["state_dict"].get("combined_loader", [])
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not loaders or not isinstance(data, TextDataModule):
            return
        batches, rest = divmod(loaders[0]["windows_seen"], data.windows_at_a_time)
        counts = loop["epoch_loop.batch_progress"]["current"]
        if rest or counts["ready"] == batches:  # what does not fit is refused by the loader
            return
        begun = counts["ready"]
        for what in counts:
            counts[what] += batches - begun
