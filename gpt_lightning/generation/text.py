"""Text generation from text prompts, with stop strings and streaming."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.generation.engine import NO_TOKEN, stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.generation.speculation import stream_speculative
from gpt_lightning.model.gpt import GPTModel

Speculation = Literal["ngram"]


@dataclass(frozen=True)
class GeneratedText:
    """One continuation of a prompt.

    Attributes:
        text: The prompt and its continuation, which ends before the stop string.
        token_ids: Ids of the prompt and of all generated tokens, those of the stop string included.
    """

    prompt: str
    text: str
    token_ids: list[int]


class IncrementalDetokenizer:
    """Decoder of one row's tokens to text while they are generated, up to the first stop string.

    Text that may still turn out to be the beginning of a stop string is not yet shown.
    """

    def __init__(self, stop: Sequence[str], tokenizer: Tokenizer = GPT2) -> None:
        self.stop = stop
        self.tokenizer = tokenizer
        self.text = ""
        self.is_over = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_shown = 0
        # number of last characters that may belong to a stop string whose end is not yet generated
        self._num_withheld = max((len(s) - 1 for s in stop), default=0)

    def add(self, token: int) -> None:
        if self.is_over:
            return
        search_start = max(0, len(self.text) - self._num_withheld)
        self.text += self._decoder.decode(self.tokenizer.decode_bytes([token]))
        matches = [i for s in self.stop if (i := self.text.find(s, search_start)) >= 0]
        if matches:
            self.text = self.text[: min(matches)]
            self.is_over = True

    def finish(self) -> None:
        """End the text: an incomplete character at the end becomes U+FFFD."""
        if not self.is_over:
            self.text += self._decoder.decode(b"", final=True)
            self.is_over = True

    def pop_text(self) -> str:
        """New text that can be shown now and was not returned before."""
        end = len(self.text) if self.is_over else len(self.text) - self._num_withheld
        new_text = self.text[self._num_shown : max(self._num_shown, end)]
        self._num_shown += len(new_text)
        return new_text


def generate_texts(
    model: GPTModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    num_samples: int = 1,
    tokenizer: Tokenizer = GPT2,
    eos_id: int | None = GPT2.end_of_text_id,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    generator: torch.Generator | None = None,
    on_text: Callable[[int, str], None] | None = None,
    speculate: Speculation | None = None,
) -> list[GeneratedText]:
    """Continue each prompt ``num_samples`` times. The samples of a prompt are adjacent in the result.

    Args:
        stop: Strings that end a text; they are not part of it.
        special_tokens: Whether special tokens in a prompt, such as ``<|endoftext|>``, are read as tokens.
        on_text: Called with (row, new text) while the texts are generated.
        speculate: ``"ngram"``: guess tokens where the text repeats itself, see
            :mod:`gpt_lightning.generation.speculation`; for one text.

    For the other arguments and for errors see :func:`stream_ids`.
    """
    if not all(stop):
        raise ValueError("stop: is empty; give at least one character")
    prompt_ids = [tokenizer.encode_prompt(prompt, special=special_tokens) for prompt in prompts]
    rows = [IncrementalDetokenizer(stop, tokenizer) for _ in range(len(prompts) * num_samples)]
    new_ids: list[list[int]] = [[] for _ in rows]

    def emit(row: int) -> None:
        if on_text is not None and (text := rows[row].pop_text()):
            on_text(row, text)

    is_over = (lambda row, ids: rows[row].is_over) if stop else None
    if speculate is None:
        steps = stream_ids(
            model,
            prompt_ids,
            max_new_tokens,
            sampling,
            num_samples=num_samples,
            eos_id=eos_id,
            is_over=is_over,
            generator=generator,
        )
    elif len(rows) == 1:
        steps = stream_speculative(
            model,
            prompt_ids[0],
            max_new_tokens,
            sampling,
            eos_id=eos_id,
            is_over=is_over,
            generator=generator,
        )
    else:
        raise ValueError(
            f"speculate: works for one text, not for {len(rows)}; give one prompt and one sample"
        )
    for next_ids in steps:
        for row, token in enumerate(next_ids.tolist()):
            if token != NO_TOKEN:
                new_ids[row].append(token)
                rows[row].add(token)
                emit(row)
    for row, text in enumerate(rows):
        text.finish()
        emit(row)
    return [
        GeneratedText(
            prompts[row // num_samples],
            tokenizer.decode(prompt_ids[row // num_samples]) + text.text,
            prompt_ids[row // num_samples] + new_ids[row],
        )
        for row, text in enumerate(rows)
    ]
