"""Base of callbacks that act after an optimizer step."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StepEndCallback(Callback, ABC):
    """Callback whose :meth:`on_step_end` runs once after each optimizer step.

    Lightning's ``on_train_batch_end`` runs after each micro-batch; with accumulated gradients most of them are no step.
    """

    _steps_seen = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_seen = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._steps_seen:
            self._steps_seen = trainer.global_step
            self.on_step_end(trainer, pl_module, batch_idx)

    @abstractmethod
    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        """Act after the optimizer step; ``trainer.global_step`` counts it, ``batch_idx`` was its last micro-batch."""
