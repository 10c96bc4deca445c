"""Reader of nanoGPT's ``ckpt.pt``.

nanoGPT computes GELU exactly, our model uses GPT-2's tanh approximation: logits differ by about 1e-3.
"""

from dataclasses import replace
from os.path import lexists
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.name_map import HEAD, gpt2_params, hf_name, unwrap_hf_names
from gpt_lightning.pretrained.weights import ModelWeights, same_values

_PADDED_VOCAB_SIZE = 50304  # 50257 rounded up to a multiple of 64
_META = "meta.pkl"  # the data's own tokenizer, a pickle: it may hold code, so it is never opened


def is_nanogpt(content: Any) -> bool:
    """Whether the content of a ``torch.save`` file is nanoGPT's."""
    return isinstance(content, dict) and "model_args" in content and "model" in content


def read_nanogpt(content: dict[str, Any], path: Path) -> ModelWeights:
    """Read the weights without the rows that pad the vocabulary; missing biases become zeros.

    Raises:
        ValueError: The file lacks a tensor, or its settings are not those of a model.
    """
    settings, theirs = content["model_args"], content["model"]
    if not isinstance(settings, dict) or not isinstance(theirs, dict):
        raise ValueError(f"{path}: its model_args or model is not a dict; give another")
    names = unwrap_hf_names(theirs, path)
    theirs = {unwrapped: theirs[name] for unwrapped, name in names.items()}
    # old versions of nanoGPT do not have this setting
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
        raise ValueError(
            f"{path}: its model_args are not those of a GPT ({error}); give another"
        ) from error
    state_dict: dict[str, Tensor] = {}
    for param in gpt2_params(config.n_layers):
        if isinstance(tensor := theirs.pop(hf_name(param), None), Tensor):
            state_dict[param.ours] = tensor
        elif has_bias or param.kind != "bias":
            raise ValueError(
                f"{path}: has no transformer.{hf_name(param)}, which its model_args need; give an intact copy"
            )
        elif not param.ours.endswith("qkv.bias"):
            weight = state_dict[param.ours.removesuffix("bias") + "weight"]
            state_dict[param.ours] = torch.zeros(weight.shape[0], dtype=weight.dtype)
    head = theirs.pop(HEAD, None)
    for key in theirs:
        if not key.endswith(".attn.bias"):  # a causal mask
            raise ValueError(
                f"{path}: has {names[key]}, which a GPT of its model_args does not have; give another"
            )
    warnings: tuple[str, ...] = ()
    if head is not None and not same_values(head, state_dict["tok_emb.weight"]):
        config = replace(config, tied_embeddings=False)
        warnings = (
            f"{path}: {names[HEAD]} has other weights than the token embedding; keeping them",
        )
        state_dict["out_head.weight"] = head[: config.vocab_size]
    state_dict["tok_emb.weight"] = state_dict["tok_emb.weight"][: config.vocab_size]
    other_tokenizer = _other_tokenizer(config, path)
    return ModelWeights(config, state_dict, warnings=warnings, other_tokenizer=other_tokenizer)


def _other_tokenizer(config: GPTConfig, path: Path) -> str | None:
    """Why the tokenizer is not GPT-2's: nanoGPT's data has GPT-2's, or its own in ``meta.pkl``."""
    if lexists(path.parent / _META):
        return f"{path.parent / _META} belongs to another tokenizer"
    if config.vocab_size != VOCAB_SIZE:
        return f"its vocabulary has {config.vocab_size} tokens"
    return None
