"""Sampling filters (top-k, top-p, min-p): pure functions from logits ``(B, V)`` to probabilities and token ids.

:func:`probabilities` applies, in this order: repetition penalty, temperature, top-k, top-p, min-p, softmax.
Each filter gets the result of the one before. Transformers uses the same order. The random generator is an argument.

Shapes: B rows, T tokens, V ``vocab_size``.
"""

import math
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.model.precision import to_float64


@dataclass(frozen=True)
class SamplingParams:
    """Settings for choosing the next token. The default is greedy decoding.

    Args:
        temperature: Divisor of the logits. 0 is greedy (argmax), whatever the other settings are.
        top_k: Keep only the k most probable tokens, exactly k of them; ``None``: all.
        top_p: Keep only the most probable tokens that together reach this probability; ``None``: all.
        min_p: Keep only tokens with at least this fraction of the highest probability; ``None``: all.
        repetition_penalty: Above 1, tokens that already occur in the row become less probable.

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
                f"temperature: {self.temperature} is not a valid temperature; give 0 (greedy) or more"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k: {self.top_k} leaves no token; give 1 or more")
        for name, fraction in (("top_p", self.top_p), ("min_p", self.min_p)):
            if fraction is not None and not 0.0 < fraction <= 1.0:
                raise ValueError(
                    f"{name}: {fraction} is outside (0, 1]; leave it out to turn it off"
                )
        if not 0.01 <= self.repetition_penalty <= 100.0:
            raise ValueError(
                f"repetition_penalty: {self.repetition_penalty} is outside [0.01, 100]; 1 turns it off"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ``ValueError`` if ``top_k`` is larger than the vocabulary."""
        if self.top_k is not None and self.top_k > vocab_size:
            raise ValueError(
                f"top_k: {self.top_k} is outside the vocabulary; give 1 to {vocab_size}, or leave it out"
            )


def make_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A seeded random generator on ``device``. Raises ``ValueError`` if ``seed`` does not fit in 64 bits."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: {seed} has more than 64 bits; give a smaller one")
    return torch.Generator(device=device).manual_seed(seed)


def apply_repetition_penalty(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """Logits ``(B, V)``, reduced for the tokens that occur in ``ids`` ``(B, T)``. Ids of -1 are ignored.

    Positive logits are divided by ``penalty``, negative ones multiplied by it (Keskar et al. 2019, as
    implemented in transformers).
    """
    B, V = logits.shape
    seen = torch.zeros(B, V + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter_(1, torch.where(ids < 0, V, ids), True)[:, :V]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Logits ``(B, V)`` divided by ``temperature``, which is greater than 0 and may be very small.

    If a row would overflow, its maximum is subtracted first; this changes probabilities only in their last
    bits. All other rows, and the tokens drawn from them, are bit for bit those of the book.
    """
    if temperature >= 1.0:  # nothing can overflow
        return logits / temperature
    temperature = max(temperature, torch.finfo(torch.float32).tiny)
    scaled = logits / temperature
    overflows = (scaled.isinf() & logits.isfinite()).any(dim=-1, keepdim=True)
    shifted = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    return torch.where(overflows, shifted, scaled)


def top_k_filter(logits: Tensor, top_k: int) -> Tensor:
    """Logits ``(B, V)`` with all but exactly ``top_k`` per row set to -inf. Of equal logits the lower ids are kept.

    A threshold alone would keep all ties, and ``top_k=1`` would then not be greedy.
    """
    threshold = logits.topk(top_k, dim=-1).values[:, -1:]
    above = logits > threshold
    ties = logits == threshold
    num_ties_kept = top_k - above.sum(dim=-1, keepdim=True)
    keep = above | (ties & (ties.cumsum(dim=-1) <= num_ties_kept))
    return logits.masked_fill(~keep, -torch.inf)


def top_p_filter(logits: Tensor, top_p: float) -> Tensor:
    """Logits ``(B, V)`` with all but the most probable tokens that together reach ``top_p`` set to -inf.

    At least one token is kept.
    """
    sorted_logits, sorted_ids = logits.sort(dim=-1, descending=True, stable=True)
    p = to_float64(sorted_logits).softmax(dim=-1)
    more_probable = p.cumsum(dim=-1) - p  # total probability of the more probable tokens
    sorted_drop = (more_probable >= top_p).to(logits.device)
    sorted_drop[:, 0] = False
    drop = torch.zeros_like(sorted_drop).scatter(1, sorted_ids, sorted_drop)
    return logits.masked_fill(drop, -torch.inf)


def min_p_filter(logits: Tensor, min_p: float) -> Tensor:
    """Logits ``(B, V)`` with tokens below ``min_p`` × the highest probability of the row set to -inf."""
    p = logits.softmax(dim=-1)
    return logits.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), -torch.inf)


def probabilities(logits: Tensor, sampling: SamplingParams, ids: Tensor | None = None) -> Tensor:
    """Probabilities ``(B, V)`` of the next token, from logits ``(B, V)``.

    At temperature 0 the probability of the argmax is 1 (of equal logits the lowest id). The result is
    float32 or wider for any dtype of the logits: in bfloat16 the filters and draws would be inexact.

    Args:
        ids: ``(B, T)``, previous tokens for the repetition penalty; -1 is ignored.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.repetition_penalty != 1.0 and ids is not None:
        logits = apply_repetition_penalty(logits, ids, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        argmax_ids = logits.argmax(dim=-1, keepdim=True)
        return torch.zeros_like(logits).scatter(1, argmax_ids, 1.0)
    logits = apply_temperature(logits, sampling.temperature)
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits = top_k_filter(logits, sampling.top_k)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        logits = top_p_filter(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = min_p_filter(logits, sampling.min_p)
    return logits.softmax(dim=-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats of distributions ``(..., V)``, in float64. exp(entropy) is the effective number of tokens.

    On a device without float64 the result is on the host.
    """
    return torch.special.entr(to_float64(p)).sum(dim=-1)


def sample(
    logits: Tensor,
    sampling: SamplingParams,
    *,
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token id per row, ``(B,)``, sampled from logits ``(B, V)``.

    Temperature 0 uses no random numbers. Without a ``generator``, torch's global generator is used.

    Raises:
        ValueError: The maximum of a row is not finite: it has NaN, +inf or only -inf.
    """
    check_finite(logits.amax(dim=-1))
    return sample_unchecked(logits, sampling, ids=ids, generator=generator)


class NonFiniteLogitsError(ValueError):
    """A row of logits has NaN, +inf or only -inf."""

    def __init__(self) -> None:
        super().__init__(
            "logits: a row has NaN, +inf or only -inf; the model's weights are damaged"
        )


def check_finite(max_logits: Tensor) -> None:
    """Raise :class:`NonFiniteLogitsError` if the maximum logit of a row is not finite. The maximum of a row with NaN is NaN."""
    if not all(map(math.isfinite, max_logits.flatten().tolist())):
        raise NonFiniteLogitsError


def sample_unchecked(
    logits: Tensor,
    sampling: SamplingParams,
    *,
    ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`sample` without the check for finite logits, so the host does not wait for the GPU."""
    if sampling.temperature == 0.0:
        if sampling.repetition_penalty != 1.0 and ids is not None:
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logits = apply_repetition_penalty(logits, ids, sampling.repetition_penalty)
        return logits.argmax(dim=-1)
    p = probabilities(logits, sampling, ids)
    return multinomial_no_sync(p, generator) if p.is_cuda else _multinomial(p, generator)


def _multinomial(p: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.multinomial(p, 1, generator=generator).squeeze(1)


def multinomial_no_sync(p: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id per row drawn from distributions ``(B, V)``: torch.multinomial without its checks of ``p``.

    The draws are the same. The checks would make the host wait for the GPU twice.
    """
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(dim=-1)


def sample_rows(
    logits: Tensor,
    sampling: SamplingParams,
    generators: Sequence[torch.Generator | None],
    *,
    ids: Tensor | None = None,
    executor: Executor | None = None,
) -> Tensor:
    """One token id per row, ``(B,)``, from logits ``(B, V)``; each row draws with a generator of its own.

    A row's id is the one that :func:`sample_unchecked` draws for this row alone with its generator.

    Args:
        executor: Threads for the rows. Torch draws random numbers on one processor, 1 ms per row of GPT-2's vocabulary.
    """
    if sampling.temperature == 0.0:
        return sample_unchecked(logits, sampling, ids=ids)
    p = probabilities(logits, sampling, ids)
    draw = multinomial_no_sync if p.is_cuda else _multinomial
    mapped = map if executor is None or len(generators) == 1 else executor.map
    return torch.cat(list(mapped(draw, p.split(1), generators)))
