"""Mean validation loss, weighted by tokens, over batches of different sizes and any number of processes."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from gpt_lightning.model.precision import has_float64


class TokenWeightedLoss(Metric):
    """Mean loss in which every token has the same weight, in double precision. A NaN makes the mean NaN.

    On a device without float64 the sums are on the host. torchmetrics' ``MeanMetric`` ignores NaN, or with
    ``nan_strategy="disable"`` the weights.
    """

    total: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("bytes", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: int, text_bytes: Tensor | int = 0) -> None:
        """Add a batch: its mean loss in nats, its number of tokens (or 1 for a mean of means), the bytes of their text.

        A batch without tokens has no mean, and is ignored.
        """
        if not has_float64(loss.device):
            self.to("cpu")
            loss, text_bytes = loss.cpu(), torch.as_tensor(text_bytes).cpu()
        # at each update: Lightning moves metrics to the model's precision too
        self.set_dtype(torch.float64)
        if not weight:
            return
        self.total += loss.to(self.total.dtype) * weight
        self.tokens += weight
        self.bytes += text_bytes

    def reset(self) -> None:
        """Set the sums to 0, in float32: Lightning may move them to a device without float64."""
        super().reset()
        self.set_dtype(torch.float32)

    def compute(self) -> dict[str, Tensor]:
        """Return the loss (nats per token), perplexity, bits per byte of text, and the number of tokens."""
        loss = self.total / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": self.total / math.log(2) / self.bytes,
            "tokens": self.tokens,
        }
