"""Logits to ids: pure functions on ``(B, V)``. The generator is passed in, never global by accident."""

import torch
from torch import Tensor


def keep_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits ``(B, V)`` with all but exactly ``top_k`` a row at -inf; of equal ones the lower id stays.

    A mere threshold would keep every tie, and ``top_k=1`` would then not be greedy.
    """
    lowest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
    above = logits > lowest_kept
    ties = logits == lowest_kept
    room_for_ties = top_k - above.sum(dim=-1, keepdim=True)
    kept = above | (ties & (ties.cumsum(dim=-1) <= room_for_ties))
    return logits.masked_fill(~kept, -torch.inf)


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax of ``logits / temperature``, ``(B, V)``; ``temperature`` > 0, however small.

    The largest logit is taken off first, so that the division cannot overflow to +inf.
    """
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    return torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id a row, ``(B,)``, from logits ``(B, V)``: top-k, then temperature, then a draw.

    ``temperature=0`` is the argmax and draws nothing; ``top_k=1`` agrees with it. Without a generator
    the draw is on torch's global one.
    """
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    drawn = torch.multinomial(probabilities(logits, temperature), 1, generator=generator)
    return drawn.squeeze(1)
