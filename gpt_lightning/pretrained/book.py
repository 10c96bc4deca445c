"""The book's ``model.pth`` and ``model_and_optimizer.pth``, as its notebooks save them."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.weights import (
    POSITIONS,
    ModelWeights,
    plain_names,
    same_values,
    stored_config,
)

_HEAD_DIM = 64  # of every GPT-2 and of the book's models
# our entry in a state dict's _metadata, which load_state_dict passes over: the architecture
_METADATA = "gpt_lightning"
_THIRDS = ("W_query", "W_key", "W_value")
_NORM_PARTS = {"weight": "scale", "bias": "shift"}
# in an optimizer's state of a parameter, what has the parameter's shape
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def is_book(content: Any) -> bool:
    return isinstance(content, dict) and (
        "model_state_dict" in content
        or any(isinstance(n, str) and n.endswith(".W_query.weight") for n in content)
    )


def read_book(content: dict[str, Any], path: Path, n_heads: int | None = None) -> ModelWeights:
    """The moments of ``model_and_optimizer.pth`` come with its weights, under our names.

    A file that :func:`write_book` wrote holds its architecture. The book's own code writes shapes alone: of
    such a file the heads are ``n_heads``, or as many as are 64 wide, with a warning.

    Args:
        content: What the file holds.

    Raises:
        ValueError: The file lacks a tensor, or the heads are to be given.
    """
    saved = content.get("model_state_dict", content)
    if not isinstance(saved, dict) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise ValueError(f"{path}: its model_state_dict is not one of tensors; give another")
    names = plain_names(saved, POSITIONS, path)
    theirs = {plain: saved[name] for plain, name in names.items()}
    config = _shapes(theirs, path)
    warnings: tuple[str, ...] = ()
    assumed = frozenset({"drop_rate"})
    recorded = (getattr(saved, "_metadata", None) or {}).get(_METADATA)
    if recorded is not None:
        config, assumed = stored_config(recorded, path), frozenset()
    elif n_heads is not None:
        config = replace(config, n_heads=n_heads)
    else:
        config = replace(config, n_heads=_assumed_heads(config.emb_dim, path))
        assumed |= {"n_heads"}
        warnings = (
            f"{path}: does not hold its number of attention heads; assuming {config.n_heads} "
            f"({_HEAD_DIM} wide); if it has another, give --n_heads (with fit and validate --model.config.n_heads)",
        )
    weights = {name: t for name, t in theirs.items() if not name.endswith(".mask")}
    optimizer_state = content.get("optimizer_state_dict")
    # the book puts GPT-2's embedding into its head too; an optimizer counts them as two
    shared = same_values(weights["out_head.weight"], weights["tok_emb.weight"])
    if shared and optimizer_state is None and (config.tied_embeddings or not recorded):
        config = replace(config, tied_embeddings=True)
        del weights["out_head.weight"]
    else:
        config = replace(config, tied_embeddings=False)
    if optimizer_state is not None:
        optimizer_state = _our_optimizer(optimizer_state, list(weights), config, path)
    state_dict = _to_ours(weights, config)
    return ModelWeights(config, state_dict, optimizer_state, assumed, warnings)


def write_book(source: ModelWeights, path: Path) -> None:
    """``model.pth``'s form, or ``model_and_optimizer.pth``'s where there are moments to write.

    The architecture goes into the state dict's ``_metadata``, which ``torch.save`` keeps and the book's
    ``load_state_dict`` does not look at.

    A tied head becomes the book's own head with the same weights; its moments are those of one matrix
    that is two in the book, and so are left out.
    """
    config = source.config
    weights = OrderedDict(_to_book(source.state_dict, config))
    if config.tied_embeddings:
        weights["out_head.weight"] = _own(source.state_dict["tok_emb.weight"])
    names = list(weights)
    length = config.context_length
    for i in range(config.n_layers):
        weights[f"trf_blocks.{i}.att.mask"] = torch.triu(torch.ones(length, length), diagonal=1)
    weights.__dict__["_metadata"] = {_METADATA: asdict(config)}
    if source.optimizer_state is None or config.tied_embeddings:
        torch.save(weights, path)
        return
    optimizer_state = _book_optimizer(source.optimizer_state, names, config)
    torch.save({"model_state_dict": weights, "optimizer_state_dict": optimizer_state}, path)


def _names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor → the book's, three where ours is query, key and value in one.

    In the order of the book's ``model.parameters()``, by which its optimizer counts.
    """
    names: dict[str, tuple[str, ...]] = {
        "tok_emb.weight": ("tok_emb.weight",),
        "pos_emb.weight": ("pos_emb.weight",),
    }
    for i in range(config.n_layers):
        block = f"trf_blocks.{i}"
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            names[f"{block}.att.qkv.{part}"] = tuple(f"{block}.att.{w}.{part}" for w in _THIRDS)
        for module in ("att.out_proj", "ff.layers.0", "ff.layers.2"):
            for part in ("weight", "bias"):
                names[f"{block}.{module}.{part}"] = (f"{block}.{module}.{part}",)
        for norm in ("norm1", "norm2"):
            for ours, theirs in _NORM_PARTS.items():
                names[f"{block}.{norm}.{ours}"] = (f"{block}.{norm}.{theirs}",)
    for ours, theirs in _NORM_PARTS.items():
        names[f"final_norm.{ours}"] = (f"final_norm.{theirs}",)
    if not config.tied_embeddings:
        names["out_head.weight"] = ("out_head.weight",)
    return names


def _to_ours(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Names that are not the book's are kept, for whoever checks them against the model."""
    names = _names(config)
    theirs = {name for group in names.values() for name in group}
    ours = {name: tensor for name, tensor in tensors.items() if name not in theirs}
    for name, group in names.items():
        if all(third in tensors for third in group):
            parts = [tensors[third] for third in group]
            ours[name] = parts[0] if len(parts) == 1 else _put_together(parts, group[0])
    return ours


def _put_together(parts: list[Tensor], name: str) -> Tensor:
    first = parts[0]
    if any(part.shape != first.shape or not part.is_floating_point() for part in parts):
        raise ValueError(f"{name}: is not of the shape and dtype of its key and value")
    return torch.cat(parts)


def _to_book(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    book: dict[str, Tensor] = {}
    for name, group in _names(config).items():
        parts = (tensors[name],) if len(group) == 1 else tensors[name].chunk(3)
        book.update(zip(group, map(_own, parts), strict=True))
    # the order of the book's modules: query, key and value each with weight and bias
    return {name: book[name] for name in _book_order(config)}


def _own(tensor: Tensor) -> Tensor:
    """A copy in a storage of its own: ``torch.save`` writes the whole storage of a view."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _book_order(config: GPTConfig) -> list[str]:
    """The names in the order of ``model.parameters()`` of the book's model, by which AdamW counts."""
    order = [name for group in _names(config).values() for name in group]
    place = {name: i for i, name in enumerate(order)}

    def key(name: str) -> tuple[int, int]:
        module = name.rpartition(".")[0]
        first = min(place[n] for n in order if n.rpartition(".")[0] == module)
        return first, place[name]

    return sorted(order, key=key)


def _shapes(theirs: dict[str, Tensor], path: Path) -> GPTConfig:
    """The architecture as far as the shapes tell, with one head."""
    for name in ("tok_emb.weight", "pos_emb.weight", "out_head.weight"):
        if name not in theirs or theirs[name].dim() != 2:
            raise ValueError(f"{path}: has no {name}, as the book's model has; give another")
    vocab_size, emb_dim = theirs["tok_emb.weight"].shape
    blocks = [name.split(".")[1] for name in theirs if name.startswith("trf_blocks.")]
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=theirs["pos_emb.weight"].shape[0],
        emb_dim=emb_dim,
        n_heads=1,
        n_layers=len(set(blocks)) or 1,
        qkv_bias="trf_blocks.0.att.W_query.bias" in theirs,
    )


def _assumed_heads(emb_dim: int, path: Path) -> int:
    if emb_dim % _HEAD_DIM:
        raise ValueError(
            f"n_heads: {path} does not hold it, and its width of {emb_dim} is not a multiple of "
            f"{_HEAD_DIM}; give --n_heads (with fit and validate --model.config.n_heads)"
        )
    return emb_dim // _HEAD_DIM


def _our_optimizer(
    saved: dict[str, Any], names: list[str], config: GPTConfig, path: Path
) -> dict[str, Any]:
    """AdamW's state by the book's parameter numbers → by ours. ``names``: the file's, in its order."""
    try:
        state = {names[index]: entry for index, entry in saved["state"].items()}
        group = {key: value for key, value in saved["param_groups"][0].items() if key != "params"}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: its optimizer_state_dict is not AdamW's of its model") from error
    ours: dict[int, dict[str, Any]] = {}
    our_names = list(_names(config))
    for index, name in enumerate(our_names):
        entries = [state[part] for part in _names(config)[name] if part in state]
        if entries:
            ours[index] = {
                key: torch.cat([e[key] for e in entries]) if key in _MOMENTS else value
                for key, value in entries[0].items()
            }
    group |= {"params": list(range(len(our_names))), "param_names": our_names}
    return {"state": ours, "param_groups": [group]}


def _book_optimizer(saved: dict[str, Any], names: list[str], config: GPTConfig) -> dict[str, Any]:
    ours = {
        name: saved["state"][index]
        for group in saved["param_groups"]
        for index, name in zip(group["params"], group["param_names"], strict=True)
        if index in saved["state"]
    }
    state: dict[int, dict[str, Any]] = {}
    for name, group in _names(config).items():
        if name not in ours:
            continue
        for third, theirs in enumerate(group):
            state[names.index(theirs)] = {
                key: _own(value.chunk(len(group))[third]) if key in _MOMENTS else value
                for key, value in ours[name].items()
            }
    first = {k: v for k, v in saved["param_groups"][0].items() if k != "param_names"}
    return {"state": state, "param_groups": [first | {"params": list(range(len(names)))}]}
