"""Surprisal, rank and alternatives of each token of a text, and the loss of the text.

A text that is longer than the context is scored in overlapping windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.exploring.tokens import Json, finite_or_none, token_json
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.serving.token_scores import TokenScore, score_prompt

NUM_CANDIDATES = 5


@dataclass(frozen=True)
class ScoreWindow:
    """A part of a text that the model reads in one pass.

    Attributes:
        start: The first token that is read.
        first: The first token that is scored.
        end: The token after the last one that is scored.
    """

    start: int
    first: int
    end: int


def score_windows(num_tokens: int, context_length: int) -> list[ScoreWindow]:
    """Windows that score each token but the first once.

    Before a scored token, the model reads at least half a context, or all the text.
    """
    windows: list[ScoreWindow] = []
    start, first = 0, 1
    while first < num_tokens:
        end = min(num_tokens, start + context_length + 1)
        windows.append(ScoreWindow(start, first, end))
        start, first = start + max(1, context_length // 2), end
    return windows


@torch.inference_mode()
def score_window(model: GPTModel, ids: Sequence[int], window: ScoreWindow) -> list[TokenScore]:
    """Scores of the tokens ``window.first`` to ``window.end`` of ``ids``.

    Raises:
        ValueError: The logits are not finite.
    """
    idx = torch.tensor([ids[window.start : window.end - 1]], device=model.tok_emb.weight.device)
    features = model.features(idx)[0, window.first - window.end :]
    return score_prompt(model, features, ids[window.first - 1 : window.end], NUM_CANDIDATES)


def scores_json(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScore]) -> Json:
    """The scores of a text as the page shows them.

    Args:
        scores: Of all ids but the first: before it there is nothing to predict it from.
    """
    first = [
        {**token_json(tokenizer, token), "surprisal": None, "rank": None, "candidates": []}
        for token in ids[:1]
    ]
    total = math.fsum(score.surprisal for score in scores)
    loss = finite_or_none(total / len(scores)) if scores else None
    num_bytes = int(tokenizer.byte_lengths[list(ids[1:])].sum())
    return {
        "tokens": [*first, *(_score_json(tokenizer, score) for score in scores)],
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700.0)),
        "bits_per_byte": None if loss is None or not num_bytes else total / math.log(2) / num_bytes,
        "num_tokens": len(ids),
        "cropped": 0,
    }


def _score_json(tokenizer: Tokenizer, score: TokenScore) -> Json:
    candidates = []
    for token, logprob in score.top:
        probability = math.exp(logprob)
        candidates.append(
            {
                **token_json(tokenizer, token),
                "probability": probability,
                "model_probability": probability,
            }
        )
    return {
        **token_json(tokenizer, score.token),
        "surprisal": finite_or_none(score.surprisal),
        "rank": score.rank,
        "candidates": candidates,
    }
