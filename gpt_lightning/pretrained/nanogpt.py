"""nanoGPT's ``ckpt.pt``. Its GELU is the exact one, ours GPT-2's tanh form: logits differ by about 1e-3."""

from dataclasses import replace
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.name_map import HEAD, gpt2_names, names_in_file, spelled
from gpt_lightning.pretrained.weights import ModelWeights, same_values

_PADDED_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64
_META = "meta.pkl"  # a tokenizer of the data's own, a pickle that is never opened


def is_nanogpt(content: Any) -> bool:
    return isinstance(content, dict) and "model_args" in content and "model" in content


def read_nanogpt(content: dict[str, Any], path: Path) -> ModelWeights:
    """The rows that pad the vocabulary are left out; where it has no biases, they are zeros.

    Raises:
        ValueError: The file lacks a tensor, or its settings are none of a model.
    """
    settings, theirs = content["model_args"], content["model"]
    if not isinstance(settings, dict) or not isinstance(theirs, dict):
        raise ValueError(f"{path}: its model_args and model are no dicts; give another")
    names = names_in_file(theirs, path)
    theirs = {plain: theirs[name] for plain, name in names.items()}
    # without the setting the tensors tell: before it was introduced, there were always biases
    has_bias = bool(settings.get("bias", "ln_f.bias" in theirs))
    try:
        vocab_size = settings["vocab_size"]
        config = GPTConfig(
            vocab_size=VOCAB_SIZE if vocab_size == _PADDED_VOCAB_SIZE else vocab_size,
            context_length=settings["block_size"],
            emb_dim=settings["n_embd"],
            n_heads=settings["n_head"],
            n_layers=settings["n_layer"],
            drop_rate=settings.get("dropout", 0.0),
            qkv_bias=has_bias,
            tied_embeddings=True,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its model_args are no GPT's ({error})") from error
    state_dict: dict[str, Tensor] = {}
    for name in gpt2_names(config.n_layers):
        if isinstance(tensor := theirs.pop(spelled(name), None), Tensor):
            state_dict[name.ours] = tensor
        elif has_bias or name.part != "bias":
            raise ValueError(
                f"{path}: has no transformer.{spelled(name)}, which its model_args call for"
            )
        elif not name.ours.endswith("qkv.bias"):
            weight = state_dict[name.ours.removesuffix("bias") + "weight"]
            state_dict[name.ours] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    head = theirs.pop(HEAD, None)
    for key in theirs:
        if not key.endswith(".attn.bias"):  # a causal mask
            raise ValueError(f"{path}: has {names[key]}, which no GPT of its model_args has")
    warnings: tuple[str, ...] = ()
    if head is not None and not same_values(head, state_dict["tok_emb.weight"]):
        config = replace(config, tied_embeddings=False)
        warnings = (
            f"{path}: {names[HEAD]} has other weights than the token embedding; they are kept",
        )
        state_dict["out_head.weight"] = head[: config.vocab_size]
    state_dict["tok_emb.weight"] = state_dict["tok_emb.weight"][: config.vocab_size]
    other_tokenizer = _other_tokenizer(config, path)
    return ModelWeights(config, state_dict, warnings=warnings, other_tokenizer=other_tokenizer)


def _other_tokenizer(config: GPTConfig, path: Path) -> str | None:
    """nanoGPT's data has GPT-2's tokenizer, or one of its own, of any size, in ``meta.pkl``."""
    if lexists(path.parent / _META):
        return f"{path.parent / _META} belongs to another tokenizer"
    if config.vocab_size != VOCAB_SIZE:
        return f"its vocabulary has {config.vocab_size} tokens"
    return None
