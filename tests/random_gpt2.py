"""Random GPT-2 models of transformers, which stand for pretrained weights in the tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")


def random_gpt2(
    folder: Path, emb_dim: int = 24, n_heads: int = 12, n_layers: int = 2, **settings: Any
) -> Any:
    """A model with random weights, gains around 1, saved into ``folder``."""
    config = transformers.GPT2Config(
        **{
            "vocab_size": 50257, "n_positions": 64, "n_embd": emb_dim, "n_head": n_heads,
            "n_layer": n_layers, **settings,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            mean = 1.0 if "ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(mean + 0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
