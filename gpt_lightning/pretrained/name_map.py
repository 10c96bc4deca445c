"""GPT-2's tensor names: OpenAI's module names, which Hugging Face and nanoGPT kept, and ours."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from gpt_lightning.pretrained.weights import unwrap_names

# the kind of a tensor: the formats name and lay out each kind differently
ParamKind = Literal["embedding", "gain", "matrix", "bias"]

# our module, their module, the kind of its weight
_BLOCK: list[tuple[str, str, ParamKind]] = [
    ("norm1", "ln_1", "gain"),
    ("att.qkv", "attn.c_attn", "matrix"),
    ("att.out_proj", "attn.c_proj", "matrix"),
    ("norm2", "ln_2", "gain"),
    ("ff.layers.0", "mlp.c_fc", "matrix"),
    ("ff.layers.2", "mlp.c_proj", "matrix"),
]


class ParamMapping(NamedTuple):
    """One tensor: our name of it, their name of its module, and its kind."""

    ours: str
    module: str
    kind: ParamKind


HEAD = "lm_head.weight"


def hf_name(param: ParamMapping) -> str:
    """The tensor's name in Hugging Face's and nanoGPT's files, without ``transformer.``."""
    return f"{param.module}.{'bias' if param.kind == 'bias' else 'weight'}"


def unwrap_hf_names(names: Iterable[str], path: Path) -> dict[str, str]:
    """Map each tensor's :func:`hf_name`, or :data:`HEAD`, to its name in the file.

    Raises:
        ValueError: Two names stand for one tensor.
    """
    unwrapped = unwrap_names(names, "wpe.weight", path)
    heads = [name for name in unwrapped if f".{name}".endswith(f".{HEAD}")]
    if len(heads) > 1:
        raise ValueError(f"{path}: has both {heads[0]} and {heads[1]}; give a file with one")
    return {HEAD if name in heads else name: original for name, original in unwrapped.items()}


def gpt2_params(n_layers: int) -> Iterator[ParamMapping]:
    """All tensors of a GPT-2 with a tied head. Their blocks are named ``h.0``, ``h.1``, …"""
    yield ParamMapping("tok_emb.weight", "wte", "embedding")
    yield ParamMapping("pos_emb.weight", "wpe", "embedding")
    for i in range(n_layers):
        for ours, theirs, kind in _BLOCK:
            yield ParamMapping(f"trf_blocks.{i}.{ours}.weight", f"h.{i}.{theirs}", kind)
            yield ParamMapping(f"trf_blocks.{i}.{ours}.bias", f"h.{i}.{theirs}", "bias")
    yield ParamMapping("final_norm.weight", "ln_f", "gain")
    yield ParamMapping("final_norm.bias", "ln_f", "bias")
