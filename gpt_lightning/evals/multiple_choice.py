"""Multiple choice, such as HellaSwag: the ending that a model finds most probable is its answer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.likelihood import Likelihood, Request, encode_request
from gpt_lightning.evals.task_files import ChoiceExample


@dataclass(frozen=True)
class ChoiceResult:
    """Result of a multiple-choice task.

    Attributes:
        acc: Share of examples whose right ending has the highest log-likelihood.
        acc_norm: The same with each log-likelihood divided by the characters of the ending.
    """

    examples: int
    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None


def choice_requests(tokenizer: Tokenizer, examples: Sequence[ChoiceExample]) -> list[Request]:
    """Token ids of the examples. A blank joins context and ending."""
    return [
        encode_request(tokenizer, e.context, [f" {ending}" for ending in e.endings])
        for e in examples
    ]


def choice_result(
    examples: Sequence[ChoiceExample], answers: Sequence[Sequence[Likelihood]]
) -> ChoiceResult:
    """Result of the log-likelihoods of all endings."""
    right: list[bool] = []
    right_norm: list[bool] = []
    for example, answer in zip(examples, answers, strict=True):
        plain, normalized = chosen_endings(example, [each.logprob for each in answer])
        right.append(plain == example.label)
        right_norm.append(normalized == example.label)
    return ChoiceResult(
        examples=len(examples),
        acc=sum(right) / len(right),
        acc_stderr=standard_error(right),
        acc_norm=sum(right_norm) / len(right),
        acc_norm_stderr=standard_error(right_norm),
    )


def chosen_endings(example: ChoiceExample, logprobs: Sequence[float]) -> tuple[int, int]:
    """The ending with the highest log-likelihood, and that with the highest per character. Of equal ones the first."""
    per_character = [
        logprob / len(ending) for logprob, ending in zip(logprobs, example.endings, strict=True)
    ]
    indices = range(len(logprobs))
    return max(indices, key=logprobs.__getitem__), max(indices, key=per_character.__getitem__)


def standard_error(right: Sequence[bool]) -> float | None:
    """Standard error of the share of right answers; ``None`` for a single answer."""
    n, share = len(right), sum(right) / len(right)
    return math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else None
