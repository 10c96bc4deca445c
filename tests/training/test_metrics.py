"""Metrics over batches."""

import math

import torch

from gpt_lightning.training.metrics import TokenWeightedLoss
from helpers import tiny_gpt2_vocabulary


def test_empty_batch_has_no_weight() -> None:
    mean = TokenWeightedLoss()
    mean.update(torch.tensor(2.0), 3, 5)
    mean.update(torch.tensor(math.nan), 0, 0)
    assert float(mean.compute()["loss"]) == 2.0
    model, nothing = tiny_gpt2_vocabulary(), torch.zeros((0, 8), dtype=torch.int64)
    assert model(nothing, documents=nothing).shape == (0, 8, 50257)
    assert model(nothing).shape == (0, 8, 50257)
