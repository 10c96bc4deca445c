"""Reader of ``torch.save(model.state_dict(), path)`` of a :class:`GPTModel`, alone or with an optimizer's state."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.weights import (
    POSITION_EMBEDDING,
    ModelWeights,
    assumed_heads,
    unwrap_names,
)


def is_state_dict(content: Any) -> bool:
    """Whether the content of a ``torch.save`` file is the state dict of a GPTModel, also under the book's two keys."""
    saved = content.get("model_state_dict", content) if isinstance(content, dict) else None
    return isinstance(saved, dict) and any(
        isinstance(name, str) and name.endswith(".att.qkv.weight") for name in saved
    )


def read_state_dict(content: dict[str, Any], path: Path, n_heads: int | None) -> ModelWeights:
    """The weights, and the optimizer's state under ``optimizer_state_dict`` if there is one.

    A state dict holds shapes only: the number of heads is ``n_heads``, or follows from 64 dimensions per head, with a
    warning.

    Args:
        content: What the file holds.

    Raises:
        ValueError: The file lacks a tensor, or ``n_heads`` must be given.
    """
    saved = content.get("model_state_dict", content)
    if not all(isinstance(tensor, Tensor) for tensor in saved.values()):
        raise ValueError(f"{path}: its state dict does not hold tensors only; give another")
    names = unwrap_names(saved, POSITION_EMBEDDING, path)
    tensors = {ours: saved[name] for ours, name in names.items()}
    config = _config_from_shapes(tensors, path)
    warnings: tuple[str, ...] = ()
    assumed = {"drop_rate"}
    if n_heads is None:
        n_heads, warning = assumed_heads(config.emb_dim, path)
        assumed.add("n_heads")
        warnings = (warning,)
    config = replace(config, n_heads=n_heads)
    optimizer_state = content.get("optimizer_state_dict")
    if optimizer_state is not None:
        optimizer_state = _with_names(optimizer_state, list(tensors), path)
    return ModelWeights(config, tensors, optimizer_state, frozenset(assumed), warnings)


def _config_from_shapes(tensors: dict[str, Tensor], path: Path) -> GPTConfig:
    """The architecture that follows from names and shapes, with one head."""
    for name in ("tok_emb.weight", POSITION_EMBEDDING):
        if name not in tensors or tensors[name].dim() != 2:
            raise ValueError(f"{path}: has no {name}, unlike a GPTModel; give another")
    vocab_size, emb_dim = tensors["tok_emb.weight"].shape
    return GPTConfig(
        vocab_size=vocab_size,
        context_length=tensors[POSITION_EMBEDDING].shape[0],
        emb_dim=emb_dim,
        n_heads=1,
        n_layers=len({name.split(".")[1] for name in tensors if name.startswith("trf_blocks.")}),
        qkv_bias="trf_blocks.0.att.qkv.bias" in tensors,
        tied_embeddings="out_head.weight" not in tensors,
    )


def _with_names(saved: dict[str, Any], names: list[str], path: Path) -> dict[str, Any]:
    """The state of an optimizer over ``model.parameters()``, with their names."""
    try:
        (group,) = saved["param_groups"]
        named = list(zip(group["params"], names, strict=True))
        return {**saved, "param_groups": [{**group, "param_names": [name for _, name in named]}]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its optimizer_state_dict is not one group of the model's parameters; give a file with the "
            "model's state dict alone"
        ) from error
