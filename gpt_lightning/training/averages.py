"""Means of losses over batches of different sizes, on however many processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class TokenMean(Metric):
    """Weighted mean of losses, in double precision whatever the model's. A NaN makes it NaN.

    torchmetrics' ``MeanMetric`` leaves NaN out, or with ``nan_strategy="disable"`` the weights.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, loss: Tensor, weight: int) -> None:
        # anew at each update, since the model's precision reaches its metrics too
        self.set_dtype(torch.float32 if loss.device.type == "mps" else torch.float64)
        self.total += loss.to(self.total.dtype) * weight
        self.weight += weight

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean and the sum of the weights."""
        return self.total / self.weight, self.weight
