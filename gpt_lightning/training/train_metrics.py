"""Metrics of training itself, every ``trainer.log_every_n_steps`` steps: loss, learning rate, gradient norm, speed."""

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from gpt_lightning.data.dataloader import Batch
from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.model.precision import has_float64
from gpt_lightning.training.distributed import mean_over_ranks
from gpt_lightning.training.loggers import StepPosition, publish_metrics
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.throughput import Stopwatch

_MAX_LOSSES = 100  # that are collected before they are added


@dataclass(frozen=True)
class _PendingRow:
    """Row whose values a GPU still computes; ``values`` holds loss and gradient norm ``(2,)``."""

    position: StepPosition
    values: AsyncHostCopy
    learning_rate: float
    tokens_per_second: float


class TrainMetrics(StepEndCallback):
    """Callback that logs ``TAGS`` every ``trainer.log_every_n_steps`` optimizer steps.

    - ``train/loss``: mean over the steps since the last row and over ranks, in nats per token. A step's loss is the
      mean over its micro-batches, with dropout. A loss that is not finite is left out.
    - ``lr``, ``train/grad_norm``: of the row's step; the norm is the one before clipping.
    - ``tokens_per_second``: over all devices, since the last row.

    A resumed run continues the mean: the sum so far is in the checkpoint. A GPU's values are read when the next step
    ends, so that the host does not wait for them.

    Args:
        clock: Stopwatch that runs while the run trains.
    """

    TAGS = ("train/loss", "lr", "train/grad_norm", "tokens_per_second")

    def __init__(self, clock: Stopwatch) -> None:
        self.clock = clock
        # sum of the losses of the finite steps since the last row, and the number of these steps
        self._sum = torch.zeros(2)
        self._losses: list[Tensor] = []  # of steps that are not in the sum yet
        self._step_loss: Tensor | None = None
        self._grad_norm: Tensor | None = None
        self._tokens = 0
        self._began = 0.0
        self._pending: _PendingRow | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._start_interval()
        dtype = torch.float64 if has_float64(pl_module.device) else torch.float32
        self._sum = self._sum.to(dtype).to(pl_module.device)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if _is_due(trainer, trainer.global_step + 1):
            assert isinstance(pl_module, GPTLightningModule)
            self._grad_norm = pl_module.grad_norm()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch[0].numel() * trainer.world_size
        loss = outputs["loss"]  # divided by the number of micro-batches
        self._step_loss = loss if self._step_loss is None else self._step_loss + loss
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        assert self._step_loss is not None
        self._losses.append(self._step_loss)
        self._step_loss = None
        if len(self._losses) == _MAX_LOSSES:
            self._add_losses()
        self._log_pending(trainer, pl_module)
        if self._grad_norm is None:
            return
        self._add_losses()
        total, steps = self._mean_over_ranks(trainer)
        seconds = self.clock.seconds() - self._began
        self._pending = _PendingRow(
            StepPosition.of(trainer, batch_idx),
            AsyncHostCopy(torch.stack([total / steps, self._grad_norm.to(total)])),
            trainer.optimizers[0].param_groups[0]["lr"],  # the module sets it before each step
            self._tokens / seconds,
        )
        self._sum = torch.zeros_like(self._sum)
        self._grad_norm = None
        self._start_interval()
        if not _reads_later(pl_module.device):
            self._log_pending(trainer, pl_module)

    def _start_interval(self) -> None:
        self._began, self._tokens = self.clock.seconds(), 0

    def _add_losses(self) -> None:
        """Add the collected losses to the sum, in few operations: several for each step cost a tenth of a millisecond."""
        if not self._losses:
            return
        losses = torch.stack(self._losses).to(self._sum.dtype)
        self._losses.clear()
        finite = losses.isfinite()
        self._sum += torch.stack([losses.where(finite, 0).sum(), finite.sum().to(losses)])

    def _mean_over_ranks(self, trainer: Trainer) -> Tensor:
        return self._sum if trainer.world_size == 1 else mean_over_ranks(self._sum)

    def _log_pending(self, trainer: Trainer, module: LightningModule) -> None:
        row, self._pending = self._pending, None
        if row is None:
            return
        loss, grad_norm = row.values.read().tolist()
        values = (loss, row.learning_rate, grad_norm, row.tokens_per_second)
        publish_metrics(trainer, module, dict(zip(self.TAGS, values, strict=True)), row.position)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log_pending(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # On all ranks: rank 0's checkpoint holds the mean over ranks, and all continue from it.
        self._log_pending(trainer, pl_module)
        self._add_losses()
        self._sum = self._mean_over_ranks(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        loss_sum, steps = self._sum.tolist()
        return {"loss_sum": loss_sum, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sum = torch.tensor([state_dict["loss_sum"], state_dict["steps"]], dtype=torch.float64)


def _reads_later(device: torch.device) -> bool:
    """Return whether a row is read one step later, so that a GPU never waits for it."""
    return device.type == "cuda"


def _is_due(trainer: Trainer, steps: int) -> bool:
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return bool(every) and steps % every == 0
