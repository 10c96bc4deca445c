"""Triton kernel for the loss of a chunk and its gradient, which overwrites the logits with the gradient.

torch.compile makes two kernels of this computation. The second must read the rows from memory again, and both
mask all blocks; together they take nearly twice as long (benchmarks/README.md). Triton is needed: see
:mod:`gpt_lightning.kernels.support`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# columns per iteration (a multiple of 8) and warps per program; the fastest on an H200
BLOCK, WARPS = 4096, 16


@triton.jit
def _online_logsumexp(y, running_max, running_sum):
    """One step of n online softmaxes in base 2, with 8 more values each: ``y`` (n, 8).

    ``running_max`` (n,) is the maximum so far, ``running_sum`` (n,) the sum of 2 ** (y - running_max).
    """
    new_max = tl.maximum(running_max, tl.max(y, 1))
    rescaled = running_sum * tl.exp2(running_max - new_max)
    return new_max, rescaled + tl.sum(tl.exp2(y - new_max[:, None]), 1)


@triton.jit
def _loss_and_gradient(
    logits, targets, losses, grad_scale,
    V: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss -log p of each row into ``losses`` (n,): NaN if its target is not a token id.

    With GRADIENT, ``logits`` (n, WIDTH) are overwritten with the gradient of ``grad_scale`` × loss. Columns from V
    on are padding. One program computes one row.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    FULL: tl.constexpr = V // BLOCK * BLOCK  # columns in full blocks, which need no mask
    row = tl.program_id(0)
    logits += row.to(tl.int64) * WIDTH
    target = tl.load(targets + row)
    is_token = (target >= 0) & (target < V)
    target_logit = tl.load(logits + target, mask=is_token, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    running_max = tl.full((BLOCK // 8,), -1e38, tl.float32)
    running_sum = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, FULL, BLOCK):
        y = tl.load(logits + start + i).to(tl.float32) * LOG2_E
        running_max, running_sum = _online_logsumexp(y, running_max, running_sum)
    for start in range(FULL, V, BLOCK):
        y = tl.load(logits + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32) * LOG2_E
        y = tl.where(start + i < V, y, float("-inf"))
        running_max, running_sum = _online_logsumexp(y, running_max, running_sum)
    row_max = tl.max(running_max, 0)
    log2_z = row_max + tl.log2(tl.sum(running_sum * tl.exp2(running_max - row_max), 0))
    tl.store(losses + row, log2_z / LOG2_E - target_logit)
    if GRADIENT:
        for start in range(0, FULL, BLOCK):
            y = tl.load(logits + start + i).to(tl.float32)
            tl.store(logits + start + i, tl.exp2(y * LOG2_E - log2_z) * grad_scale)
        for start in range(FULL, WIDTH, BLOCK):
            y = tl.load(logits + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32)
            grad = tl.where(start + i < V, tl.exp2(y * LOG2_E - log2_z) * grad_scale, 0.0)
            tl.store(logits + start + i, grad, mask=start + i < WIDTH)
        tl.debug_barrier()  # the loop above has also written the target's column
        grad = (tl.exp2(target_logit * LOG2_E - log2_z) - 1.0) * grad_scale
        tl.store(logits + target, grad, mask=is_token)


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, vocab_size: int, grad_scale: float, *, gradient: bool = True
) -> Tensor:
    """Sum of the cross-entropy losses in nats of ``logits`` (n, width) and ``targets`` (n,).

    Columns from ``vocab_size`` on have probability 0 and gradient 0. The loss is NaN if a target is not
    a token id.

    Args:
        grad_scale: Factor of the gradient.
        gradient: Whether to overwrite ``logits`` with ``grad_scale`` × the gradient of the loss, in their dtype.
    """
    assert logits.is_contiguous()
    targets = targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches kernels on the current device
        _loss_and_gradient[(len(logits),)](
            logits, targets, losses, grad_scale,
            V=vocab_size, WIDTH=logits.shape[1], GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses.sum()
