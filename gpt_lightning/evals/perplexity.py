"""Perplexity of pages of text, such as WikiText's, per word and per byte.

The windows are those of lm-evaluation-harness: each token is predicted once, and the first one after ``<|endoftext|>``.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.evals.likelihood import Likelihood, Request, perplexity
from gpt_lightning.evals.task_files import detokenize_wikitext


@dataclass(frozen=True)
class PerplexityResult:
    """Result of WikiText. Words and bytes are those of the file, and not of the detokenized text.

    Attributes:
        examples: Number of pages.
    """

    examples: int
    word_perplexity: float
    byte_perplexity: float
    bits_per_byte: float
    words: int
    bytes: int


def page_windows(
    ids: Sequence[int], prefix: int, context_length: int, stride: int
) -> Iterator[Request]:
    """Windows that predict each token of a page once.

    The first window predicts ``context_length`` tokens, each further one ``stride`` tokens. The last window reaches back
    to be full.

    Args:
        prefix: The token before the first one.
    """
    ids = [prefix, *ids]  # ids[i] is predicted from ids[:i]
    first, end = 1, min(len(ids), context_length + 1)
    while first < len(ids):
        yield Request(ids[max(0, end - 1 - context_length) : first], [ids[first:end]])
        first, end = end, min(len(ids), end + stride)


def page_requests(
    tokenizer: Tokenizer, pages: Sequence[str], context_length: int, stride: int
) -> list[Request]:
    """The windows of all pages. Those of a ``stride`` of ``context_length`` do not overlap."""
    return [
        window
        for page in pages
        for window in page_windows(
            tokenizer.encode_prompt(detokenize_wikitext(page)),
            tokenizer.end_of_text_id,
            context_length,
            stride,
        )
    ]


def perplexity_result(
    pages: Sequence[str], answers: Sequence[Sequence[Likelihood]]
) -> PerplexityResult:
    """Result of the log-likelihoods of all windows."""
    loss = -math.fsum(answer.logprob for (answer,) in answers)
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    num_bytes = sum(len(page.encode()) for page in pages)
    return PerplexityResult(
        examples=len(pages),
        word_perplexity=perplexity(loss / words),
        byte_perplexity=perplexity(loss / num_bytes),
        bits_per_byte=loss / num_bytes / math.log(2),
        words=words,
        bytes=num_bytes,
    )
