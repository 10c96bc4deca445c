"""nanoGPT's ``ckpt.pt``. Its GELU is the exact one, ours GPT-2's tanh form: logits differ by about 1e-3."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.formats import Source
from gpt_lightning.pretrained.gpt2_names import gpt2_names

_COMPILED = "_orig_mod."
_PADDED_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64


def is_nanogpt(content: Any) -> bool:
    return isinstance(content, dict) and "model_args" in content and "model" in content


def read_nanogpt(content: dict[str, Any], path: Path) -> Source:
    """The rows that pad the vocabulary are left out; where it has no biases, they are zeros.

    Raises:
        ValueError: The file lacks a tensor, or its settings are none of a model.
    """
    settings, theirs = content["model_args"], content["model"]
    if not isinstance(settings, dict) or not isinstance(theirs, dict):
        raise ValueError(f"{path}: its model_args and model are no dicts; give another")
    theirs = {name.removeprefix(_COMPILED): tensor for name, tensor in theirs.items()}
    has_bias = bool(settings.get("bias", True))
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
        key = f"transformer.{name.module}.{'bias' if name.part == 'bias' else 'weight'}"
        if isinstance(tensor := theirs.get(key), Tensor):
            state_dict[name.ours] = tensor
        elif has_bias or name.part != "bias":
            raise ValueError(f"{path}: has no {key}, which its model_args call for")
        elif not name.ours.endswith("qkv.bias"):
            weight = theirs[f"transformer.{name.module}.weight"]
            state_dict[name.ours] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    known = {f"transformer.{n.module}.{part}" for n in gpt2_names(config.n_layers)
             for part in ("weight", "bias")}  # fmt: skip
    head = theirs.get("lm_head.weight")
    for key in theirs.keys() - known - {"lm_head.weight"}:
        if not key.endswith(".attn.bias"):  # a causal mask
            raise ValueError(f"{path}: has {key}, which no GPT of its model_args has")
    if head is not None and not torch.equal(head, state_dict["tok_emb.weight"]):
        config = replace(config, tied_embeddings=False)
        state_dict["out_head.weight"] = head[: config.vocab_size]
    state_dict["tok_emb.weight"] = state_dict["tok_emb.weight"][: config.vocab_size]
    return Source(config, state_dict)
