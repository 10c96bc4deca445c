"""A chunk's loss and its gradient by the logits in one kernel, which changes the logits in place.

A compiler makes two of it, whose second finds nothing of a row left in the GPU's cache, and masks where there is nothing
to mask: it takes nearly twice as long (benchmarks/README.md). Needs Triton: see :mod:`gpt_lightning.kernels.support`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16  # columns at a time, of a multiple of 8; measured on an H200


@triton.jit
def _more(y, largest, total):
    """Powers of 2 of ``y`` (n, 8) added to the sums ``total`` (n,), which are relative to ``largest`` (n,)."""
    larger = tl.maximum(largest, tl.max(y, 1))
    return larger, total * tl.exp2(largest - larger) + tl.sum(tl.exp2(y - larger[:, None]), 1)


@triton.jit
def _loss_and_gradient(
    logits, targets, losses, by,
    V: tl.constexpr, WIDTH: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``losses`` (n,) get each row's -log p, NaN where its target is no token, and ``logits`` (n, WIDTH), if GRADIENT, the
    gradient of ``by`` times that."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    FULL: tl.constexpr = V // BLOCK * BLOCK  # columns of blocks that need no mask
    row = tl.program_id(0)
    logits += row.to(tl.int64) * WIDTH
    target = tl.load(targets + row)
    is_token = (target >= 0) & (target < V)
    of_target = tl.load(logits + target, mask=is_token, other=float("nan")).to(tl.float32)
    i = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    largest = tl.full((BLOCK // 8,), -1e38, tl.float32)
    total = tl.zeros((BLOCK // 8,), tl.float32)
    for start in range(0, FULL, BLOCK):
        y = tl.load(logits + start + i).to(tl.float32) * LOG2_E
        largest, total = _more(y, largest, total)
    for start in range(FULL, V, BLOCK):
        y = tl.load(logits + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32) * LOG2_E
        largest, total = _more(tl.where(start + i < V, y, float("-inf")), largest, total)
    most = tl.max(largest, 0)
    log2_z = most + tl.log2(tl.sum(total * tl.exp2(largest - most), 0))
    tl.store(losses + row, log2_z / LOG2_E - of_target)
    if GRADIENT:
        for start in range(0, FULL, BLOCK):
            y = tl.load(logits + start + i).to(tl.float32)
            tl.store(logits + start + i, tl.exp2(y * LOG2_E - log2_z) * by)
        for start in range(FULL, WIDTH, BLOCK):
            y = tl.load(logits + start + i, mask=start + i < WIDTH, other=0.0).to(tl.float32)
            grad = tl.where(start + i < V, tl.exp2(y * LOG2_E - log2_z) * by, 0.0)
            tl.store(logits + start + i, grad, mask=start + i < WIDTH)
        tl.debug_barrier()  # the target's place was written above
        tl.store(logits + target, (tl.exp2(of_target * LOG2_E - log2_z) - 1.0) * by, mask=is_token)


def loss_and_gradient_(
    logits: Tensor, targets: Tensor, vocab_size: int, by: float, *, gradient: bool = True
) -> Tensor:
    """Summed loss in nats of ``logits`` (n, V or more); with ``gradient`` they become the
    gradient of ``by`` times it, in their dtype.

    Columns from ``vocab_size`` on have no probability and no gradient. The loss is NaN where a target is no token.
    """
    assert logits.is_contiguous()
    targets = targets.contiguous()
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):  # Triton launches on the current one
        _loss_and_gradient[(len(logits),)](
            logits, targets, losses, by,
            V=vocab_size, WIDTH=logits.shape[1], GRADIENT=gradient, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return losses.sum()
