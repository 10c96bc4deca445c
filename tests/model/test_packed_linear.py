"""Packed weights of linear layers on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from gpt_lightning import generate
from gpt_lightning.model import packed_linear
from gpt_lightning.model.int4_linear import Int4Linear, rounded_linear
from gpt_lightning.model.int8_linear import Int8Linear
from gpt_lightning.model.packed_linear import PackedLinear, pack_weights
from helpers import tiny_gpt


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_packed_weights_give_the_same_logits_and_tokens(
    monkeypatch: pytest.MonkeyPatch, tied: bool, qkv_bias: bool
) -> None:
    monkeypatch.setattr(packed_linear, "MIN_PACKED_WEIGHTS", 0)
    plain = tiny_gpt(tied_embeddings=tied, qkv_bias=qkv_bias)
    packed = tiny_gpt(tied_embeddings=tied, qkv_bias=qkv_bias)
    assert pack_weights(packed)
    for shape in [(1, 1), (1, 24), (3, 7), (8, 1)]:
        idx = torch.randint(97, shape)
        torch.testing.assert_close(packed(idx), plain(idx), atol=1e-5, rtol=0)
    prompts = torch.randint(97, (2, 5))
    # beyond context_length too
    assert torch.equal(generate(packed, prompts, 30), generate(plain, prompts, 30))


@torch.inference_mode()
def test_small_layers_are_not_packed() -> None:
    idx = torch.randint(97, (2, 7))
    small, plain = tiny_gpt(), tiny_gpt()
    assert not pack_weights(small)
    assert torch.equal(small(idx), plain(idx))
    torch.manual_seed(1)
    large_head = tiny_gpt(vocab_size=1 << 15)
    expected = large_head(idx)
    assert pack_weights(large_head)
    packed = [name for name, m in large_head.named_modules() if isinstance(m, PackedLinear)]
    assert packed == ["out_head"]
    torch.testing.assert_close(large_head(idx), expected, atol=1e-5, rtol=0)


def test_float64_weights_are_not_packed() -> None:
    model = tiny_gpt().to(torch.float64)
    before = model(torch.tensor([[1, 2]]))
    assert not pack_weights(model)
    assert torch.equal(model(torch.tensor([[1, 2]])), before)


@pytest.mark.parametrize("layer", [PackedLinear, Int8Linear, Int4Linear, rounded_linear])
def test_layer_has_copies_of_its_weights(
    layer: Callable[[torch.Tensor, torch.Tensor], nn.Module],
) -> None:
    """The weights may be views of a mapped file that another program overwrites."""
    weight, bias, x = torch.randn(16, 8), torch.randn(16), torch.randn(3, 8)
    made = layer(weight, bias)
    before = made(x)
    weight.zero_(), bias.zero_()
    assert torch.equal(made(x), before)
