"""Updates that would do harm: a loss or gradient that is not finite, or far off what came before."""

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.optimizer import norm_is_certainly_finite

logger = logging.getLogger(__name__)

OnBadStep = Literal["stop", "skip"]
SPIKE_STEPS, SPIKE_SIGMA = 128, 6.0  # as OLMo-core skips


@dataclass(frozen=True)
class _Update:
    """One that is yet to be judged; of its figures, loss and gradient norm ``(2,)``."""

    step: int
    windows: list[NDArray[np.int64]]
    figures: AsyncHostCopy


def _judges_later(module: LightningModule) -> bool:
    """Whether an update is judged when the next one is due, so that a GPU never waits for the judgement."""
    return module.device.type == "cuda" and module.device_mesh is None


class SkipBadSteps(Callback):
    """Keeps a bad step from parameters and optimizer, which stay bit for bit as they were.

    On a GPU the optimizer itself leaves everything as it was, without the host's asking, and the step is told,
    or stops the run, before the next one is done.

    A step is bad whose loss or gradient norm is not finite, and with ``skip_spikes`` one where either is
    more than 6 standard deviations above its mean over the 128 good steps before.

    Args:
        action: What is done about a step that is not finite: 'stop' the run, or 'skip' the update.
        most_in_row: Skipped steps in a row after which the run stops all the same.
        skip_spikes: Whether spikes are skipped too.

    Raises:
        FloatingPointError: From the hooks; with step, loss, gradient norm and the batch's windows.
    """

    def __init__(
        self, action: OnBadStep = "stop", most_in_row: int = 10, skip_spikes: bool = False
    ) -> None:
        if most_in_row < 1:
            raise ValueError(f"max_bad_steps: {most_in_row} is too small; give 1 or more")
        self.action = action
        self.most_in_row = most_in_row
        self.skip_spikes = skip_spikes
        self.skipped = 0
        self._in_row = 0
        self._watches = True
        self._judges_later = False
        self._does_without_norm = False  # where every element tells as much
        self._loss: Tensor | None = None
        self._windows: list[NDArray[np.int64]] = []
        self._waiting: _Update | None = None
        self._good: deque[tuple[float, float]] = deque(maxlen=SPIKE_STEPS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # 16-mixed's scaler expects bad steps, and skips them
        self._watches = trainer.precision != "16-mixed"
        if self._watches:
            self._judges_later = not self.skip_spikes and _judges_later(pl_module)
            alone_on_cpu = pl_module.device.type == "cpu" and trainer.world_size == 1
            wanted = self._judges_later or self.skip_spikes or trainer.gradient_clip_val
            self._does_without_norm = alone_on_cpu and not wanted
        elif trainer.is_global_zero:
            logger.warning(
                "trainer.precision: with 16-mixed a gradient scaler skips updates that are not finite; "
                "bad_steps, max_bad_steps and skip_spikes have no effect, AdamW is not fused, and a loss by chunks "
                "is computed in float32"
            )

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._loss, self._windows = None, []
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableDataLoader):
            self._windows.append(loader.handed_out)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        part = loss.detach()  # each micro-batch's comes divided by their number
        self._loss = part if self._loss is None else self._loss + part

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._watches:
            return
        assert isinstance(pl_module, GPTLightningModule)
        assert self._loss is not None
        loss = self._loss
        if (
            self._does_without_norm
            and math.isfinite(loss.item())
            and norm_is_certainly_finite(pl_module.gradients())
        ):
            self._in_row = 0
            return
        grad_norm = pl_module.grad_norm()
        if trainer.world_size > 1:
            loss = trainer.strategy.reduce(loss.float().clone(), reduce_op="mean")
        if not self._judges_later:
            figures = float(loss), float(grad_norm)
            if not self._is_good(trainer, trainer.global_step, self._windows, *figures):
                # AdamW passes over parameters without gradient
                optimizer.zero_grad(set_to_none=True)
            return
        both = torch.stack([loss.float(), grad_norm.float()])
        self._judge_waiting(trainer)
        # the fused step reads it where it runs, and leaves everything as it was where it is 1
        optimizer.found_inf = (~both.isfinite().all()).float()  # type: ignore[attr-defined]
        self._waiting = _Update(trainer.global_step, self._windows, AsyncHostCopy(both))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._judge_waiting(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._judge_waiting(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _judge_waiting(self, trainer: Trainer) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            self._is_good(trainer, waiting.step, waiting.windows, *waiting.figures.read().tolist())

    def _is_good(
        self,
        trainer: Trainer,
        step: int,
        of_batches: list[NDArray[np.int64]],
        loss: float,
        grad_norm: float,
    ) -> bool:
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and self.skip_spikes and self._is_spike(loss, grad_norm)
        if finite and not spike:
            self._in_row = 0
            if self.skip_spikes:
                self._good.append((loss, grad_norm))
            return True
        windows = [int(number) for batch in of_batches for number in batch]
        if trainer.world_size > 1:  # all ranks see the same figures, and come here together
            of_ranks: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(of_ranks, windows)
            windows = [number for own in of_ranks for number in own]
        what = f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        where = f"windows {', '.join(map(str, windows)) or 'unknown'}"
        if not spike and self.action == "stop":
            raise FloatingPointError(
                f"{what}, {where}; nothing was updated: lower --model.lr, or --bad_steps skip"
            )
        self._in_row += 1
        self.skipped += 1
        if self._in_row > self.most_in_row:
            raise FloatingPointError(
                f"{what}, {where}; {self.most_in_row} bad steps in a row were skipped before it"
            )
        if trainer.is_global_zero:
            reason = f"a spike, {what}" if spike else what
            logger.warning(
                f"{reason}, {where}: skipped ({self._in_row} in a row, {self.skipped} in all)"
            )
        log_metrics(trainer, {"train/skipped_steps": float(self.skipped)}, step)
        return False

    def _is_spike(self, loss: float, grad_norm: float) -> bool:
        if len(self._good) < SPIKE_STEPS:
            return False
        for value, before in zip((loss, grad_norm), zip(*self._good, strict=True), strict=True):
            mean = statistics.fmean(before)
            if value > mean + SPIKE_SIGMA * statistics.pstdev(before, mean):
                return True
        return False

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped": self.skipped,
            "in_row": self._in_row,
            "good": [list(pair) for pair in self._good],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]
        self._in_row = state_dict["in_row"]
        self._good.extend((loss, norm) for loss, norm in state_dict["good"])
