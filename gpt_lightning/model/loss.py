"""Cross-entropy loss of the next token, optionally in chunks so that the logits are never all in memory.

Symbols: N tokens (B × T), C ``emb_dim``, V ``vocab_size``. The logits are the largest tensor of a training
step: at B 4, T 1024 and GPT-2's V they take 0.8 GB in float32, and their gradient takes as much again.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.kernels.support import kernels_unsupported_reason, log_unsupported_once

logger = logging.getLogger(__name__)

PAD_VOCABULARY_TO = 64


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per token: logits ``(B, T, V)``, targets ``(B, T)`` → scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int,
    *,
    pad_vocabulary: bool = False,
) -> Tensor:
    """:func:`cross_entropy` of the logits ``features @ weight.T``, computed ``chunk_size`` tokens at a time.

    The forward pass also computes the gradients, while the logits of a chunk are in memory. So no logits
    are kept or computed twice. Higher derivatives are not supported.

    Args:
        features: ``(B, T, C)``, output of the model's final norm.
        weight: ``(V, C)``, the output head.
        targets: ``(B, T)``.
        chunk_size: Number of tokens whose logits are in memory at once, ``(chunk_size, V)``. The loss is
            computed from them in float32 (float64 for a float64 model), in a copy unless the Triton kernel runs.
        pad_vocabulary: Whether to round V up to a multiple of 64 in the matrix product, which is faster
            on GPUs. The padded columns have probability 0 and no gradient.
    """
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    if dtype == torch.float16:
        dtype = (
            torch.float32
        )  # float16 cannot represent the small gradients of a mean before loss scaling
    if not torch.is_grad_enabled():
        features, weight = features.detach(), weight.detach()
    loss: Tensor = _ChunkedCrossEntropy.apply(
        features.flatten(0, 1),
        weight,
        targets.flatten(),
        chunk_size,
        pad_vocabulary,
        dtype,
    )
    return loss


@cache
def _kernel(device: torch.device) -> Callable[..., Tensor] | None:
    """The Triton kernel for the loss of one chunk; ``None`` if the device cannot run it."""
    if reason := kernels_unsupported_reason(device):
        log_unsupported_once(device.type, reason)
        return None
    try:
        from gpt_lightning.kernels.cross_entropy import loss_and_gradient_

        target = torch.zeros(1, dtype=torch.int64, device=device)
        loss_and_gradient_(torch.zeros(1, 8, device=device), target, 8, 1.0)
    except Exception as error:  # the compiler and its tools raise errors of many types
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            f"loss_chunk_size: the Triton kernel could not be compiled ({cause}); "
            "the loss is computed without it, which is slower"
        )
        return None
    return loss_and_gradient_


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Autograd function of :func:`chunked_cross_entropy` on features ``(N, C)`` and targets ``(N,)``."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_size: int,
        pad_vocabulary: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        N, V = len(features), len(weight)
        needs_grad = ctx.needs_input_grad[:2]
        # the kernel accumulates in float32, which is not enough for float64
        kernel = None if dtype == torch.float64 else _kernel(features.device)
        with torch.autocast(features.device.type, enabled=False):
            x, w = features.to(dtype), weight.to(dtype)
            if pad_vocabulary and V % PAD_VOCABULARY_TO:
                w = F.pad(w, (0, 0, 0, -V % PAD_VOCABULARY_TO))
            loss_dtype = torch.promote_types(dtype, torch.float32)
            total = torch.zeros((), dtype=loss_dtype, device=x.device)
            grad_x = torch.empty_like(features) if needs_grad[0] else None
            # accumulated over many chunks, so in float32 at least: in 16 bits each addition would round
            grad_w_dtype = torch.promote_types(weight.dtype, torch.float32)
            grad_w = (
                torch.zeros(w.shape, dtype=grad_w_dtype, device=w.device) if needs_grad[1] else None
            )
            # all chunks share one buffer: on a CPU, each new one would cost a page fault per page
            buffer = x.new_empty(min(chunk_size, N), len(w))
            for start in range(0, N, chunk_size):
                chunk = slice(start, min(start + chunk_size, N))
                logits = torch.mm(x[chunk], w.t(), out=buffer[: chunk.stop - start])
                if kernel is not None:  # it replaces the logits by their gradient, in place
                    total += kernel(logits, targets[chunk], V, 1 / N, gradient=any(needs_grad))
                    _add_gradients(logits, x[chunk], w, grad_x, grad_w, chunk)
                    continue
                logits = logits.to(loss_dtype)
                logits[:, V:] = -torch.inf
                target = targets[chunk, None]
                target_logit = logits.gather(1, target)
                max_logit = logits.amax(dim=-1, keepdim=True)
                # in place, because the logits do not fit into the CPU's cache
                exps = logits.sub_(max_logit).exp_()
                z = exps.sum(dim=-1, keepdim=True)
                total += (z.log() + max_logit - target_logit).sum()
                if not any(needs_grad):
                    continue
                # gradient by the logits: (softmax - one_hot(target)) / N
                grad = exps.div_(z * N)
                grad.scatter_add_(1, target, grad.new_full((1, 1), -1 / N).expand_as(target))
                grad = grad.to(dtype)
                _add_gradients(grad, x[chunk], w, grad_x, grad_w, chunk)
        ctx.save_for_backward(grad_x, None if grad_w is None else grad_w[:V].to(weight.dtype))
        return total / N

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g.mul_(scale[0]) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _add_gradients(
    grad_logits: Tensor,
    x: Tensor,
    w: Tensor,
    grad_x: Tensor | None,
    grad_w: Tensor | None,
    chunk: slice,
) -> None:
    """Write the chunk's rows of ``grad_x``, and add the chunk's share to ``grad_w``."""
    if grad_x is not None:
        grad_x[chunk] = grad_logits @ w
    if grad_w is None:
        return
    if grad_w.is_cuda and grad_w.dtype != x.dtype:
        # on a GPU, a product of 16-bit matrices can accumulate in float32
        torch.addmm(grad_w, grad_logits.t(), x, out_dtype=grad_w.dtype, out=grad_w)
    elif grad_w.dtype == x.dtype:
        grad_w.addmm_(grad_logits.t(), x)
    else:
        grad_w += grad_logits.t() @ x
