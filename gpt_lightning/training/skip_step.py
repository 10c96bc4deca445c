"""Skip or stop at a bad step: a loss or gradient norm that is not finite, or a spike."""

import logging
import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.training.config import OnBadStep
from gpt_lightning.training.distributed import mean_over_ranks
from gpt_lightning.training.grad_norm import norm_is_certainly_finite
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import GPTLightningModule

logger = logging.getLogger(__name__)

SPIKE_STEPS, SPIKE_SIGMA = 128, 6.0  # as OLMo-core skips


@dataclass(frozen=True)
class _PendingStep:
    """Step that is not yet checked; ``metrics`` holds its loss and gradient norm ``(2,)``."""

    step: int
    windows: list[NDArray[np.int64]]
    metrics: AsyncHostCopy


def _checks_later(module: LightningModule, optimizer: Optimizer) -> bool:
    """Return whether a step is checked when the next one is due, so that a GPU never waits for the check."""
    is_fused = all(group.get("fused") for group in optimizer.param_groups)
    return is_fused and module.device.type == "cuda" and module.device_mesh is None


class SkipBadSteps(Callback):
    """Callback that keeps parameters and optimizer unchanged, bit for bit, when a step is bad.

    A step is bad if its loss or gradient norm is not finite. With ``skip_spikes`` it is also bad if either is more
    than 6 standard deviations above its mean over the last 128 good steps.

    On a GPU the fused optimizer skips the step itself, so that the host does not wait. The step is logged, or
    stops the run, before the next one is done.

    Args:
        action: After a step that is not finite: 'stop' the run, or 'skip' the step.
        max_in_row: Number of steps that may be skipped in a row; with one more the run stops.
        skip_spikes: Whether spikes are skipped too.

    Raises:
        FloatingPointError: From the hooks, with step, loss, gradient norm and the batch's windows.
    """

    def __init__(
        self, action: OnBadStep = "stop", max_in_row: int = 10, skip_spikes: bool = False
    ) -> None:
        if max_in_row < 1:
            raise ValueError(f"max_bad_steps: {max_in_row} is too small; give 1 or more")
        self.action = action
        self.max_in_row = max_in_row
        self.skip_spikes = skip_spikes
        self.skipped = 0
        self._in_row = 0
        self._is_active = True
        self._checks_later = False
        self._skips_norm = False  # where a look at every element is enough
        self._loss: Tensor | None = None
        self._windows: list[NDArray[np.int64]] = []
        self._pending: _PendingStep | None = None
        self._good: deque[tuple[float, float]] = deque(maxlen=SPIKE_STEPS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # the gradient scaler of 16-mixed expects bad steps, and skips them
        self._is_active = trainer.precision != "16-mixed"
        if self._is_active:
            self._checks_later = not self.skip_spikes and _checks_later(
                pl_module, trainer.optimizers[0]
            )
            alone_on_cpu = pl_module.device.type == "cpu" and trainer.world_size == 1
            needs_norm = self._checks_later or self.skip_spikes or trainer.gradient_clip_val
            self._skips_norm = alone_on_cpu and not needs_norm
        elif trainer.is_global_zero:
            logger.warning(
                "trainer.precision: with 16-mixed a gradient scaler skips steps that are not finite; "
                "bad_steps, max_bad_steps and skip_spikes have no effect, the optimizer is not fused, and a loss by chunks "
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
        part = loss.detach()  # Lightning divides by the number of micro-batches
        self._loss = part if self._loss is None else self._loss + part

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if not self._is_active:
            return
        assert isinstance(pl_module, GPTLightningModule)
        assert self._loss is not None
        loss = self._loss
        if (
            self._skips_norm
            and math.isfinite(loss.item())
            and norm_is_certainly_finite(pl_module.gradients())
        ):
            self._in_row = 0
            return
        grad_norm = pl_module.grad_norm()
        if trainer.world_size > 1:
            loss = mean_over_ranks(loss.float())
        if not self._checks_later:
            if not self._is_good(
                trainer, trainer.global_step, self._windows, float(loss), float(grad_norm)
            ):
                # AdamW skips parameters without a gradient.
                optimizer.zero_grad(set_to_none=True)
            return
        both = torch.stack([loss.float(), grad_norm.float()])
        self._check_pending(trainer)
        # The fused step reads this on the GPU, and changes nothing if it is 1.
        optimizer.found_inf = (~both.isfinite().all()).float()  # type: ignore[attr-defined]
        self._pending = _PendingStep(trainer.global_step, self._windows, AsyncHostCopy(both))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_pending(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_pending(trainer)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def _check_pending(self, trainer: Trainer) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._is_good(trainer, pending.step, pending.windows, *pending.metrics.read().tolist())

    def _is_good(
        self,
        trainer: Trainer,
        step: int,
        batches: list[NDArray[np.int64]],
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
        windows = [int(index) for batch in batches for index in batch]
        if trainer.world_size > 1:  # all ranks have the same loss and norm, so all come here
            gathered: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(gathered, windows)
            windows = [index for part in gathered for index in part]
        what = f"step {step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}"
        where = f"windows {', '.join(map(str, windows)) or 'unknown'}"
        if not spike and self.action == "stop":
            raise FloatingPointError(
                f"{what}, {where}; nothing was updated; lower --model.lr, or give --bad_steps skip"
            )
        self._in_row += 1
        self.skipped += 1
        if self._in_row > self.max_in_row:
            raise FloatingPointError(
                f"{what}, {where}; {self.max_in_row} bad steps in a row were skipped before it"
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
        for value, recent in zip((loss, grad_norm), zip(*self._good, strict=True), strict=True):
            mean = statistics.fmean(recent)
            if value > mean + SPIKE_SIGMA * statistics.pstdev(recent, mean):
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
