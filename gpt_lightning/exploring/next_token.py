"""Distribution of the next token: exact probabilities, what the settings cut off, entropy, draws.

The logits are computed once; each change of a setting is applied to them on the host by
:mod:`gpt_lightning.generation.sampling`. V is the size of the vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.exploring.tokens import Json, finite_or_none, token_json
from gpt_lightning.generation.sampling import (
    SamplingParams,
    check_finite,
    entropy,
    make_generator,
    probabilities,
)
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.serving.token_scores import token_ranks

MAX_BARS = 500
_SPARE_POSITIONS = 64  # for tokens that are added to a text


@dataclass(frozen=True)
class NextToken:
    """The model's own distribution of the next token, before any setting. The tensors are on the host.

    Attributes:
        logits: ``(V,)``, in float32.
        probabilities: ``(V,)``, at temperature 1.
        top: Ids of the most probable tokens, at most ``MAX_BARS``. Of equal logits the lower id comes first, as in
            greedy decoding.
        entropy: In nats.
    """

    logits: Tensor
    probabilities: Tensor
    top: Tensor
    entropy: float


@final
class NextTokenReader:
    """Reads sequences one after the other. The part at the start that equals the sequence before is not computed again.

    So a token that is added to a long text costs one decoding step.
    """

    def __init__(self, model: GPTModel) -> None:
        self._model = model
        self._ids: list[int] = []  # of the keys and values in the cache
        self._cache = KVCache.allocate(model.config, 1, 0)

    @torch.inference_mode()
    def read(self, ids: Sequence[int], lengths: Sequence[int]) -> list[NextToken]:
        """What follows the first L of ``ids``, for each L of ``lengths``, from the last ``context_length`` of these.

        Args:
            lengths: None is above ``context_length``, or there is only one: each longer text is cropped at another
                place, so they share no computation.

        Raises:
            ValueError: The logits are not finite.
        """
        context_length = self._model.config.context_length
        if max(lengths) > context_length:
            (length,) = lengths
            ids, lengths = ids[length - context_length : length], [context_length]
        first = min(lengths) - 1
        features = self._features(list(ids[: max(lengths)]), first)
        rows = torch.tensor(lengths, device=features.device) - 1 - first
        return _next_tokens(self._model, features[rows])

    def _features(self, ids: list[int], first: int) -> Tensor:
        """Features ``(T - first, C)`` of the tokens from ``first`` to the last of T ``ids``."""
        weight = self._model.tok_emb.weight
        same = 0
        while same < min(first, len(self._ids)) and ids[same] == self._ids[same]:
            same += 1
        if len(ids) > self._cache.max_length:
            same = 0
            length = len(ids) + _SPARE_POSITIONS
            self._cache = KVCache.allocate(
                self._model.config, 1, length, weight.device, weight.dtype
            )
        self._ids, self._cache.length = ids[:same], same
        features = self._model.features(
            torch.tensor([ids[same:]], device=weight.device), self._cache
        )
        self._ids = ids
        return features[0, first - same :]


def _next_tokens(model: GPTModel, features: Tensor) -> list[NextToken]:
    """One result per row of features ``(R, C)``."""
    logits = model.head(features).float().cpu()
    check_finite(logits.amax(dim=-1))
    p = probabilities(logits, SamplingParams(temperature=1.0))
    top = logits.sort(dim=-1, descending=True, stable=True).indices[:, :MAX_BARS]
    rows = zip(logits, p, top, entropy(p).tolist(), strict=True)
    # copies: a cached row does not keep the others in memory
    return [NextToken(row.clone(), p.clone(), top.clone(), nats) for row, p, top, nats in rows]


@torch.inference_mode()
def distribution_json(
    next_token: NextToken,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    sampling: SamplingParams,
    *,
    draws: int = 0,
    seed: int = 123,
    bars: int = 40,
) -> Json:
    """The distribution under ``sampling`` as the page shows it.

    Args:
        ids: The tokens before, for the repetition penalty.
        draws: Number of tokens to draw from the distribution.
        bars: Number of tokens with a bar, at most ``MAX_BARS``: those that the model finds most probable.
    """
    p = _after(next_token, ids, sampling)
    counts = draw_counts(p, draws, seed)
    shown = next_token.top[:bars]
    nats = float(entropy(p))
    columns = (
        shown.tolist(),
        next_token.logits[shown].tolist(),
        next_token.probabilities[shown].tolist(),
        p[shown].tolist(),
        counts[shown].tolist(),
    )
    return {
        "bars": [
            {
                **token_json(tokenizer, token),
                "rank": rank,
                "logit": finite_or_none(logit),
                "model_probability": model_probability,
                "probability": probability,
                "drawn": drawn,
            }
            for rank, (token, logit, model_probability, probability, drawn) in enumerate(
                zip(*columns, strict=True), start=1
            )
        ],
        "rest": {
            "count": len(p) - len(shown),
            "model_probability": _rest(next_token.probabilities, shown),
            "probability": _rest(p, shown),
            "drawn": draws - int(counts[shown].sum()),
        },
        "num_kept": int((p > 0).sum()),
        "entropy": nats,
        "effective_vocabulary": math.exp(nats),
        "model_entropy": next_token.entropy,
        "model_effective_vocabulary": math.exp(next_token.entropy),
        "draws": draws,
    }


def draw_counts(p: Tensor, draws: int, seed: int) -> Tensor:
    """How often each token ``(V,)`` occurs in ``draws`` samples from ``p`` ``(V,)``; the same seed, the same counts.

    All samples are drawn from the cumulative distribution in one call. The book's way needs V random numbers for
    each sample: seconds for 10,000 samples.
    """
    counts = torch.zeros(len(p), dtype=torch.int64)
    if draws:
        kept = p.nonzero().squeeze(1)
        drawn = torch.multinomial(
            p[kept].double(), draws, replacement=True, generator=make_generator(seed)
        )
        counts[kept] = drawn.bincount(minlength=len(kept))
    return counts


@torch.inference_mode()
def chosen_token_json(
    next_token: NextToken,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    token: int,
    sampling: SamplingParams | None,
) -> Json:
    """A token that was chosen after ``ids``: its rank and its probabilities at its place.

    Args:
        sampling: ``None``: the probability under the settings is not computed.
    """
    return {
        **token_json(tokenizer, token),
        "rank": int(token_ranks(next_token.logits[None], torch.tensor([[token]]))),
        "model_probability": float(next_token.probabilities[token]),
        "probability": None
        if sampling is None
        else float(_after(next_token, ids, sampling)[token]),
    }


def _after(next_token: NextToken, ids: Sequence[int], sampling: SamplingParams) -> Tensor:
    """Probabilities ``(V,)`` under ``sampling`` of what follows ``ids``."""
    previous = torch.tensor([ids]) if sampling.repetition_penalty != 1.0 else None
    return probabilities(next_token.logits[None], sampling, previous)[0]


def _rest(p: Tensor, shown: Tensor) -> float:
    """Probability of all tokens but those that are shown."""
    rest = p.double()
    rest[shown] = 0.0
    return float(rest.sum())
