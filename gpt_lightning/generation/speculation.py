"""Prompt-lookup speculation: several tokens per forward pass where the text repeats itself.

The last tokens are looked up in the text so far. The tokens that followed them there are the draft: one forward pass
computes the logits after each of them. A token is then chosen at each position as without speculation. The first one
that differs from the draft ends the pass; the pass is valid up to it. So speculation never changes which
distribution a token is drawn from, nor how many random numbers are drawn. Source: Saxena 2023,
github.com/apoorvumang/prompt-lookup-decoding.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpt_lightning.generation.engine import check_request, stream_ids
from gpt_lightning.generation.sampling import SamplingParams, check_finite, sample_unchecked
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

NGRAM_LENGTHS = (4, 3, 2)  # tokens that are looked up, the longest first
MIN_DRAFT, MAX_DRAFT = 2, 15  # tokens; the length follows how many were right


class NgramDraft:
    """Guesses the next tokens of a text by its last n-grams. A draft that is right doubles the next one's length."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where an n-gram's last occurrence ends
        self._length = MIN_DRAFT
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append a token; n-grams that end before it can be found from now on."""
        for n in NGRAM_LENGTHS:
            if len(self.ids) >= n:
                self._after[tuple(self.ids[-n:])] = len(self.ids)
        self.ids.append(token)

    def draft(self, max_length: int) -> list[int]:
        """Return the tokens that followed the longest n-gram that ends the text; empty: it is new."""
        for n in NGRAM_LENGTHS:
            start = self._after.get(tuple(self.ids[-n:])) if len(self.ids) >= n else None
            if start is not None:
                found = self.ids[start : start + min(self._length, max_length)]
                # where the text repeats up to its end, the repetition goes on
                while found and len(found) < min(self._length, max_length):
                    found.append(found[len(found) - (len(self.ids) - start)])
                return found
        return []

    def was_right(self, accepted: int, drafted: int) -> None:
        """Adapt the length of the next draft."""
        if accepted == drafted:
            self._length = min(2 * self._length, MAX_DRAFT)
        else:
            self._length = min(max(accepted + 1, MIN_DRAFT), MAX_DRAFT)


def stream_speculative(
    model: GPTModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    eos_id: int | None = None,
    is_over: Callable[[int, list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield the ids of :func:`stream_ids` for one prompt, ``(1,)`` each, with prompt-lookup speculation.

    The ids are the same up to rounding: a pass over several tokens rounds differently than a pass over one, so where two
    tokens are nearly equally probable, the other one may be chosen. When the context is full, the rest is generated
    without speculation. For the arguments and errors see :func:`stream_ids`.
    """
    check_request(model, [prompt], max_new_tokens, sampling)
    return _stream(model, prompt, max_new_tokens, sampling, eos_id, is_over, generator)


@torch.inference_mode()
def _stream(
    model: GPTModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: SamplingParams,
    eos_id: int | None,
    is_over: Callable[[int, list[int]], bool] | None,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """The generator of :func:`stream_speculative`, after its checks."""
    weight, context_length = model.tok_emb.weight, model.config.context_length
    if generator is None:
        generator = torch.Generator(device=weight.device)
        generator.seed()
    text = NgramDraft(prompt)
    new_ids: list[int] = []
    was_training = model.training
    model.eval()
    try:
        length = len(prompt) + max_new_tokens
        cache = KVCache.allocate(model.config, 1, length, weight.device, weight.dtype)
        unread = list(prompt)  # tokens that the cache does not hold
        while len(new_ids) < max_new_tokens and cache.length + len(unread) <= context_length:
            room = min(length, context_length) - cache.length - len(unread)
            draft = text.draft(room - 1) if new_ids else []
            window = torch.tensor([unread + draft], device=weight.device)
            features = model.features(window, cache)[0, len(unread) - 1 :]
            logits = model.head(features)  # (1 + length of the draft, V)
            check_finite(logits.amax(dim=-1))
            accepted = 0
            for i, guess in enumerate([*draft, None]):
                token = _sample(logits[i : i + 1], sampling, text.ids, generator)
                if token == eos_id:
                    return
                text.add(token)
                new_ids.append(token)
                yield torch.tensor([token])
                if is_over is not None and is_over(0, new_ids):
                    return
                if token != guess:
                    break
                accepted += 1
            if draft:
                text.was_right(accepted, len(draft))
            cache.length -= len(draft) - accepted  # the next pass overwrites the wrong ones
            unread = [token]
        if len(new_ids) < max_new_tokens:
            yield from stream_ids(
                model,
                [text.ids],
                max_new_tokens - len(new_ids),
                sampling,
                eos_id=eos_id,
                is_over=None if is_over is None else lambda row, ids: is_over(row, new_ids + ids),
                generator=generator,
            )
    finally:
        model.train(was_training)


def _sample(
    logits: Tensor, sampling: SamplingParams, text: list[int], generator: torch.Generator
) -> int:
    has_penalty = sampling.repetition_penalty != 1.0
    ids = torch.tensor([text], device=logits.device) if has_penalty else None
    return int(sample_unchecked(logits, sampling, ids=ids, generator=generator))
