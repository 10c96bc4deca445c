""":class:`ModelWeights`, the type that every format is read into, and the reader of our own checkpoints."""

import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.data.tokenizer_json import tokenizer_from
from gpt_lightning.model.config import GPTConfig

# Windows refuses to replace or remove a file while it is mapped
_KEEPS_MAPPED = os.name != "nt"
_MODULE_PREFIX = "model."  # GPTLightningModule holds the GPTModel as ``model``
POSITION_EMBEDDING = "pos_emb.weight"  # a tensor that every GPTModel has
EMA_STATE = "state_dict_ema"  # key in checkpoints of runs with model.ema_decay; timm has the same
_HEAD_DIM = 64  # in every GPT-2 and in the book's models


@dataclass(frozen=True)
class ModelWeights:
    """Weights under :class:`GPTModel`'s names and, if the file has it, the optimizer's state.

    Attributes:
        state_dict: The tensors. They may be memory-mapped or transposed views: most of the file is read only
            in :func:`pop_weights`.
        optimizer_state: What ``Optimizer.state_dict()`` returned, with ``param_names`` in its groups.
        assumed: Keys of ``config`` that the file does not contain. Another value is no contradiction.
        warnings: What a user should know about how the files were read, one line each.
        tokenizer: The tokenizer of its texts.
        other_tokenizer: Why the model has another tokenizer, which cannot be read. ``None``: ``tokenizer`` fits.
        ema_state_dict: The exponential moving average of the tensors, if the file has it; its shapes are not checked.
    """

    config: GPTConfig
    state_dict: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    assumed: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    tokenizer: Tokenizer = GPT2
    other_tokenizer: str | None = None
    ema_state_dict: dict[str, Tensor] | None = None


def pop_weights(weights: ModelWeights, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Remove the tensors from ``weights`` and return them contiguous, in ``dtype``.

    Each tensor is read, transposed and converted alone, so memory holds the result and one more tensor at most.
    Pages of a mapped file are not counted: they are the system's cache, which it frees when memory runs low.

    Args:
        dtype: ``None``: :func:`stored_dtype`.
    """
    dtype = dtype or stored_dtype(weights)
    tensors = {}
    for name in list(weights.state_dict):
        tensors[name] = _contiguous(weights.state_dict.pop(name), dtype)
    return tensors


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Transpose and convert with one copy at most. On Windows it is always copied, out of the mapped file."""
    if _KEEPS_MAPPED and tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def stored_dtype(weights: ModelWeights) -> torch.dtype:
    """The dtype of the weights; if there are several, the smallest that holds all of them exactly."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in weights.state_dict.values()})


def to_one_dtype(weights: ModelWeights) -> ModelWeights:
    """``weights`` with all tensors in :func:`stored_dtype`."""
    dtype = stored_dtype(weights)
    tensors = {name: tensor.to(dtype) for name, tensor in weights.state_dict.items()}
    return replace(weights, state_dict=tensors)


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape and the same values; the dtypes may differ."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(dtype), second.to(dtype))


# what torch.compile, DataParallel, FSDP and activation checkpointing insert into names
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrap_names(names: Iterable[str], known_name: str, path: Path) -> dict[str, str]:
    """Map each name without wrappers to the name in the file.

    The names of wrapper modules are removed, and so is a common prefix such as ``model.``.

    Args:
        known_name: A tensor that every model of this kind has. What precedes it in the file is the prefix.

    Raises:
        ValueError: Two tensors have the same name without wrappers.
    """
    stripped = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names
    }
    prefixes = {
        short.removesuffix(known_name)
        for short in stripped.values()
        if f".{short}".endswith(f".{known_name}")
    }
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    unwrapped: dict[str, str] = {}
    for name, short in stripped.items():
        short = short.removeprefix(prefix)
        if short in unwrapped:
            raise ValueError(
                f"{path}: has both {unwrapped[short]} and {name}; give a file with one"
            )
        unwrapped[short] = name
    return unwrapped


def with_head(weights: ModelWeights, *, tied: bool) -> ModelWeights:
    """The same model with an output head that is the token embedding, or a separate tensor.

    Raises:
        ValueError: The head cannot be tied, since its weights differ from the embedding's.
    """
    if weights.config.tied_embeddings == tied:
        return weights
    tensors = dict(weights.state_dict)
    if tied:
        if not same_values(tensors.pop("out_head.weight"), tensors["tok_emb.weight"]):
            raise ValueError(
                "model.config.tied_embeddings: is true, but the source's output head differs from its token "
                "embedding; give false"
            )
    else:
        tensors["out_head.weight"] = tensors["tok_emb.weight"]
    config = replace(weights.config, tied_embeddings=tied)
    # the optimizer state does not fit: it has one entry where there are now two matrices, or the reverse
    return replace(weights, config=config, state_dict=tensors, optimizer_state=None)


def assumed_heads(emb_dim: int, path: Path) -> tuple[int, str]:
    """The number of attention heads for a file that does not contain it, and a warning that says so.

    Raises:
        ValueError: ``emb_dim`` is not a multiple of 64, so the number must be given.
    """
    remedy = "give --n_heads (--model.config.n_heads with fit and validate)"
    if emb_dim % _HEAD_DIM:
        raise ValueError(
            f"n_heads: {path} does not contain it, and its emb_dim of {emb_dim} is not a multiple of "
            f"{_HEAD_DIM}; {remedy}"
        )
    n_heads = emb_dim // _HEAD_DIM
    return n_heads, (
        f"{path}: does not contain its number of attention heads; assuming {n_heads} "
        f"({_HEAD_DIM} dimensions each); if that is wrong, {remedy}"
    )


def verify_zip_checksums(path: Path) -> None:
    """Verify a ``torch.save`` file against the checksums in its zip archive, which torch does not read.

    Raises:
        ValueError: It is not such a file, or is damaged.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    # what zipfile raises for damaged bytes; RuntimeError also for an unknown compression method
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError,
            UnicodeDecodeError, OSError) as error:  # fmt: skip
        raise ValueError(
            f"{path}: is not a torch.save file of torch 1.6 or later, or is damaged; give another"
        ) from error
    if damaged:
        raise ValueError(
            f"{path}: is damaged: {damaged} does not match its checksum; give an intact copy"
        )


def read_torch(path: Path) -> Any:
    """Read what ``torch.save`` wrote: tensors and primitives only. The tensors are memory-mapped.

    Raises:
        ValueError: It is not such a file, is damaged, or holds code.
        OSError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and numbers, which may be code, so it is not loaded; give another"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: is not a torch.save file, or is damaged; give another"
        ) from error


def is_lightning(content: Any) -> bool:
    """Whether the content of a ``torch.save`` file is a checkpoint of ours."""
    settings = content.get("hyper_parameters") if isinstance(content, dict) else None
    return isinstance(settings, dict) and isinstance(settings.get("config"), dict)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours as a dict of tensors and primitives. The tensors are memory-mapped.

    Raises:
        ValueError: It is not a checkpoint of ours, or is damaged.
        OSError: It cannot be read.
    """
    checkpoint: dict[str, Any] = read_torch(path)
    if not is_lightning(checkpoint):
        raise ValueError(
            f"{path}: is not a gpt_lightning checkpoint: it holds no model configuration; give another"
        )
    return checkpoint


def checkpoint_config(checkpoint: dict[str, Any], path: Path) -> GPTConfig:
    """The architecture of a checkpoint of ours; ``ValueError`` if it is not valid."""
    return config_from_dict(checkpoint["hyper_parameters"]["config"], path)


def config_from_dict(settings: Any, path: Path) -> GPTConfig:
    """The architecture that a file holds as a dict; ``ValueError`` if it is not valid."""
    try:
        return GPTConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: its model configuration is not valid ({error}); give another"
        ) from error


def read_lightning(checkpoint: dict[str, Any], path: Path) -> ModelWeights:
    """A checkpoint of ours as :class:`ModelWeights`; ``ValueError`` if it has no weights."""
    optimizers = checkpoint.get("optimizer_states") or [None]
    return ModelWeights(
        config=checkpoint_config(checkpoint, path),
        state_dict=_named_tensors(checkpoint, "state_dict", path),
        optimizer_state=optimizers[0],
        tokenizer=_checkpoint_tokenizer(checkpoint, path),
        ema_state_dict=_named_tensors(checkpoint, EMA_STATE, path)
        if EMA_STATE in checkpoint
        else None,
    )


def _named_tensors(checkpoint: dict[str, Any], key: str, path: Path) -> dict[str, Tensor]:
    """The tensors under a key of a checkpoint, by :class:`GPTModel`'s names."""
    tensors = checkpoint.get(key)
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path}: its {key} does not hold tensors only; give another")
    names = unwrap_names(tensors, POSITION_EMBEDDING, path)
    return {ours: tensors[name] for ours, name in names.items()}


def tokenizer_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint of ours holds besides, so that it has its tokenizer; nothing for GPT-2's."""
    if tokenizer.file is None:
        return {}
    return {"tokenizer": {"name": tokenizer.name, "json": tokenizer.file.decode()}}


def _checkpoint_tokenizer(checkpoint: dict[str, Any], path: Path) -> Tokenizer:
    state = checkpoint.get("tokenizer")
    if state is None:
        return GPT2
    try:
        return tokenizer_from(state["json"].encode(), state["name"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: its tokenizer cannot be read ({error}); give another") from error


def write_lightning(weights: ModelWeights, path: Path) -> None:
    """Write a checkpoint for ``--init_from``. ``--ckpt_path`` cannot resume from it: it has no step."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": version("lightning"),
        "hyper_parameters": {"config": asdict(weights.config)},
        **tokenizer_state(weights.tokenizer),
        "state_dict": {
            _MODULE_PREFIX + name: t.clone(memory_format=torch.contiguous_format)
            for name, t in weights.state_dict.items()
        },
    }
    if weights.optimizer_state is not None:
        checkpoint["optimizer_states"] = [weights.optimizer_state]
    torch.save(checkpoint, path)
