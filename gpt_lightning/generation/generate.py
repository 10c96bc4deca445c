"""A model and a prompt to more tokens: prefill, then one token at a time over the KV cache."""

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import sample
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.model.kv_cache import KVCache


def check_settings(
    max_new_tokens: int, temperature: float, top_k: int | None, vocab_size: int
) -> None:
    """Raises ``ValueError`` naming the first setting that no generation can have."""
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: {max_new_tokens} is negative; give 0 or more")
    if not temperature >= 0.0 or temperature == float("inf"):
        raise ValueError(f"temperature: {temperature} is no temperature; give 0 (greedy) or more")
    if top_k is not None and not 1 <= top_k <= vocab_size:
        raise ValueError(
            f"top_k: {top_k} is outside the vocabulary; give 1 to {vocab_size}, or leave it out"
        )


@torch.inference_mode()
def generate(
    model: GPTModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    eos_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continue prompts of equal length: ids ``(B, T)`` → ``(B, T + n)``, n at most ``max_new_tokens``.

    Dropout is off meanwhile, and the model is left in the mode it was in. What the model cannot read
    any more, past ``context_length``, is cropped from the left, as in the book.

    Args:
        temperature: 0 decodes greedily and draws no random number.
        top_k: How many of the likeliest tokens can be drawn; none: all.
        eos_id: The token that ends a row. Generation stops when it ended every row; a row that ended
            before the others is filled up with it. It is not returned where all rows end at once.
        generator: Random numbers of the model's device; without one a fresh seed is taken, so that
            torch's global generator is untouched.

    Raises:
        ValueError: A setting or the prompt is not usable.
    """
    check_settings(max_new_tokens, temperature, top_k, model.config.vocab_size)
    if idx.dim() != 2 or idx.shape[1] < 1:
        raise ValueError(f"prompt: shape {tuple(idx.shape)} holds no token; give at least one")
    if generator is None:
        generator = torch.Generator(device=idx.device)
        generator.seed()

    context_length = model.config.context_length
    weight = model.tok_emb.weight
    ended = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    was_training = model.training
    model.eval()
    try:
        prompt_length = min(idx.shape[1], context_length)
        cache = KVCache.allocate(
            model.config, len(idx), prompt_length + max_new_tokens, weight.device, weight.dtype
        )
        unread = idx[:, -context_length:]
        for _ in range(max_new_tokens):
            if cache.length + unread.shape[1] <= context_length:
                features = model.features(unread, cache)
            else:  # learned positions cannot slide: read the last window anew
                features = model.features(idx[:, -context_length:])
            logits = model.head(features[:, -1])
            next_ids = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
            if eos_id is not None:
                next_ids = torch.where(ended, eos_id, next_ids)
                ended |= next_ids == eos_id
                if ended.all():
                    break
            unread = next_ids[:, None]
            idx = torch.cat((idx, unread), dim=1)
    finally:
        model.train(was_training)
    return idx


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
