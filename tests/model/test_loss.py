"""The loss computed in chunks equals the loss computed at once, and holds no logits."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.model import loss as loss_module
from gpt_lightning.model.loss import chunked_cross_entropy, cross_entropy
from gpt_lightning.training.grad_norm import global_grad_norm


@pytest.mark.parametrize("chunk_size", [1, 7, 24, 1000])
@pytest.mark.parametrize("pad_vocabulary", [False, True])
def test_chunked_loss_equals_the_loss(chunk_size: int, pad_vocabulary: bool) -> None:
    """Value and gradients agree to 1e-5 in float32, and to the precision of bfloat16 under autocast."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 16, generator=generator)
    w = torch.randn(301, 16, generator=generator) * 0.3
    targets = torch.randint(301, (2, 12), generator=generator)
    for autocast, tolerance in [(False, 1e-5), (True, 1e-2)]:
        found = []
        for chunked in (False, True):
            features, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if chunked:
                    loss = chunked_cross_entropy(
                        features, weight, targets, chunk_size, pad_vocabulary=pad_vocabulary
                    )
                else:
                    loss = cross_entropy(torch.nn.functional.linear(features, weight), targets)
            (3 * loss).backward()
            found.append([loss.detach(), features.grad, weight.grad])
        for plain, by_chunks in zip(*found, strict=True):
            torch.testing.assert_close(by_chunks, plain, atol=tolerance, rtol=tolerance)


def test_chunked_loss_and_gradient_norm_stay_in_float64() -> None:
    """Loss, gradients and their norm agree to the precision of float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 16, generator=generator, dtype=torch.float64)
    w = torch.randn(301, 16, generator=generator, dtype=torch.float64)
    targets = torch.randint(301, (2, 12), generator=generator)
    found = []
    for chunk_size in (None, 7):
        features, weight = x.clone().requires_grad_(), w.clone().requires_grad_()
        if chunk_size is None:
            loss = cross_entropy(torch.nn.functional.linear(features, weight), targets)
        else:
            loss = chunked_cross_entropy(features, weight, targets, chunk_size)
        loss.backward()
        found.append([loss.detach(), features.grad, weight.grad])
    for plain, by_chunks in zip(*found, strict=True):
        torch.testing.assert_close(by_chunks, plain, atol=1e-14, rtol=1e-13)
    exact = torch.cat([x.flatten(), w.flatten()]).norm()
    torch.testing.assert_close(global_grad_norm([x, w]), exact, atol=0, rtol=1e-14)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("pad_vocabulary", [False, True])
def test_chunked_gradients_in_bf16_are_exact(device: str, pad_vocabulary: bool) -> None:
    """With many chunks, under autocast as in ``fit``, to the precision of bfloat16."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(4, 64, 64, generator=generator)
    w = torch.randn(301, 64, generator=generator) * 0.3
    targets = torch.randint(301, (4, 64), generator=generator).to(device)
    exact = [t.to(device, torch.bfloat16).double().requires_grad_() for t in (x, w)]
    cross_entropy(exact[0] @ exact[1].t(), targets).backward()
    own = [t.to(device).requires_grad_() for t in (x, w)]
    with torch.autocast(device, torch.bfloat16):
        chunked_cross_entropy(*own, targets, 50, pad_vocabulary=pad_vocabulary).backward()
    for found, expected in zip(own, exact, strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        off = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert off < 5e-3


def test_chunked_loss_in_bf16_is_as_exact_as_the_loss() -> None:
    """The gradients of the head's weight are summed in float32 over any number of chunks."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(1, 2048, 16, generator=generator).bfloat16()
    w = (torch.randn(100, 16, generator=generator) * 0.3).bfloat16()
    targets = torch.randint(100, (1, 2048), generator=generator)
    exact = w.float().requires_grad_()
    cross_entropy(x.float() @ exact.t(), targets).backward()
    errors = []
    for chunk_size in (None, 1024, 4):
        weight = w.clone().requires_grad_()
        if chunk_size is None:
            cross_entropy(x @ weight.t(), targets).backward()
        else:
            chunked_cross_entropy(x, weight, targets, chunk_size).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.bfloat16
        errors.append(float((weight.grad.float() - exact.grad).norm() / exact.grad.norm()))
    assert max(errors[1:]) < 1.5 * errors[0], errors


def test_chunks_have_at_most_the_given_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []
    add = loss_module._add_gradients
    monkeypatch.setattr(
        loss_module, "_add_gradients", lambda by, *rest: (rows.append(len(by)), add(by, *rest))
    )
    features = torch.randn(2, 12, 8, requires_grad=True)
    chunked_cross_entropy(features, torch.randn(30, 8), torch.zeros(2, 12, dtype=torch.int64), 7)
    assert rows == [7, 7, 7, 3]


def test_chunked_loss_keeps_no_logits() -> None:
    """The tensors kept for the backward pass have the shapes of the features and the weight."""
    x = torch.randn(1, 512, 8, requires_grad=True)
    w = torch.randn(5000, 8, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        chunked_cross_entropy(x, w, torch.zeros(1, 512, dtype=torch.int64), 64)
    assert max(kept) <= max(x.numel(), w.numel())


def test_chunked_loss_in_float16_keeps_small_gradients() -> None:
    """The factor of a scaler comes after the gradients are computed, too late for what float16 loses."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 256, 16, generator=generator, requires_grad=True)
    w = (torch.randn(20000, 16, generator=generator) * 0.02).requires_grad_()
    targets = torch.zeros(2, 256, dtype=torch.int64)
    grads = []
    for half in (False, True):
        w.grad = None
        with torch.autocast("cpu", torch.float16, enabled=half):
            chunked_cross_entropy(x, w, targets, 100).backward()
        grads.append(w.grad[1:])  # of rows that are no target
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-2, atol=1e-9)


def test_chunked_loss_computes_no_gradient_under_no_grad() -> None:
    x, w = torch.randn(1, 6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        chunked_cross_entropy(x, w, torch.arange(6)[None], 3)
    assert counter.get_total_flops() == 2 * 6 * 8 * 50


def test_chunked_loss_computes_no_gradient_that_is_not_required() -> None:
    x, w = torch.randn(1, 6, 8), torch.randn(50, 8)
    targets = torch.arange(6)[None]
    loss = chunked_cross_entropy(x, w, targets, 4)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, cross_entropy(x @ w.t(), targets))


@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("drop_rate", [0.0, 0.1])
def test_twenty_steps_in_bf16_equal_those_in_float32(chunk: int | None, drop_rate: float) -> None:
    """To 8 bits of mantissa; less exact with dropout, which draws other numbers."""
    config = GPTConfig(vocab_size=211, context_length=32, emb_dim=32, n_heads=4, n_layers=2,
                       drop_rate=drop_rate, tied_embeddings=True)  # fmt: skip
    ids = torch.randint(211, (4, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        model = GPTModel(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        for _ in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                if chunk is None or not bf16:
                    loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
                else:
                    features = model.features(ids[:, :-1])
                    loss = chunked_cross_entropy(features, model.head_weight, ids[:, 1:], chunk)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    float32, half = losses[:20], losses[20:]
    assert float32[0] - float32[-1] > 0.1  # it learns
    assert half == pytest.approx(float32, abs=0.01 if drop_rate == 0.0 else 0.1)
