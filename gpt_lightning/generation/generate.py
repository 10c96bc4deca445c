"""A model and prompts to more tokens: prefill, then one token at a time over the KV cache."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import Sampling, sample
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache

NO_TOKEN = -1


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
    returned, as in the book. For the settings see :class:`Sampling`, for the rest
    :func:`stream_ids`, which also takes prompts of different lengths.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
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
    sampling: Sampling,
    *,
    num_samples: int = 1,
    eos_id: int | None = None,
    is_over: Callable[[int, list[int]], bool] | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yield each step's new ids ``(R,)``, R = prompts × ``num_samples``, a prompt's samples in a row.

    Prompts may differ in length: shorter ones are padded at the left, which changes nothing. What a row
    has more than ``context_length`` is cropped from the left, as in the book; learned positions cannot
    slide, so from there on the last window is read anew for each token. Dropout is off meanwhile, and
    the model is left in the mode it was in.

    Args:
        eos_id: The token that ends its row; it is not yielded.
        is_over: Asked after each token, with the row's number and its new ids, whether the row ends.
        generator: Random numbers of the model's device; without one a fresh seed is taken. torch's global
            generator is untouched either way.

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
    if max(map(max, prompts)) >= vocab_size:
        raise ValueError(
            f"prompt: its tokens do not fit the model's vocabulary of {vocab_size}; "
            "give other text or another model"
        )
    return _stream(
        model, prompts, max_new_tokens, sampling, num_samples, eos_id, is_over, generator
    )


@torch.inference_mode()
def _stream(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    num_samples: int,
    eos_id: int | None,
    is_over: Callable[[int, list[int]], bool] | None,
    generator: torch.Generator | None,
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
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) : width] = torch.tensor(prompt, device=device)
    padding = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    written: list[list[int]] = [[] for _ in range(len(prompts) * num_samples)]
    ended = torch.zeros(len(written), dtype=torch.bool, device=device)

    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            if step == 0:  # prefill: each prompt once, however many samples
                window, hidden = _window(ids[:, :width], padding, context_length)
                cache = KVCache.allocate(
                    model.config,
                    len(prompts),
                    window.shape[1] + max_new_tokens,
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
            elif cache.length < context_length:
                last = ids[:, width - 1 : width].clamp(min=0)
                logits = model.head(model.features(last, cache, hidden)[:, -1])
            else:
                window, window_padding = _window(ids[:, :width], padding, context_length)
                logits = model.head(model.features(window, padding=window_padding)[:, -1])

            try:
                next_ids = sample(logits, sampling, ids=ids[:, :width], generator=generator)
            except ValueError as error:
                raise ValueError(f"{error} (new token {step})") from error
            if eos_id is not None:
                ended |= next_ids == eos_id
            next_ids = next_ids.masked_fill(ended, NO_TOKEN)
            if ended.all():
                return
            ids[:, width] = next_ids
            width += 1
            yield next_ids
            if is_over is not None:
                for row, token in enumerate(next_ids.tolist()):
                    if token != NO_TOKEN:
                        written[row].append(token)
                        ended[row] = is_over(row, written[row])
                if ended.all():
                    return
    finally:
        model.train(was_training)


def _window(ids: Tensor, padding: Tensor, length: int) -> tuple[Tensor, Tensor | None]:
    """The last ``length`` columns of padded ids ``(B, T)``, and how many of each row's are padding."""
    hidden = (padding - max(0, ids.shape[1] - length)).clamp(min=0)
    return ids[:, -length:].clamp(min=0), hidden if bool(hidden.any()) else None


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
