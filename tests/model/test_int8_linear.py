"""Int8Linear: the product of rounded weights, up to the rounding of the activations."""

import pytest
import torch

from gpt_lightning.model.int8_linear import Int8Linear, has_int8_kernel
from helpers import make_generator

pytestmark = pytest.mark.skipif(not has_int8_kernel(), reason="no int8 kernel for this CPU")


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The product of the rounded numbers in float64: a scale per row of the weights, and per token."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    return (x.double() @ rounded.double().T + bias.double()).float()


@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48), (1, 1, 48)])
def test_layer_is_the_product_of_rounded_weights(shape: tuple[int, ...]) -> None:
    """What remains is the rounding of the activations, which is a 255th of a token's range."""
    generator = make_generator(1)
    weight, bias = torch.randn(40, 48, generator=generator), torch.randn(40, generator=generator)
    x = torch.randn(shape, generator=generator)
    x[..., -1, :] *= 1000  # one token with large activations does not take the bits of the others
    found, expected = Int8Linear(weight, bias)(x), reference(x, weight, bias)
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=-1)
    step = 2 * x.abs().amax(dim=-1) / 255
    # the error of a sum of 48 roundings, each at most half a step
    assert (error <= step * weight.norm()).all()


def test_zeros_are_exact() -> None:
    layer = Int8Linear(torch.zeros(3, 8), torch.ones(3))
    assert torch.equal(layer(torch.zeros(2, 8)), torch.ones(2, 3))


@pytest.mark.parametrize("shape", [(1, 48), (3, 48)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_result_of_a_token_that_is_not_finite_is_not_finite(
    shape: tuple[int, int], value: float
) -> None:
    """The kernel alone takes NaN for some number, or raises, depending on the place."""
    layer = Int8Linear(torch.randn(40, 48, generator=make_generator(1)), None)
    for column in (0, 1, 47):
        for row in range(shape[0]):
            x = torch.randn(shape, generator=make_generator(2))
            x[row, column] = value
            is_finite = torch.isfinite(layer(x)).all(dim=1)
            assert is_finite.tolist() == [i != row for i in range(shape[0])]


def test_no_tokens() -> None:
    layer = Int8Linear(torch.randn(40, 48), torch.ones(40))
    assert layer(torch.empty(2, 0, 48)).shape == (2, 0, 40)
