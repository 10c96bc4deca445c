"""Int4Linear: the product of rounded weights; the rounding is better than that of the range of a group."""

import pytest
import torch

from gpt_lightning.model.int4_linear import (
    GROUP,
    Int4Linear,
    has_int4_kernel,
    round_to_int4,
    rounded_linear,
)
from helpers import make_generator

needs_kernel = pytest.mark.skipif(not has_int4_kernel(), reason="no int4 kernel for this CPU")


@needs_kernel
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 3, 48), (1, 1, 320), (70, 33), (2, 1)])
@pytest.mark.parametrize("rows", [1, 16, 61, 80, 200])
@pytest.mark.parametrize("has_bias", [True, False])
def test_layer_is_the_product_of_rounded_weights(
    shape: tuple[int, ...], rows: int, has_bias: bool
) -> None:
    """What remains is the rounding of the activations and of the result to bfloat16."""
    generator = make_generator(1)
    weight = torch.randn(rows, shape[-1], generator=generator)
    bias = torch.randn(rows, generator=generator) if has_bias else None
    x = torch.randn(shape, generator=generator)
    x[..., -1, :] *= 1000  # one token with large activations changes nothing for the others
    found = Int4Linear(weight, bias)(x)
    layer = rounded_linear(weight, bias).double()
    with torch.no_grad():
        product = x.bfloat16().double() @ layer.weight.T
        expected = product if bias is None else product + bias.double()
        # float32 sums of K products
        tolerance = product.abs() / 2**8 + 1e-6 * (x.abs().double() @ layer.weight.abs().T)
    assert found.dtype == torch.float32
    assert found.shape == (*shape[:-1], rows)
    assert ((found - expected).abs() <= tolerance + 1e-6).all()


@needs_kernel
@torch.inference_mode()
def test_rows_of_a_batch_and_views_give_the_same_bits() -> None:
    x = torch.randn(3, 7, 64, generator=make_generator(2))
    layer = Int4Linear(torch.randn(40, 64, generator=make_generator(3)), None)
    together = layer(x)
    assert torch.equal(together[:, -1], layer(x[:, -1]))
    assert torch.equal(together, torch.stack([layer(row) for row in x]))
    assert torch.equal(layer(x.transpose(0, 1)), together.transpose(0, 1))


@needs_kernel
def test_zeros_and_constants() -> None:
    layer = Int4Linear(torch.zeros(3, 8), torch.ones(3))
    assert torch.equal(layer(torch.randn(2, 8)), torch.ones(2, 3))
    assert Int4Linear(torch.full((3, 8), 0.5), None)(torch.ones(1, 8)).tolist() == [[4.0] * 3]


@pytest.mark.parametrize("scale", [1e-6, 0.02, 1e4])
@pytest.mark.parametrize("tail", [False, True])
def test_rounding_error(scale: float, tail: bool) -> None:
    """Smaller than that of 16 even steps over the range of a group, which is at most half a step."""
    weight = torch.randn(64, 10 * GROUP, generator=make_generator(4)) * scale
    if tail:
        weight *= torch.randn(weight.shape, generator=make_generator(5)).abs()
    groups = weight.view(-1, GROUP)
    codes, scales, offsets = round_to_int4(weight)
    assert codes.min() == 0
    assert codes.max() == 15
    assert torch.equal(scales, scales.bfloat16().float())
    assert torch.equal(offsets, offsets.bfloat16().float())
    error = ((codes - 8) * scales + offsets - groups).square().mean()
    low, high = groups.aminmax(dim=1, keepdim=True)
    step = (high - low) / 15
    plain = (((groups - low) / step).round() * step + low - groups).square().mean()
    assert error < 0.93 * plain


def test_numbers_with_16_values_are_exact() -> None:
    """The rounding of weights that are rounded already changes nothing."""
    codes = torch.randint(16, (8, GROUP), generator=make_generator(6))
    codes[:, 0], codes[:, 1] = 0, 15
    weight = (codes - 8) * 0.25 + 3.0
    found, scales, offsets = round_to_int4(weight)
    assert torch.equal(found, codes.int())
    assert torch.equal((found - 8) * scales + offsets, weight)
