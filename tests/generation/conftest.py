"""Fixtures of the tests of generation."""

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=101, context_length=16, emb_dim=32, n_heads=4, n_layers=2)
    return GPTModel(config).eval()


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(101, (2, 5), generator=torch.Generator().manual_seed(2))
