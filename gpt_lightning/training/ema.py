"""Exponential moving average (EMA) of the weights during training."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gpt_lightning.pretrained.weights import EMA_STATE
from gpt_lightning.training.distributed import FSDP2Strategy, local, reshard, sharded_like
from gpt_lightning.training.step_callback import StepEndCallback

logger = logging.getLogger(__name__)

EMA_UPDATES = "ema_updates"  # key in checkpoints


def decay_at(update: int, decay: float) -> float:
    """Return the decay of an update, counted from 0: min(decay, (1 + t) / (10 + t)).

    It is the one of TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``: an average that has just started
    forgets its first weights quickly.
    """
    return min(decay, (1 + update) / (10 + update))


class WeightEMA(StepEndCallback):
    """Callback that keeps an exponential moving average of the weights.

    After each optimizer step: average = d · average + (1 - d) · weights, with d of :func:`decay_at`. The average
    starts with the weights before the first step. A skipped step counts as a step that leaves the weights as they are.
    The average never changes the run: the optimizer and the checkpoint's ``state_dict`` have the weights themselves.

    Lightning's ``WeightAveraging`` does not support shards, and ends a run with the averaged weights. Here each device
    holds the average of its own weights or of its shards. It is float32 where weights have 16 bits, because these
    cannot add a thousandth of a difference.

    Args:
        decay: In [0, 1), checked by the module.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._weights: dict[str, nn.Parameter] = {}
        self._average: dict[str, Tensor] = {}
        self._loaded: dict[str, Tensor] | None = None

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._loaded = checkpoint.get(EMA_STATE)
        self.updates = checkpoint.get(EMA_UPDATES, 0)
        if self._loaded is None and trainer.is_global_zero:
            logger.info(
                f"model.ema_decay: the checkpoint has no average of the weights, so it starts from the weights "
                f"after {checkpoint['global_step']} steps"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # only here are the weights on their device, and those of a checkpoint loaded
        super().on_train_start(trainer, pl_module)
        reshard(pl_module)
        self._weights = dict(pl_module.named_parameters())
        self._average = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in self._weights.items()
        }
        loaded, self._loaded = self._loaded, None  # views of a mapped file
        if loaded is None:
            self.updates = 0
            return
        for name, average in self._average.items():
            average.copy_(sharded_like(average, loaded[name]))

    @torch.no_grad()
    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        update = get_ema_multi_avg_fn(decay_at(self.updates, self.decay))
        self.updates += 1
        pairs = self._local_pairs()
        if all(weight.dtype == average.dtype for weight, average in pairs):
            weights, averages = zip(*pairs, strict=True)
            update(list(averages), list(weights), self.updates)
            return
        for weight, average in pairs:  # one at a time, so that one is in memory as float32
            update([average], [weight.to(average.dtype)], self.updates)

    def _local_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return this device's weights, each with its average."""
        return [
            (local(weight), local(self._average[name])) for name, weight in self._weights.items()
        ]

    @contextmanager
    def in_use(self, module: LightningModule) -> Iterator[None]:
        """Let the model compute with the average. Afterwards weights and average have the same bits as before.

        They are exchanged one by one, which takes memory for one of them; with 16-bit weights for a copy of all.
        """
        reshard(module)  # also FSDP2's gathered weights of another forward pass
        pairs = [(weight, average.to(weight.dtype)) for weight, average in self._local_pairs()]
        _exchange(pairs)
        try:
            yield
        finally:
            reshard(module)
            _exchange(pairs)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        strategy = trainer.strategy
        average = dict(self._average)
        if isinstance(strategy, FSDP2Strategy):
            average = strategy.gather(average)
        checkpoint[EMA_STATE] = average
        checkpoint[EMA_UPDATES] = self.updates


@torch.no_grad()
def _exchange(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for one, other in pairs:
        before = one.clone()
        one.copy_(other)
        other.copy_(before)
