"""Bad sizes of a model."""

import math

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 100}, "emb_dim: 100 is not divisible by n_heads 12"),
        ({"n_layers": 0}, "n_layers: 0"),
        ({"vocab_size": -5}, "vocab_size: -5"),
        ({"drop_rate": 1.0}, r"drop_rate: 1.0 is outside \[0, 1\)"),
        ({"drop_rate": math.nan}, "drop_rate: nan"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)  # type: ignore[arg-type]


def test_model_takes_the_books_dict() -> None:
    GPT_CONFIG_124M = {
        "vocab_size": 50257, "context_length": 1024, "emb_dim": 768, "n_heads": 12, "n_layers": 12,
        "drop_rate": 0.1, "qkv_bias": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = GPTModel(GPT_CONFIG_124M)
    assert model.config == GPTConfig()
    assert sum(p.numel() for p in model.parameters()) == 163_009_536  # the book's number


def test_unknown_key_of_a_dict_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"config: n_head is not a setting .*; did you mean n_heads"
    ):
        GPTModel({"n_head": 12})
