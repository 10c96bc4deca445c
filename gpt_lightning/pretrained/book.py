"""Reader and writer of the book's ``model.pth`` and ``model_and_optimizer.pth``."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.weights import (
    POSITION_EMBEDDING,
    ModelWeights,
    assumed_heads,
    config_from_dict,
    same_values,
    unwrap_names,
)

# our entry in a state dict's _metadata, which load_state_dict ignores: the architecture
_METADATA = "gpt_lightning"
_QKV = ("W_query", "W_key", "W_value")
_NORM_PARTS = {"weight": "scale", "bias": "shift"}


def is_book(content: Any) -> bool:
    """Whether the content of a ``torch.save`` file is the book's."""
    return isinstance(content, dict) and (
        "model_state_dict" in content
        or any(isinstance(n, str) and n.endswith(".W_query.weight") for n in content)
    )


def read_book(content: dict[str, Any], path: Path, n_heads: int | None = None) -> ModelWeights:
    """Read the weights and, from ``model_and_optimizer.pth``, AdamW's moments, both under our names.

    A file of :func:`write_book` holds its architecture. A file of the book's own code holds shapes only: the
    number of heads is then ``n_heads``, or follows from 64 dimensions per head, with a warning.

    Args:
        content: What the file holds.

    Raises:
        ValueError: The file lacks a tensor, or ``n_heads`` must be given.
    """
    saved = content.get("model_state_dict", content)
    if not isinstance(saved, dict) or not all(isinstance(t, Tensor) for t in saved.values()):
        raise ValueError(f"{path}: its model_state_dict does not hold tensors only; give another")
    names = unwrap_names(saved, POSITION_EMBEDDING, path)
    theirs = {unwrapped: saved[name] for unwrapped, name in names.items()}
    config = _config_from_shapes(theirs, path)
    warnings: tuple[str, ...] = ()
    assumed = frozenset({"drop_rate"})
    recorded = (getattr(saved, "_metadata", None) or {}).get(_METADATA)
    if recorded is not None:
        config, assumed = config_from_dict(recorded, path), frozenset()
    elif n_heads is not None:
        config = replace(config, n_heads=n_heads)
    else:
        n_heads, warning = assumed_heads(config.emb_dim, path)
        config = replace(config, n_heads=n_heads)
        assumed |= {"n_heads"}
        warnings = (warning,)
    weights = {name: t for name, t in theirs.items() if not name.endswith(".mask")}
    optimizer_state = content.get("optimizer_state_dict")
    # the book copies GPT-2's embedding into the head; with an optimizer state the two are separate parameters
    is_copy = same_values(weights["out_head.weight"], weights["tok_emb.weight"])
    if is_copy and optimizer_state is None and (config.tied_embeddings or not recorded):
        config = replace(config, tied_embeddings=True)
        del weights["out_head.weight"]
    else:
        config = replace(config, tied_embeddings=False)
    if optimizer_state is not None:
        optimizer_state = _our_optimizer(optimizer_state, list(weights), config, path)
    state_dict = _to_ours(weights, config)
    return ModelWeights(config, state_dict, optimizer_state, assumed, warnings)


def write_book(weights: ModelWeights, path: Path) -> None:
    """Write the format of ``model.pth``, or of ``model_and_optimizer.pth`` if there are moments to write.

    The architecture goes into the state dict's ``_metadata``, which ``torch.save`` keeps and the book's
    ``load_state_dict`` ignores.

    A tied head becomes a copy of the embedding, since the book's head is a separate matrix. The moments are then
    left out: they belong to one matrix, and the book has two. The state of another optimizer than AdamW is left out
    too.
    """
    config = weights.config
    theirs = OrderedDict(to_book(weights.state_dict, config))
    if config.tied_embeddings:
        theirs["out_head.weight"] = _copy(weights.state_dict["tok_emb.weight"])
    names = list(theirs)
    length = config.context_length
    for i in range(config.n_layers):
        theirs[f"trf_blocks.{i}.att.mask"] = torch.triu(torch.ones(length, length), diagonal=1)
    theirs.__dict__["_metadata"] = {_METADATA: asdict(config)}
    if (
        weights.optimizer_state is None
        or config.tied_embeddings
        or not _is_adamw(weights.optimizer_state)
    ):
        torch.save(theirs, path)
        return
    optimizer_state = _book_optimizer(weights.optimizer_state, names, config)
    torch.save({"model_state_dict": theirs, "optimizer_state_dict": optimizer_state}, path)


def _names(config: GPTConfig) -> dict[str, tuple[str, ...]]:
    """Map our name of each tensor to the book's: three names if ours is query, key and value in one."""
    names: dict[str, tuple[str, ...]] = {
        "tok_emb.weight": ("tok_emb.weight",),
        "pos_emb.weight": ("pos_emb.weight",),
    }
    for i in range(config.n_layers):
        block = f"trf_blocks.{i}"
        for part in ("weight", "bias") if config.qkv_bias else ("weight",):
            names[f"{block}.att.qkv.{part}"] = tuple(f"{block}.att.{w}.{part}" for w in _QKV)
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
    """Rename and concatenate. Unknown names stay: the caller compares all names with the model's."""
    names = _names(config)
    theirs = {name for group in names.values() for name in group}
    ours = {name: tensor for name, tensor in tensors.items() if name not in theirs}
    for name, group in names.items():
        if all(part in tensors for part in group):
            parts = [tensors[part] for part in group]
            ours[name] = parts[0] if len(parts) == 1 else _concatenate(parts, group[0])
    return ours


def _concatenate(parts: list[Tensor], name: str) -> Tensor:
    first = parts[0]
    if any(part.shape != first.shape or not part.is_floating_point() for part in parts):
        raise ValueError(f"{name}: differs in shape or dtype from its key and value; give another")
    return torch.cat(parts)


def to_book(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return copies of weights under the book's names, with separate matrices for query, key and value."""
    book: dict[str, Tensor] = {}
    for name, group in _names(config).items():
        parts = (tensors[name],) if len(group) == 1 else tensors[name].chunk(3)
        book.update(zip(group, map(_copy, parts), strict=True))
    return {name: book[name] for name in _book_order(config)}


def _copy(tensor: Tensor) -> Tensor:
    """A copy in a new storage: ``torch.save`` would write the whole storage of a view."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _book_order(config: GPTConfig) -> list[str]:
    """The names in the order of the book's ``model.parameters()``, which numbers AdamW's state.

    Each module's weight and bias are neighbors there; :func:`_names` has the weights of query, key and value
    before their biases.
    """
    names = [name for group in _names(config).values() for name in group]
    position = {name: i for i, name in enumerate(names)}

    def key(name: str) -> tuple[int, int]:
        module = name.rpartition(".")[0]
        first = min(position[n] for n in names if n.rpartition(".")[0] == module)
        return first, position[name]

    return sorted(names, key=key)


def _config_from_shapes(theirs: dict[str, Tensor], path: Path) -> GPTConfig:
    """The architecture that follows from the shapes, with one head."""
    for name in ("tok_emb.weight", "pos_emb.weight", "out_head.weight"):
        if name not in theirs or theirs[name].dim() != 2:
            raise ValueError(f"{path}: has no {name}, unlike the book's model; give another")
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


def _our_optimizer(
    saved: dict[str, Any], names: list[str], config: GPTConfig, path: Path
) -> dict[str, Any]:
    """AdamW's state with our parameter numbers instead of the book's.

    Args:
        names: The book's, in the order of the file.
    """
    try:
        state = {names[index]: entry for index, entry in saved["state"].items()}
        group = {key: value for key, value in saved["param_groups"][0].items() if key != "params"}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: its optimizer_state_dict is not that of AdamW for its model; give another"
        ) from error
    ours: dict[int, dict[str, Any]] = {}
    our_names = list(_names(config))
    for index, name in enumerate(our_names):
        entries = [state[part] for part in _names(config)[name] if part in state]
        if entries:
            ours[index] = {
                key: torch.cat([e[key] for e in entries]) if _is_moment(value) else value
                for key, value in entries[0].items()
            }
    group |= {"params": list(range(len(our_names))), "param_names": our_names}
    return {"state": ours, "param_groups": [group]}


def _is_moment(value: Any) -> bool:
    """Whether an entry of an optimizer's state has its parameter's shape."""
    return isinstance(value, Tensor) and value.dim() > 0


def _is_adamw(optimizer_state: dict[str, Any]) -> bool:
    entries = optimizer_state["state"].values()
    return bool(entries) and all("exp_avg_sq" in entry for entry in entries)


def _book_optimizer(saved: dict[str, Any], names: list[str], config: GPTConfig) -> dict[str, Any]:
    """AdamW's state with the book's parameter numbers, which are positions in ``names``."""
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
        for i, theirs in enumerate(group):
            state[names.index(theirs)] = {
                key: _copy(value.chunk(len(group))[i]) if _is_moment(value) else value
                for key, value in ours[name].items()
            }
    first = {k: v for k, v in saved["param_groups"][0].items() if k != "param_names"}
    return {"state": state, "param_groups": [first | {"params": list(range(len(names)))}]}
