"""What a model thinks of a token: its log-probability, its rank, and the tokens it was chosen from.

Shapes: R rows, T tokens, V ``vocab_size``.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import SamplingParams, check_finite, probabilities
from gpt_lightning.model.gpt import GPTModel

SCORED_POSITIONS = 64  # logits of a prompt that are in memory at the same time


@dataclass(frozen=True)
class TokenScore:
    """What the model's own distribution, at temperature 1 and without filters, says about a token.

    Attributes:
        logprob: Natural logarithm of the token's probability.
        rank: 1 = the most probable token.
        top: The most probable tokens and their log-probabilities.
    """

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]

    @property
    def surprisal(self) -> float:
        """Minus the log-probability, in nats."""
        return -self.logprob


@dataclass(frozen=True)
class Candidate:
    """A token that could have been sampled.

    Attributes:
        probability: After temperature and filters.
        model_probability: Of the model's own distribution, at temperature 1 and without filters.
    """

    token: int
    probability: float
    model_probability: float


def score_tokens(logits: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenScore]:
    """Scores of one token per row, from logits ``(R, V)``."""
    logits = logits.float()
    logprobs = logits.log_softmax(dim=-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = logprobs.gather(1, index)
    ranks = token_ranks(logits, index)
    top = logprobs.topk(min(num_top, logits.shape[-1]), dim=-1)
    return [
        TokenScore(token, logprob, rank, list(zip(top_ids, top_logprobs, strict=True)))
        for token, (logprob,), rank, top_ids, top_logprobs in zip(
            tokens,
            chosen.tolist(),
            ranks.tolist(),
            top.indices.tolist(),
            top.values.tolist(),
            strict=True,
        )
    ]


def token_ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Ranks ``(R,)`` of tokens ``(R, 1)`` by their logits ``(R, V)``; 1 = the most probable token.

    Of equal logits the lower id comes first, as in greedy decoding. Log-probabilities have more equal values: they
    are rounded once more.
    """
    chosen = logits.gather(1, tokens)
    is_lower_id = torch.arange(logits.shape[-1], device=logits.device) < tokens
    is_before = (logits > chosen) | ((logits == chosen) & is_lower_id)
    return is_before.sum(dim=-1) + 1


def score_prompt(
    model: GPTModel, features: Tensor, ids: Sequence[int], num_top: int
) -> list[TokenScore]:
    """Scores of all ids but the first, from the features ``(T, C)`` of the ids.

    Raises:
        ValueError: The logits are not finite.
    """
    scores: list[TokenScore] = []
    for start in range(0, len(ids) - 1, SCORED_POSITIONS):
        targets = ids[start + 1 : start + 1 + SCORED_POSITIONS]
        logits = model.head(features[start : start + len(targets)])
        check_finite(logits.amax(dim=-1))
        scores += score_tokens(logits, targets, num_top)
    return scores


def candidates(
    logits: Tensor, sampling: SamplingParams, num: int, ids: Tensor | None = None
) -> list[Candidate]:
    """The ``num`` tokens that are most probable after temperature and filters, from logits ``(1, V)``."""
    p = probabilities(logits, sampling, ids)[0]
    own = logits[0].float().softmax(dim=-1)
    # temperature 0 leaves one token: the model's own distribution decides the order of the others
    order = torch.where(p > 0, 1 + p, own).topk(min(num, len(p))).indices
    return [
        Candidate(token, probability, model_probability)
        for token, probability, model_probability in zip(
            order.tolist(), p[order].tolist(), own[order].tolist(), strict=True
        )
    ]
