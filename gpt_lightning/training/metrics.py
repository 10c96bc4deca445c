"""Means of losses over batches of different sizes, on however many processes."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenWeightedLoss(Metric):
    """Mean of losses with every token weighing the same, in double precision whatever the model's. A NaN makes it NaN.

    torchmetrics' ``MeanMetric`` leaves NaN out, or with ``nan_strategy="disable"`` the weights.
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
        """A batch's mean loss in nats, its tokens (or 1, for a mean of means), the bytes they stand for.

        A batch without tokens has no mean, and is passed over.
        """
        # anew at each update, since the model's precision reaches its metrics too
        self.set_dtype(torch.float32 if loss.device.type == "mps" else torch.float64)
        if not weight:
            return
        self.total += loss.to(self.total.dtype) * weight
        self.tokens += weight
        self.bytes += text_bytes

    def compute(self) -> dict[str, Tensor]:
        """Loss (nats a token), perplexity, bits a byte of text, and the tokens."""
        loss = self.total / self.tokens
        return {
            "loss": loss,
            "perplexity": loss.exp(),
            "bits_per_byte": self.total / math.log(2) / self.bytes,
            "tokens": self.tokens,
        }
