"""Parameters, cache sizes and FLOPs by formula equal the model's."""

import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import flops
from gpt_lightning.model import flops as cost
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.kv_cache import KVCache


@pytest.mark.parametrize(
    ("name", "padded", "expected"),
    [("gpt2-124M", 50304, 854.7e6), ("gpt2-1558M", 50304, 10.274e9)],
)
def test_flops_equal_those_torch_counts(name: str, padded: int, expected: float) -> None:
    """FlopCounterMode on the meta device computes nothing."""
    config = GPT2_SIZES[name]
    config = GPTConfig(**{**vars(config), "vocab_size": padded, "drop_rate": 0.0})
    with torch.device("meta"):
        model = GPTModel(config)
        ids = torch.zeros(1, 1024, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids).sum().backward()
    ours = flops.flops_per_token(config, 1024)
    assert ours == counter.get_total_flops() / 1024
    assert ours == pytest.approx(expected, rel=1e-4)
    assert flops.flops_per_token(GPT2_SIZES[name], 1024, vocab_size=padded) == ours
    assert flops.flops_per_token(config, 1024, training=False) * 3 == ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_parameter_formula_equals_the_models_count(tied: bool, qkv_bias: bool) -> None:
    config = GPTConfig(vocab_size=300, context_length=20, emb_dim=24, n_heads=2, n_layers=3,
                       qkv_bias=qkv_bias, tied_embeddings=tied)  # fmt: skip
    assert flops.parameters(config) == sum(p.numel() for p in GPTModel(config).parameters())
    assert [flops.parameters(c) for c in GPT2_SIZES.values()] == [
        124439808, 354823168, 774030080, 1557611200]  # fmt: skip


@pytest.mark.parametrize("size", GPT2_SIZES)
@pytest.mark.parametrize("tied", [False, True])
def test_formulas_equal_the_models_parameters_and_cache(size: str, tied: bool) -> None:
    config = replace(GPT2_SIZES[size], tied_embeddings=tied)
    with torch.device("meta"):
        model = GPTModel(config)
        cache = KVCache.allocate(config, 1, config.context_length, dtype=torch.bfloat16)
    block = sum(p.numel() for p in model.trf_blocks[0].parameters())
    embeddings = sum(p.numel() for n, p in model.named_parameters() if re.search("emb|head", n))
    assert cost.block_parameters(config) == block
    assert cost.embedding_parameters(config) == embeddings
    assert cost.parameters(config) == sum(p.numel() for p in model.parameters())
    cache_bytes = sum(part.nbytes for part in (*cache.keys, *cache.values))
    assert cost.kv_cache_bytes(config, 1, config.context_length, 2) == cache_bytes
