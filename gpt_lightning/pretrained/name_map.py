"""The names that OpenAI gave GPT-2's modules, which Hugging Face and nanoGPT kept, beside ours."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from gpt_lightning.pretrained.weights import plain_names

# what a tensor is, as the forms spell and lay out each kind in their own way
ParamKind = Literal["embedding", "gain", "matrix", "bias"]

_BLOCK: list[tuple[str, str, ParamKind]] = [
    ("norm1", "ln_1", "gain"),
    ("att.qkv", "attn.c_attn", "matrix"),
    ("att.out_proj", "attn.c_proj", "matrix"),
    ("norm2", "ln_2", "gain"),
    ("ff.layers.0", "mlp.c_fc", "matrix"),
    ("ff.layers.2", "mlp.c_proj", "matrix"),
]


class ParamMapping(NamedTuple):
    """One tensor: its name in our state dict, its module's name with them, and what it is."""

    ours: str
    module: str
    part: ParamKind


HEAD = "lm_head.weight"


def spelled(name: ParamMapping) -> str:
    """The tensor's name in Hugging Face's and nanoGPT's form, without ``transformer.``."""
    return f"{name.module}.{'bias' if name.part == 'bias' else 'weight'}"


def names_in_file(names: Iterable[str], path: Path) -> dict[str, str]:
    """Each tensor's name as :func:`spelled` and :data:`HEAD` have it → its name in a file.

    Raises:
        ValueError: Two names are of one tensor.
    """
    plain = plain_names(names, "wpe.weight", path)
    heads = [name for name in plain if f".{name}".endswith(f".{HEAD}")]
    if len(heads) > 1:
        raise ValueError(f"{path}: has both {heads[0]} and {heads[1]}; give a file with one")
    return {HEAD if name in heads else name: original for name, original in plain.items()}


def gpt2_names(n_layers: int) -> Iterator[ParamMapping]:
    """Every tensor of a GPT-2 with a tied head. Blocks are called ``h.0``, ``h.1``, …"""
    yield ParamMapping("tok_emb.weight", "wte", "embedding")
    yield ParamMapping("pos_emb.weight", "wpe", "embedding")
    for i in range(n_layers):
        for ours, theirs, part in _BLOCK:
            yield ParamMapping(f"trf_blocks.{i}.{ours}.weight", f"h.{i}.{theirs}", part)
            yield ParamMapping(f"trf_blocks.{i}.{ours}.bias", f"h.{i}.{theirs}", "bias")
    yield ParamMapping("final_norm.weight", "ln_f", "gain")
    yield ParamMapping("final_norm.bias", "ln_f", "bias")
