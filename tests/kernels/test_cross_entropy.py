"""The Triton kernel of the loss, in Triton's interpreter on a CPU and compiled on a GPU."""

import importlib
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gpt_lightning.model import loss
from helpers import (
    make_generator,
)

# Triton's interpreter computes in numpy, which warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


def reference_loss(
    logits: Tensor, targets: Tensor, vocab_size: int, scale: float
) -> tuple[float, Tensor]:
    logits = logits.double().requires_grad_()
    loss_sum = torch.nn.functional.cross_entropy(logits[:, :vocab_size], targets, reduction="sum")
    (grad,) = torch.autograd.grad(loss_sum * scale, logits)
    return float(loss_sum.detach()), grad


def check_loss(kernel: ModuleType, vocab_size: int, width: int, dtype: torch.dtype) -> None:
    generator = make_generator(vocab_size)
    logits = 4 * torch.randn(5, width, generator=generator)
    logits[0] += 300  # exp(300) overflows float32
    logits = logits.to(dtype)
    targets = torch.randint(vocab_size, (5,), generator=generator)
    targets[:2] = torch.tensor([0, vocab_size - 1])
    expected, expected_grad = reference_loss(logits, targets, vocab_size, scale=0.25)
    actual = kernel.loss_and_gradient_(logits, targets, vocab_size, 0.25)
    assert float(actual) == pytest.approx(expected, rel=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(logits.double(), expected_grad, atol=tolerance, rtol=tolerance)
    assert not logits[:, vocab_size:].any()


@pytest.mark.parametrize(("vocab_size", "width"), [(101, 128), (100, 100), (64, 64), (300, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_equal_torch(
    kernels_run: None,
    monkeypatch: pytest.MonkeyPatch,
    vocab_size: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """With full blocks, a partial block, and padding columns."""
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    monkeypatch.setattr(kernel, "BLOCK", 64)
    check_loss(kernel, vocab_size, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab_size", "width"), [(101, 128), (50257, 50304), (50257, 50257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_of_a_large_vocabulary_equal_torch(
    kernels_run: None, vocab_size: int, width: int, dtype: torch.dtype
) -> None:
    """With the block size of ``fit``, which is slow in the interpreter."""
    check_loss(
        importlib.import_module("gpt_lightning.kernels.cross_entropy"), vocab_size, width, dtype
    )


def test_targets_outside_the_vocabulary_make_the_loss_nan(kernels_run: None) -> None:
    """And other rows are not affected."""
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    for target in (-100, -1, 13, 16, 10**9):
        logits = torch.zeros(5, 16)
        actual = kernel.loss_and_gradient_(logits[1:4], torch.tensor([1, target, 3]), 13, 1.0)
        assert actual.isnan()
        assert not logits[[0, 4]].any()
        assert logits[[1, 3], [1, 3]].lt(0).all()
        torch.testing.assert_close(logits[2, :13], torch.full((13,), 1 / 13))


def test_strided_targets_and_loss_without_gradient(kernels_run: None) -> None:
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    targets = torch.arange(12).view(3, 4)[:, 1]
    logits = torch.randn(3, 16, generator=make_generator(1))
    expected, _ = reference_loss(logits, targets, 13, scale=1.0)
    before = logits.clone()
    actual = kernel.loss_and_gradient_(logits, targets, 13, 1.0, gradient=False)
    assert float(actual) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("bad_value", [float("nan"), float("inf")])
def test_a_non_finite_logit_makes_the_loss_non_finite(kernels_run: None, bad_value: float) -> None:
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    logits = torch.zeros(3, 16)
    logits[1, 5] = bad_value
    assert not kernel.loss_and_gradient_(logits, torch.tensor([1, 2, 3]), 16, 1.0).isfinite()


def gradients(pad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = make_generator(3)
    features = torch.randn(2, 7, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 16, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(101, (2, 7), generator=generator)
    mean = loss.chunked_cross_entropy(features, weight, targets, 4, pad_vocabulary=pad)
    return [mean.detach(), *torch.autograd.grad(mean, (features, weight))]


@pytest.mark.parametrize("pad", [False, True])
def test_chunked_loss_with_the_kernel_equals_the_loss_without(
    kernels_run: None, monkeypatch: pytest.MonkeyPatch, pad: bool
) -> None:
    monkeypatch.setattr(loss, "_kernel", lambda device: None)
    expected = gradients(pad)
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy").loss_and_gradient_
    monkeypatch.setattr(loss, "_kernel", lambda device: kernel)
    for actual, before in zip(gradients(pad), expected, strict=True):
        torch.testing.assert_close(actual, before, atol=1e-6, rtol=1e-5)


def test_kernel_is_not_used_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(True, torch.float64)
    monkeypatch.setattr(loss, "_kernel", lambda device: pytest.fail("it accumulates in float32"))
    assert all(map(torch.equal, gradients(True, torch.float64), expected))


@pytest.mark.usefixtures("messages")
def test_loss_kernel_that_fails_to_compile_is_not_used_and_warns_once(
    kernels_run: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    monkeypatch.setattr(kernel, "loss_and_gradient_", fails)
    monkeypatch.setattr(loss, "kernels_unsupported_reason", lambda device: None)
    with monkeypatch.context() as without:
        without.setattr(loss, "_kernel", lambda device: None)
        expected = gradients(True)
    loss._kernel.cache_clear()
    try:
        capsys.readouterr()
        for _ in range(2):
            assert all(map(torch.equal, gradients(True), expected))
    finally:
        loss._kernel.cache_clear()
    assert capsys.readouterr().err == (
        "gpt_lightning: loss_chunk_size: the Triton kernel could not be compiled "
        "(Failed to find C compiler.); the loss is computed without it, which is slower\n"
    )
