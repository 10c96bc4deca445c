"""LAMBADA: whether a model knows the last word of a text, which only the whole text determines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.likelihood import Likelihood, Request, encode_request, perplexity
from gpt_lightning.evals.multiple_choice import standard_error
from gpt_lightning.evals.task_files import LastWordExample


@dataclass(frozen=True)
class LastWordResult:
    """Result of LAMBADA.

    Attributes:
        acc: Share of examples whose last word is that of greedy decoding.
        perplexity: Of the last words: exp of the mean negative log-likelihood of a word.
    """

    examples: int
    acc: float
    acc_stderr: float | None
    perplexity: float


def last_word_requests(tokenizer: Tokenizer, examples: Sequence[LastWordExample]) -> list[Request]:
    """Token ids of the examples. A blank joins context and word."""
    return [encode_request(tokenizer, e.context, [f" {e.word}"]) for e in examples]


def last_word_result(answers: Sequence[Sequence[Likelihood]]) -> LastWordResult:
    """Result of the log-likelihoods of all last words."""
    right = [answer.is_greedy for (answer,) in answers]
    total = math.fsum(answer.logprob for (answer,) in answers)
    return LastWordResult(
        examples=len(right),
        acc=sum(right) / len(right),
        acc_stderr=standard_error(right),
        perplexity=perplexity(-total / len(right)),
    )
