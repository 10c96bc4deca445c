"""Attention as products of blocks: the same values and gradients as torch's."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import cpu_attention
from gpt_lightning.model.cpu_attention import (
    RecomputedCausalAttention,
    attention_weights_of_blocks,
    kept_causal_attention,
)


@pytest.mark.parametrize("length", [2, 33, 256, 257, 700])
def test_attention_equals_torch_attention(length: int) -> None:
    """Values and gradients agree to 1e-5 in float32, and the same tokens are masked."""
    generator = torch.Generator().manual_seed(3)
    found = []
    parts = [torch.randn(2, 3, length, 8, generator=generator) for _ in range(3)]
    for attention in (
        lambda q, k, v: kept_causal_attention(q, k, v, 0.0),
        RecomputedCausalAttention.apply,
        lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    ):
        q, k, v = (part.clone().requires_grad_() for part in parts)
        y = attention(q, k, v)
        y.square().sum().backward()
        found.append([y, q.grad, k.grad, v.grad])
    for kept, recomputed, torchs in zip(*found, strict=True):
        torch.testing.assert_close(kept, torchs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(recomputed, torchs, atol=1e-5, rtol=1e-5)


def test_kept_attention_drops_attention_weights() -> None:
    q = torch.zeros(4, 4, 64, 8)  # all weights of a row alike
    v = torch.ones(4, 4, 64, 8)
    torch.manual_seed(0)
    y = kept_causal_attention(q, q, v, 0.25)
    assert y.mean() == pytest.approx(1.0, abs=0.02)
    assert y[:, :, 0, 0].unique().tolist() == [0.0, pytest.approx(4 / 3)]


@pytest.mark.parametrize("length", [1, 256, 257, 1000])
def test_number_of_attention_weights_is_what_is_computed(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda x, dim: (counted.append(x.numel()), softmax(x, dim))[1]
    )
    q = torch.zeros(1, 2, length, 4)
    kept_causal_attention(q, q, q, 0.0)
    assert sum(counted) == 2 * sum(attention_weights_of_blocks(length))


@pytest.mark.parametrize("tied", [True, False])
def test_step_of_a_long_window_is_that_with_torchs_kernel(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16: the gradients deviate from those in float32 by no more than with torch's kernel."""
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=61, context_length=600, emb_dim=32, n_heads=2, n_layers=2,
                       drop_rate=0.0, tied_embeddings=tied)  # fmt: skip
    model = GPTModel(config).train()
    ids = torch.randint(61, (2, 600), generator=torch.Generator().manual_seed(3))

    def gradients(by_products: bool, dtype: torch.dtype) -> torch.Tensor:
        if not by_products:
            monkeypatch.setattr("gpt_lightning.model.gpt.products_are_faster", lambda *_: False)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())  # fmt: skip
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    calls = []
    apply = RecomputedCausalAttention.apply
    monkeypatch.setattr(
        cpu_attention.RecomputedCausalAttention,
        "apply",
        lambda *qkv: (calls.append(1), apply(*qkv))[1],
    )
    found = gradients(True, torch.bfloat16)
    assert len(calls) == 2
    by_torch, exact = gradients(False, torch.bfloat16), gradients(False, torch.float32)
    assert len(calls) == 2
    assert (found - exact).norm() < 1.1 * (by_torch - exact).norm()
    assert (found - exact).norm() < 0.05 * exact.norm()
