"""Generation on text: prompts in, texts out, ended by stop strings, handed on while they grow."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, decode, decode_bytes, encode_prompt
from gpt_lightning.generation.engine import NO_TOKEN, stream_ids
from gpt_lightning.generation.sampling import SamplingParams
from gpt_lightning.model.gpt import GPTModel


@dataclass(frozen=True)
class GeneratedText:
    """One continuation. ``text`` begins with the prompt and ends before a stop string; so do the ids,
    but that the tokens which spelled the stop string are among them."""

    prompt: str
    text: str
    token_ids: list[int]


class IncrementalDetokenizer:
    """A row's new tokens as text, of which only what no stop string can take back is shown."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.text = ""
        self.is_over = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._shown = 0
        self._held_back = max((len(s) - 1 for s in stop), default=0)

    def add(self, token: int) -> None:
        if self.is_over:
            return
        searched = max(0, len(self.text) - self._held_back)
        self.text += self._decoder.decode(decode_bytes([token]))
        found = [at for s in self.stop if (at := self.text.find(s, searched)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_over = True

    def finish(self) -> None:
        if not self.is_over:
            self.text += self._decoder.decode(b"", final=True)
            self.is_over = True

    def take(self) -> str:
        """What can be shown by now and was not taken before."""
        end = len(self.text) if self.is_over else len(self.text) - self._held_back
        new = self.text[self._shown : max(self._shown, end)]
        self._shown += len(new)
        return new


def generate_texts(
    model: GPTModel,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    num_samples: int = 1,
    eos_id: int | None = END_OF_TEXT_ID,
    stop: Sequence[str] = (),
    special_tokens: bool = False,
    generator: torch.Generator | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[GeneratedText]:
    """Continue each prompt ``num_samples`` times; a prompt's samples stand in a row.

    Args:
        stop: Strings that end a text and are not part of it.
        special_tokens: Whether ``<|endoftext|>`` in a prompt is the token.
        on_text: Told (row, new text) while the texts grow.

    For the rest, and for errors, see :func:`stream_ids`.
    """
    if not all(stop):
        raise ValueError("stop: is empty; give at least one character")
    prompt_ids = [encode_prompt(prompt, special=special_tokens) for prompt in prompts]
    rows = [IncrementalDetokenizer(stop) for _ in range(len(prompts) * num_samples)]
    new_ids: list[list[int]] = [[] for _ in rows]

    def tell(row: int) -> None:
        if on_text is not None and (text := rows[row].take()):
            on_text(row, text)

    steps = stream_ids(
        model,
        prompt_ids,
        max_new_tokens,
        sampling,
        num_samples=num_samples,
        eos_id=eos_id,
        is_over=(lambda row, ids: rows[row].is_over) if stop else None,
        generator=generator,
    )
    for next_ids in steps:
        for row, token in enumerate(next_ids.tolist()):
            if token != NO_TOKEN:
                new_ids[row].append(token)
                rows[row].add(token)
                tell(row)
    for row, text in enumerate(rows):
        text.finish()
        tell(row)
    return [
        GeneratedText(
            prompts[row // num_samples],
            decode(prompt_ids[row // num_samples]) + text.text,
            prompt_ids[row // num_samples] + new_ids[row],
        )
        for row, text in enumerate(rows)
    ]
