"""Logits to ids: pure functions on ``(B, V)``. The generator is passed in, never global by accident.

The order, in :func:`probabilities`: repetition penalty, temperature, top-k, top-p, min-p, each on what
the one before left, then softmax. transformers has the same order.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. By default it is the likeliest.

    Args:
        temperature: What logits are divided by. 0 is the argmax, whatever the other settings say.
        top_k: Only the k likeliest tokens can be drawn, exactly k; none: all.
        top_p: Only the likeliest tokens that together reach this probability can be drawn; none: all.
        min_p: Only tokens at least this times as probable as the likeliest can be drawn; none: all.
        repetition_penalty: Above 1, tokens that were read or written before become less likely.

    Raises:
        ValueError: A setting is outside its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature: {self.temperature} is no temperature; give 0 (greedy) or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} leaves no token; give 1 or more")
        for name, share in (("top_p", self.top_p), ("min_p", self.min_p)):
            if share is not None and not 0.0 < share <= 1.0:
                raise ValueError(f"{name}: {share} is outside (0, 1]; leave it out to turn it off")
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise ValueError(
                f"repetition_penalty: {self.repetition_penalty} is outside [0.01, 100]; 1 turns it off"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ``ValueError`` where ``top_k`` is more than there are tokens."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"top_k: {self.top_k} is outside the vocabulary; give 1 to {vocab_size}, or leave it out"
            )


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of the device; ``ValueError`` where ``seed`` is no number of 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: {seed} has more than 64 bits; give a smaller one")
    return torch.Generator(device=device).manual_seed(seed)


def apply_repetition_penalty(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits ``(B, V)`` with those of the tokens in ``ids`` ``(B, T)`` made smaller by ``penalty``.

    Positive ones are divided, negative ones multiplied by it (Keskar et al. 2019, as transformers has
    it). An id of -1 is no token.
    """
    B, V = logits.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter_(1, torch.where(ids < 0, V, ids), True)[:, :V]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits ``(B, V)`` divided by ``temperature``, which is > 0, however small.

    A row that would overflow is divided less its largest logit, which changes no probability but in
    its last bits; the others are the book's to the bit, and so are the draws.
    """
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    scaled = logits / temperature
    overflows = (scaled.isinf() & logits.isfinite()).any(dim=-1, keepdim=True)
    less = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.where(overflows, less, scaled)


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """Logits ``(B, V)`` with all but exactly ``top_k`` a row at -inf; of equal ones the lower ids stay.

    A mere threshold would keep every tie, and ``top_k=1`` would then not be greedy.
    """
    lowest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
    above = logits > lowest_kept
    ties = logits == lowest_kept
    room_for_ties = top_k - above.sum(dim=-1, keepdim=True)
    kept = above | (ties & (ties.cumsum(dim=-1) <= room_for_ties))
    return logits.masked_fill(~kept, -torch.inf)


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Logits ``(B, V)`` with only the likeliest tokens left that together reach ``top_p``, at least one."""
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    p = descending.double().softmax(dim=-1)
    before = p.cumsum(dim=-1) - p  # what the likelier ones reach without this one
    dropped = before >= top_p
    dropped[:, 0] = False
    return logits.masked_fill(torch.zeros_like(dropped).scatter(1, order, dropped), -torch.inf)


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Logits ``(B, V)`` with tokens less than ``min_p`` times as probable as the likeliest at -inf."""
    p = logits.softmax(dim=-1)
    return logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)


def probabilities(logits: Tensor, sampling: SamplingParams, ids: Tensor | None = None) -> Tensor:
    """The distribution ``(B, V)`` a token is drawn from, given logits ``(B, V)`` and the ids before.

    At temperature 0 it is 1 at the argmax, the lowest id of equal ones. It is float32 or wider, whatever
    the logits are: filters and draws would notice bfloat16.

    Args:
        ids: ``(B, T)``, for the repetition penalty; -1 is no token.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0 and ids is not None:
        logits = apply_repetition_penalty(logits, ids, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        likeliest = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(1, likeliest, 1.0)
    logits = apply_temperature(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = top_p_filter(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p_filter(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions ``(..., V)``, in double precision; its exp is as many equal tokens."""
    return torch.special.entr(p.double()).sum(dim=-1)


def sample(
    logits: Tensor,
    sampling: SamplingParams,
    *,
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One id a row, ``(B,)``, from logits ``(B, V)``; temperature 0 draws no random number.

    Without a generator the draw is on torch's global one.

    Raises:
        ValueError: A row has a NaN, or no finite logit at all.
    """
    check_finite(logits.amax(dim=-1))
    return choose(logits, sampling, ids=ids, generator=generator)


def check_finite(largest: Tensor) -> None:
    """Raises ``ValueError`` where one of the rows' largest logits is no number: a NaN is the largest of all."""
    if not torch.isfinite(largest).all():
        raise ValueError(
            "logits: a row has NaN, +inf or only -inf; the model's weights are damaged"
        )


def choose(
    logits: Tensor,
    sampling: SamplingParams,
    *,
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`sample` of logits that are known to be finite: the host does not wait for a GPU."""
    if sampling.temperature == 0.0:
        if sampling.repetition_penalty != 1.0 and ids is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = apply_repetition_penalty(logits, ids, sampling.repetition_penalty)
        return logits.argmax(dim=-1)
    p = probabilities(logits, sampling, ids)
    if p.is_cuda:
        return multinomial_no_sync(p, generator)
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def multinomial_no_sync(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id a row from distributions ``(B, V)``: what torch.multinomial draws, less its checks of ``p``,
    for which the host waits twice."""
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)
