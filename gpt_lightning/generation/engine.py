"""A model and prompts to more tokens: prefill, then one token at a time over the KV cache."""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from gpt_lightning.generation.cuda_graph import (
    GraphedDecodeStep,
    cuda_graph_unsupported_reason,
    fused_decode_unsupported_reason,
    padded_length,
)
from gpt_lightning.generation.sampling import SamplingParams, check_finite, choose
from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

DecodeBackend = Literal["eager", "cuda_graph", "fused"]
NO_TOKEN = -1
FUSED_MIN_NEW_TOKENS = 128  # new tokens
CHECK_EVERY = 64  # steps on a GPU between two looks at whether the logits were numbers


@torch.inference_mode()
def generate(
    model: GPTModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts of equal length: ids ``(B, T)`` → ``(B, T + n)``, n at most ``max_new_tokens``.

    A row that ended before the others is filled up with ``eos_id``; where all end at once it is not
    returned, as in the book. For the settings see :class:`SamplingParams`, for the rest
    :func:`stream_ids`, which also takes prompts of different lengths.
    """
    sampling = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty)
    steps = stream_ids(
        model, idx.tolist(), max_new_tokens, sampling, eos_id=eos_id, generator=generator
    )
    for next_ids in steps:
        filled = next_ids if eos_id is None else next_ids.masked_fill(next_ids < 0, eos_id)
        idx = torch.cat((idx, filled[:, None].to(idx.device)), dim=1)
    return idx


def stream_ids(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    *,
    num_samples: int = 1,
    eos_id: int | None = None,
    is_over: Callable[[int, list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
    backend: DecodeBackend | None = None,
) -> Iterator[Tensor]:
    """Yield each step's new ids ``(R,)``, R = prompts × ``num_samples``, a prompt's samples in a row; on the host where
    rows can end, for there they have been waited for.

    Prompts may differ in length: shorter ones are padded at the left, which changes nothing. What a row
    has more than ``context_length`` is cropped from the left, as in the book; learned positions cannot
    slide, so from there on the last window is read anew for each token. Dropout is off meanwhile, and
    the model is left in the mode it was in.

    Args:
        eos_id: The token that ends its row; it is not yielded.
        is_over: Asked after each token, with the row's number and its new ids, whether the row ends.
        generator: Random numbers of the model's device; without one a fresh seed is taken. torch's global
            generator is untouched either way.
        backend: How one token goes through the model: 'eager', as a 'cuda_graph', or as a graph of our own kernels, 'fused'
            (see :mod:`gpt_lightning.generation.cuda_graph`). By default what is fastest, which on a CPU is eager.
            Each rounds in its own way, so in 16 bits a choice between nearly equal tokens can fall otherwise.

    A row that has ended yields -1; when all have, the iterator ends.

    Raises:
        ValueError: A setting or a prompt is not usable.
    """
    vocab_size = model.config.vocab_size
    sampling.check_vocabulary(vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is negative; give 0 or more")
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is too small; give 1 or more")
    if not prompts or not all(prompts):
        raise ValueError("prompt: is empty; give at least one token")
    if max(map(max, prompts)) >= vocab_size or min(map(min, prompts)) < 0:
        raise ValueError(
            f"prompt: its tokens do not fit the model's vocabulary of {vocab_size}; "
            "give other text or another model"
        )
    return _stream(
        model,
        prompts,
        max_new_tokens,
        sampling,
        num_samples,
        eos_id,
        is_over,
        generator,
        backend
        or fastest_backend(
            model, len(prompts) * num_samples, max(map(len, prompts)), max_new_tokens
        ),
    )


def fastest_backend(model: GPTModel, rows: int, length: int, max_new_tokens: int) -> DecodeBackend:
    """Our own kernels where they can be and there are tokens enough to pay for loading them, before the context of
    which ``length`` are the prompt's is full."""
    if cuda_graph_unsupported_reason(model):
        return "eager"
    steps = min(max_new_tokens, model.config.context_length - length)
    if steps < FUSED_MIN_NEW_TOKENS or fused_decode_unsupported_reason(model, rows):
        return "cuda_graph"
    return "fused"


@torch.inference_mode()
def _stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingParams,
    num_samples: int,
    eos_id: int | None,
    is_over: Callable[[int, list[int]], bool] | None,
    generator: torch.Generator | None,
    backend: DecodeBackend,
) -> Iterator[Tensor]:
    weight, context_length = model.tok_emb.weight, model.config.context_length
    device = weight.device
    if generator is None:
        generator = torch.Generator(device=device)
        generator.seed()

    width = max(map(len, prompts))
    try:
        ids = torch.full((len(prompts), width + max_new_tokens), NO_TOKEN, device=device)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(
            f"max_new_tokens: {max_new_tokens} are more than memory holds; give fewer"
        ) from error
    shortest = min(map(len, prompts))
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    ids[:, :width] = torch.tensor(
        [[NO_TOKEN] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device
    )
    written: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
    ended = torch.zeros(len(written), dtype=torch.bool, device=device)
    one_token: GraphedDecodeStep | None = None
    takes_likeliest = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0
    unwritten: list[Tensor] = []  # the last tokens, which ``ids`` lacks
    may_end = eos_id is not None or is_over is not None
    finite = _Finite(every=1 if device.type == "cpu" else CHECK_EVERY)

    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            largest = likeliest = None
            if step == 0:  # prefill: each prompt once, however many samples
                window, hidden = _window(ids[:, :width], padding, shortest, context_length)
                length = window.shape[1] + max_new_tokens
                cache = KVCache.allocate(
                    model.config,
                    len(prompts),
                    length if backend == "eager" else padded_length(length),
                    device,
                    weight.dtype,
                )
                logits = model.head(model.features(window, cache, hidden)[:, -1])
                logits = logits.repeat_interleave(num_samples, dim=0)
                ids = ids.repeat_interleave(num_samples, dim=0)
                padding = padding.repeat_interleave(num_samples)
                if num_samples > 1:
                    cache = cache.repeat(num_samples)
                    hidden = None if hidden is None else hidden.repeat_interleave(num_samples)
                if backend != "eager":
                    one_token = GraphedDecodeStep(model, cache, hidden, fused=backend == "fused")
            elif cache.length < context_length:
                last = ids[:, width - 1]
                if one_token is not None:
                    logits = one_token(None if unwritten else last)  # it knows them
                    largest, likeliest = one_token.largest, one_token.likeliest
                else:
                    last = last.clamp(min=0)[:, None]
                    logits = model.head(model.features(last, cache, hidden)[:, -1])
            else:
                if unwritten:
                    ids[:, width - len(unwritten) : width] = torch.stack(unwritten, dim=1)
                    unwritten.clear()
                window, hidden = _window(ids[:, :width], padding, shortest + step, context_length)
                logits = model.head(model.features(window, padding=hidden)[:, -1])

            finite.add(logits.amax(dim=-1) if largest is None else largest, step)
            if likeliest is not None and takes_likeliest:
                next_ids = likeliest
            else:
                next_ids = choose(logits, sampling, ids=ids[:, :width], generator=generator)
            tokens: list[int] = []
            if eos_id is not None:
                ended |= next_ids == eos_id
            if may_end:
                next_ids = next_ids.masked_fill(ended, NO_TOKEN)
                tokens = next_ids.tolist()  # here the host waits for a GPU, once a token
                if all(token == NO_TOKEN for token in tokens):
                    break
            if likeliest is not None and takes_likeliest and not may_end:
                unwritten.append(next_ids)  # a step reads its own
            else:
                ids[:, width] = next_ids
            width += 1
            yield torch.tensor(tokens) if may_end else next_ids
            if is_over is not None:
                for row, token in enumerate(tokens):
                    if token != NO_TOKEN:
                        written[row].append(token)
                        if is_over(row, written[row]):
                            ended[row] = True
                            tokens[row] = NO_TOKEN
                if all(token == NO_TOKEN for token in tokens):
                    break
        finite.check()
    finally:
        if one_token is not None:
            one_token.close()
        model.train(was_training)


class _Finite:
    """Refuses logits that are no numbers: after each step, or looked at ``every`` so many steps at once, when those
    after them are under backend, so that a GPU does not wait for the host."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._first = 0
        self._largest: list[Tensor] = []
        self._asked: tuple[int, list[Tensor], AsyncHostCopy] | None = None

    def add(self, largest: Tensor, step: int) -> None:
        """Of each row's logits."""
        self._largest.append(largest)
        if step == 0 or self._every == 1:
            self.check()
        elif len(self._largest) == self._every:
            self._look()
            self._ask()

    def check(self) -> None:
        """Raises ``ValueError`` with the number of the first step whose logits are refused."""
        self._look()
        if self._largest:
            self._ask()
            self._look()

    def _ask(self) -> None:
        finite = torch.isfinite(torch.stack(self._largest)).all()
        self._asked = self._first, self._largest, AsyncHostCopy(finite)
        self._first += len(self._largest)
        self._largest = []

    def _look(self) -> None:
        asked, self._asked = self._asked, None
        if asked is None or asked[2].read():
            return
        for step, largest in enumerate(asked[1], asked[0]):
            try:
                check_finite(largest)
            except ValueError as error:
                raise ValueError(f"{error} (new token {step})") from error


def _window(
    ids: Tensor, padding: Tensor, shortest: int, length: int
) -> tuple[Tensor, Tensor | None]:
    """The last ``length`` columns of padded ids ``(B, T)``, and how many of each row's are padding.

    Args:
        shortest: Tokens of the shortest row, which the host knows without asking a GPU.
    """
    window = ids[:, -length:].clamp(min=0)
    if shortest >= window.shape[1]:
        return window, None
    return window, (padding - max(0, ids.shape[1] - length)).clamp(min=0)


@torch.inference_mode()
def generate_simple(
    model: GPTModel, idx: Tensor, max_new_tokens: int, context_size: int | None = None
) -> Tensor:
    """The plain greedy loop that :func:`generate` is held against: no cache, one whole pass a token.

    Ids ``(B, T)`` → ``(B, T + max_new_tokens)``. Dropout is as the model has it: call ``eval()`` before.
    """
    context_size = context_size or model.config.context_length
    for _ in range(max_new_tokens):
        logits = model(idx[:, -context_size:])[:, -1]
        idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
    return idx
