"""New tokens for a model: in its tokenizer, its embedding and head, and its optimizer's moments.

V is the number of ids of the tokenizer, N the number of new tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.data.tokenizer_json import added_token, file_of, gpt2_content, tokenizer_from
from gpt_lightning.pretrained.weights import ModelWeights

InitAdded = Literal["mean", "normal"]

_VOCABULARY_MATRICES = ("tok_emb.weight", "out_head.weight")  # a tied model has the first
_SEED = 123


def add_tokens(
    weights: ModelWeights, tokens: Sequence[str], init: InitAdded = "mean"
) -> ModelWeights:
    """The same model with N more tokens; their ids follow the tokenizer's. The old rows stay as they are.

    Rows that pad the vocabulary are used first. The first moments of new rows are 0, their second moments are the
    mean of the old ones, so that the first steps are not larger than those of other tokens.

    Args:
        init: Rows of the new tokens: 'mean': the mean of the old rows; 'normal': drawn around it with the standard
            deviation of the old rows, in each dimension.

    Raises:
        ValueError: A token is empty, is there already, or splits no text.
        OSError: The package ``tokenizers`` is not installed.
    """
    tokenizer = weights.tokenizer
    for i, token in enumerate(tokens):
        if not token:
            raise ValueError("add_tokens: a token is empty; give at least one character")
        if token in tokens[:i]:
            raise ValueError(f"add_tokens: {token!r} is given twice; give it once")
        if token.encode() in tokenizer.token_bytes:
            token_id = tokenizer.token_bytes.index(token.encode())
            raise ValueError(
                f"add_tokens: {token!r} is in the vocabulary already (id {token_id}); leave it out"
            )
    extended = _extended(tokenizer, tokens)
    first = tokenizer.vocab_size
    for token_id, token in enumerate(tokens, first):
        if extended.encode_prompt(token) != [token_id]:
            raise ValueError(
                f"add_tokens: {token!r} splits no text: the tokenizer does not find it in a text; give another"
            )
    vocab_size = max(weights.config.vocab_size, extended.vocab_size)
    generator = torch.Generator().manual_seed(_SEED)
    state_dict = {
        name: _grown(tensor, first, extended.vocab_size, vocab_size, init, generator)
        if name in _VOCABULARY_MATRICES
        else tensor
        for name, tensor in weights.state_dict.items()
    }
    return replace(
        weights,
        config=replace(weights.config, vocab_size=vocab_size),
        state_dict=state_dict,
        optimizer_state=_grown_moments(
            weights.optimizer_state,
            weights.config.vocab_size,
            first,
            extended.vocab_size,
            vocab_size,
        ),
        tokenizer=extended,
    )


def _extended(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    content = gpt2_content() if tokenizer.file is None else json.loads(tokenizer.file)
    content["added_tokens"] = [
        *(content.get("added_tokens") or []),
        *(added_token(t, i, special=False) for i, t in enumerate(tokens, tokenizer.vocab_size)),
    ]
    try:
        return tokenizer_from(file_of(content), f"{tokenizer.name}+{len(tokens)}")
    except ValueError as error:  # such as half of a surrogate pair
        raise ValueError(
            f"add_tokens: with these tokens the tokenizer {error}; give others"
        ) from error


def _grown(
    matrix: Tensor, first: int, end: int, rows: int, init: InitAdded, generator: torch.Generator
) -> Tensor:
    """``matrix`` ``(V, C)`` with at least ``rows`` rows, of which those from ``first`` to ``end`` are new."""
    old = matrix[:first].float()
    mean = old.mean(dim=0)
    new = mean.expand(end - first, -1)
    if init == "normal":
        noise = torch.randn(new.shape, generator=generator)
        new = mean + old.std(dim=0, correction=0) * noise
    grown = torch.empty((rows, matrix.shape[1]), dtype=matrix.dtype)
    grown[: len(matrix)] = matrix
    grown[first:end] = new.to(matrix.dtype)
    return grown


def _grown_moments(
    saved: dict[str, Any] | None, old_rows: int, first: int, end: int, rows: int
) -> dict[str, Any] | None:
    """The optimizer's state with rows for the new tokens; Adafactor's mean over the rows ``(1, C)`` stays."""
    if saved is None:
        return None
    state = dict(saved["state"])
    for group in saved["param_groups"]:
        for index, name in zip(group["params"], group.get("param_names", ()), strict=False):
            if name.removeprefix("model.") in _VOCABULARY_MATRICES and index in state:
                state[index] = {
                    key: _grown_moment(key, value, first, end, rows)
                    if isinstance(value, Tensor) and value.dim() == 2 and len(value) == old_rows
                    else value
                    for key, value in state[index].items()
                }
    return {**saved, "state": state}


def _grown_moment(key: str, moment: Tensor, first: int, end: int, rows: int) -> Tensor:
    grown = torch.empty((rows, moment.shape[1]), dtype=moment.dtype)
    grown[: len(moment)] = moment
    is_mean_gradient = key in ("exp_avg", "momentum_buffer")
    grown[first:end] = 0.0 if is_mean_gradient else moment[:first].mean(dim=0)
    return grown
