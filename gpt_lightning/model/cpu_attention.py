"""Causal attention of a training step on a CPU, as matrix products and a softmax, by blocks of queries.

A block attends to the keys up to its last query, which saves nearly half of the products. On a CPU with bfloat16
instructions this takes 0.4 to 1.0 of the time of torch's fused kernel, which converts each block to float32
(benchmarks/README.md).

Shapes: B batch, H heads, T tokens, D numbers of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ATTENTION_BLOCK = 256  # queries that are computed at once
MAX_KEPT_LENGTH = 512  # the attention weights of longer windows would take too much memory


def products_are_faster(q: Tensor, drop_rate: float) -> bool:
    """Whether :func:`causal_attention_by_products` is faster than torch's fused kernel. It is on CPUs in bfloat16."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    # the second form was not tried with torch's compiler
    return _keeps_weights(q) or (drop_rate == 0.0 and not torch.compiler.is_compiling())


def causal_attention_by_products(q: Tensor, k: Tensor, v: Tensor, drop_rate: float) -> Tensor:
    """Inputs and output are ``(B, H, T, D)``. Windows of more than :data:`MAX_KEPT_LENGTH` tokens have no dropout."""
    if _keeps_weights(q):
        return kept_causal_attention(q, k, v, drop_rate)
    return RecomputedCausalAttention.apply(q, k, v)


def _keeps_weights(q: Tensor) -> bool:
    return q.shape[-2] <= MAX_KEPT_LENGTH


def kept_causal_attention(q: Tensor, k: Tensor, v: Tensor, drop_rate: float) -> Tensor:
    """Attention that keeps its weights, those of :func:`attention_weights_of_blocks` for each head."""
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    outputs = []
    for start, end in _attention_blocks(T):
        weights = F.dropout(_attention_weights(q, k, start, end), drop_rate)
        outputs.append(weights @ v[:, :end])
    return torch.cat(outputs, dim=1).view(B, H, T, D)


class RecomputedCausalAttention(torch.autograd.Function):
    """Attention without dropout that keeps no weights: the backward pass computes those of a block again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return kept_causal_attention(q, k, v, 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad_output,) = grad_outputs
        B, H, T, D = grad_output.shape
        q, k, v, grad_y = (x.reshape(B * H, T, D) for x in (*ctx.saved_tensors, grad_output))
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start, end in reversed(_attention_blocks(T)):
            weights, block_grad_y = _attention_weights(q, k, start, end), grad_y[:, start:end]
            grad_v[:, :end] += weights.transpose(1, 2) @ block_grad_y
            grad_weights = block_grad_y @ v[:, :end].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_q[:, start:end] = grad_scores @ k[:, :end]
            grad_k[:, :end] += grad_scores.transpose(1, 2) @ q[:, start:end]
            del weights, grad_weights, grad_scores  # before those of the next block
        scale = D**-0.5
        return (
            grad_q.mul_(scale).view(B, H, T, D),
            grad_k.mul_(scale).view(B, H, T, D),
            grad_v.view(B, H, T, D),
        )


def attention_weights_of_blocks(length: int) -> list[int]:
    """Attention weights that each block of a window has for a head."""
    return [(end - start) * end for start, end in _attention_blocks(length)]


def _attention_blocks(length: int) -> list[tuple[int, int]]:
    """The first query of each block, and the one after its last."""
    return [
        (start, min(start + ATTENTION_BLOCK, length)) for start in range(0, length, ATTENTION_BLOCK)
    ]


def _attention_weights(q: Tensor, k: Tensor, start: int, end: int) -> Tensor:
    """The weights of a block of queries and the keys before its end, ``(B * H, end - start, end)``."""
    mask = torch.full((end - start, end), -torch.inf, dtype=q.dtype, device=q.device)
    scores = torch.baddbmm(
        mask.triu(start + 1).expand(len(q), -1, -1),
        q[:, start:end],
        k[:, :end].transpose(1, 2),
        alpha=q.shape[-1] ** -0.5,
    )
    return scores.softmax(dim=-1)
