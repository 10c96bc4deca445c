"""Next-token cross-entropy, whole or without ever holding all logits.

N tokens (B × T), C ``emb_dim``, V ``vocab_size``. The logits of N tokens are the largest tensor of a training
step: at B 4, T 1024 they take 0.8 GB in float32, and as much again for their gradient.
"""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_lightning.kernels.support import kernels_unsupported_reason

logger = logging.getLogger(__name__)

PAD_VOCABULARY_TO = 64


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats a token: logits ``(B, T, V)``, targets ``(B, T)`` → scalar."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def chunked_cross_entropy(
    features: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_size: int,
    *,
    pad_vocabulary: bool = False,
) -> Tensor:
    """:func:`cross_entropy` of ``features @ weight.T``, of ``chunk_size`` tokens at a time.

    The gradients are computed in the forward pass, where a chunk's logits are at hand, so no logits are kept
    and none computed twice. It can be differentiated once, by what its scalar is scaled with.

    Args:
        features: ``(B, T, C)``, the model's last norm.
        weight: ``(V, C)``, the head's.
        targets: ``(B, T)``.
        chunk_size: Tokens whose logits are held, ``(chunk_size, V)``, in float32 (float64 where the model is), unless
            a kernel takes them as they are.
        pad_vocabulary: Whether the product is computed with V rounded up to a multiple of 64, which GPUs
            are faster at. The extra rows have no probability and no gradient.
    """
    dtype = features.dtype
    if torch.is_autocast_enabled(features.device.type):
        dtype = torch.get_autocast_dtype(features.device.type)
    if dtype == torch.float16:
        dtype = torch.float32  # gradients of a mean are too small for it before they are scaled
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
    """For a chunk on a GPU; none where it cannot be."""
    if kernels_unsupported_reason(device):
        return None
    try:
        from gpt_lightning.kernels.cross_entropy import loss_and_gradient_

        target = torch.zeros(1, dtype=torch.int64, device=device)
        loss_and_gradient_(torch.zeros(1, 8, device=device), target, 8, 1.0)
    except Exception as error:  # of a compiler or what it needs, of many kinds
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        logger.warning(
            f"loss_chunk_size: the kernel of a chunk could not be compiled ({cause}); "
            "the loss is computed without, slower"
        )
        return None
    return loss_and_gradient_


class _ChunkedCrossEntropy(torch.autograd.Function):
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
        wants = ctx.needs_input_grad[:2]
        kernel = None if dtype == torch.float64 else _kernel(features.device)  # it adds in float32
        with torch.autocast(features.device.type, enabled=False):
            x, w = features.to(dtype), weight.to(dtype)
            if pad_vocabulary and V % PAD_VOCABULARY_TO:
                w = F.pad(w, (0, 0, 0, -V % PAD_VOCABULARY_TO))
            precise = torch.promote_types(dtype, torch.float32)
            total = torch.zeros((), dtype=precise, device=x.device)
            grad_x = torch.empty_like(features) if wants[0] else None
            # of many chunks, which 16 bits would round to their sum one by one
            sums = torch.promote_types(weight.dtype, torch.float32)
            grad_w = torch.zeros(w.shape, dtype=sums, device=w.device) if wants[1] else None
            # one memory for all chunks: that of each anew would be handed out page by page on a CPU
            memory = x.new_empty(min(chunk_size, N), len(w))
            for start in range(0, N, chunk_size):
                part = slice(start, min(start + chunk_size, N))
                logits = torch.mm(x[part], w.t(), out=memory[: part.stop - start])
                if kernel is not None:  # the logits become their gradient
                    total += kernel(logits, targets[part], V, 1 / N, gradient=any(wants))
                    _add_gradients(logits, x[part], w, grad_x, grad_w, part)
                    continue
                logits = logits.to(precise)
                logits[:, V:] = -torch.inf
                target = targets[part, None]
                of_target = logits.gather(1, target)
                largest = logits.amax(dim=-1, keepdim=True)
                powers = logits.sub_(
                    largest
                ).exp_()  # in place, for the logits are larger than a cache
                z = powers.sum(dim=-1, keepdim=True)
                total += (z.log() + largest - of_target).sum()
                if not any(wants):
                    continue
                # softmax less the one that was right, over N: the gradient by the logits
                grad = powers.div_(z * N)
                grad.scatter_add_(1, target, grad.new_full((1, 1), -1 / N).expand_as(target))
                grad = grad.to(dtype)
                _add_gradients(grad, x[part], w, grad_x, grad_w, part)
        ctx.save_for_backward(grad_x, None if grad_w is None else grad_w[:V].to(weight.dtype))
        return total / N

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g.mul_(scale[0]) for g in ctx.saved_tensors)
        return (*grads, None, None, None, None)


def _add_gradients(
    by_logits: Tensor,
    x: Tensor,
    w: Tensor,
    grad_x: Tensor | None,
    grad_w: Tensor | None,
    part: slice,
) -> None:
    if grad_x is not None:
        grad_x[part] = by_logits @ w
    if grad_w is None:
        return
    if grad_w.is_cuda and grad_w.dtype != x.dtype:
        # a GPU's product adds in float32 what it multiplies in bfloat16
        torch.addmm(grad_w, by_logits.t(), x, out_dtype=grad_w.dtype, out=grad_w)
    elif grad_w.dtype == x.dtype:
        grad_w.addmm_(by_logits.t(), x)
    else:
        grad_w += by_logits.t() @ x
