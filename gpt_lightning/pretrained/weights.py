"""The forms in which weights lie on disk, each read into the same thing: a :class:`ModelWeights`."""

import ctypes
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gpt_lightning.model.config import GPTConfig

_MODULE_PREFIX = "model."  # GPTLightningModule holds the GPTModel as ``model``
POSITIONS = "pos_emb.weight"  # which every GPTModel has


@dataclass(frozen=True)
class ModelWeights:
    """Weights under :class:`GPTModel`'s names and, where the file has it, the optimizer's state.

    Attributes:
        state_dict: Its tensors may be memory-mapped or transposed views, so that nothing is read before
            :func:`take_weights` does.
        optimizer_state: What ``Optimizer.state_dict()`` returned, with ``param_names`` in its groups.
        assumed: Keys of ``config`` that the file does not tell, so that another value is no contradiction.
        warnings: What a user should know about how the files were read, one line each.
        other_tokenizer: Why text cannot be encoded for this model with GPT-2's tokenizer; None: it can.
        let_go: Drops from memory what was read of the mapped file so far, see :func:`release_tensors`.
    """

    config: GPTConfig
    state_dict: dict[str, Tensor]
    optimizer_state: dict[str, Any] | None = None
    assumed: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    other_tokenizer: str | None = None
    let_go: Callable[[], object] = lambda: None


def take_weights(source: ModelWeights, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights as they are computed with, contiguous and in ``dtype`` (None: :func:`stored_dtype`).

    ``source`` is left without weights: each tensor is read, transposed and converted on its own and its
    file's pages let go, so that memory never holds more than the result and one tensor.
    """
    dtype = dtype or stored_dtype(source)
    weights = {}
    for name in list(source.state_dict):
        weights[name] = _contiguous(source.state_dict.pop(name), dtype)
        source.let_go()
    return weights


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In one step, without a copy between a transposed tensor and a converted one."""
    if tensor.is_contiguous() and tensor.dtype == dtype:
        return tensor
    return torch.empty(tensor.shape, dtype=dtype, device=tensor.device).copy_(tensor)


def stored_dtype(source: ModelWeights) -> torch.dtype:
    """The dtype of the weights; where there are several, the smallest that holds all of them exactly."""
    return reduce(torch.promote_types, {tensor.dtype for tensor in source.state_dict.values()})


def in_one_dtype(source: ModelWeights) -> ModelWeights:
    """``source`` with all weights in :func:`stored_dtype`."""
    dtype = stored_dtype(source)
    weights = {name: tensor.to(dtype) for name, tensor in source.state_dict.items()}
    return replace(source, state_dict=weights)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and, whatever their dtypes, the same values."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(dtype), other.to(dtype))


# parts of names that torch.compile, DataParallel, FSDP and activation checkpointing put in
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_names(names: Iterable[str], known: str, path: Path) -> dict[str, str]:
    """Each name as a bare model has it → the name as it is in the file.

    The parts that wrappers put in are left out, and so is the prefix that stands before ``known``, the name
    of a tensor that every model of the kind has, in this file.

    Raises:
        ValueError: Two names are the same then.
    """
    short = {
        name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names
    }
    prefixes = {s.removesuffix(known) for s in short.values() if f".{s}".endswith(f".{known}")}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""
    plain: dict[str, str] = {}
    for name, bare in short.items():
        bare = bare.removeprefix(prefix)
        if bare in plain:
            raise ValueError(f"{path}: has both {plain[bare]} and {name}; give a file with one")
        plain[bare] = name
    return plain


def with_head(source: ModelWeights, *, tied: bool) -> ModelWeights:
    """The same function of the tokens with a head that is the embedding, or one of its own.

    Raises:
        ValueError: It cannot be tied: its head holds other weights than its embedding.
    """
    if source.config.tied_embeddings == tied:
        return source
    weights = dict(source.state_dict)
    if tied:
        if not same_values(weights.pop("out_head.weight"), weights["tok_emb.weight"]):
            raise ValueError(
                "model.config.tied_embeddings: true, but the source's head has weights of its own; "
                "give false"
            )
    else:
        weights["out_head.weight"] = weights["tok_emb.weight"]
    config = replace(source.config, tied_embeddings=tied)
    # an optimizer counts one matrix where there are two, or two where there is one
    return replace(source, config=config, state_dict=weights, optimizer_state=None)


def check_records(path: Path) -> None:
    """Hold a file of ``torch.save`` against the sums in its zip, which torch itself does not look at.

    Raises:
        ValueError: It is no such file, or damaged.
        OSError: It cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as records:
            damaged = records.testzip()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    # what zipfile raises of damaged bytes; a RuntimeError also where they name a compression that it does not know
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError,
            UnicodeDecodeError, OSError) as error:  # fmt: skip
        raise ValueError(
            f"{path}: is no file of torch.save since torch 1.6, or is damaged; give another"
        ) from error
    if damaged:
        raise ValueError(
            f"{path}: is damaged: {damaged} does not have its checksum; give a whole copy"
        )


def read_torch(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors and primitives only; the tensors are memory-mapped.

    Raises:
        ValueError: It is no such file, is damaged, or holds code.
        OSError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and numbers, which may be code; it is not loaded"
        ) from error
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{path}: is no file of torch.save, or is damaged; give another"
        ) from error


def release_tensors(content: Any) -> Callable[[], object]:
    """What drops the pages of the file from memory that :func:`read_torch` has mapped for ``content``.

    All its tensors are in one mapping, whose pages stay in memory once they were read, also when their
    tensor was copied and is gone. A dropped page is read anew when it is needed; none was written to.
    On Linux only: elsewhere the system alone decides, when memory becomes scarce.
    """
    tensor = next((leaf for leaf in tree_leaves(content) if isinstance(leaf, Tensor)), None)
    maps = Path("/proc/self/maps")
    if tensor is None or not maps.exists():
        return lambda: None
    address = tensor.untyped_storage().data_ptr()
    for line in maps.read_text(encoding="utf-8", errors="replace").splitlines():
        where, access, _, _, inode = line.split()[:5]
        begin, end = (int(part, 16) for part in where.split("-"))
        if begin <= address < end and access.endswith("p") and inode != "0":
            madvise = ctypes.CDLL(None).madvise
            arguments = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
            return lambda: madvise(*arguments, mmap.MADV_DONTNEED)
    return lambda: None


def is_lightning(content: Any) -> bool:
    settings = content.get("hyper_parameters") if isinstance(content, dict) else None
    return isinstance(settings, dict) and isinstance(settings.get("config"), dict)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, as a dict of tensors and primitives; the tensors are memory-mapped.

    Raises:
        ValueError: It is no checkpoint of ours, or a damaged one.
        OSError: It cannot be read.
    """
    checkpoint: dict[str, Any] = read_torch(path)
    if not is_lightning(checkpoint):
        raise ValueError(
            f"{path}: is no checkpoint of gpt_lightning: it names no model; give another"
        )
    return checkpoint


def checkpoint_config(checkpoint: dict[str, Any], path: Path) -> GPTConfig:
    """The architecture a checkpoint of ours was trained with; ``ValueError`` where it is none."""
    return stored_config(checkpoint["hyper_parameters"]["config"], path)


def stored_config(stored: Any, path: Path) -> GPTConfig:
    """An architecture that was written as a dict; ``ValueError`` where it is none."""
    try:
        return GPTConfig(**stored)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its architecture is no GPTConfig ({error})") from error


def read_lightning(checkpoint: dict[str, Any], path: Path) -> ModelWeights:
    """A checkpoint of ours as a :class:`ModelWeights`; ``ValueError`` where it has no weights."""
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise ValueError(f"{path}: its state_dict is not one of tensors; give another")
    optimizers = checkpoint.get("optimizer_states") or [None]
    names = plain_names(weights, POSITIONS, path)
    return ModelWeights(
        config=checkpoint_config(checkpoint, path),
        state_dict={plain: weights[name] for plain, name in names.items()},
        optimizer_state=optimizers[0],
    )


def write_lightning(source: ModelWeights, path: Path) -> None:
    """A checkpoint to begin with (``--init_from``), not one to go on from: it has no position."""
    checkpoint: dict[str, Any] = {
        "pytorch-lightning_version": version("lightning"),
        "hyper_parameters": {"config": asdict(source.config)},
        "state_dict": {
            _MODULE_PREFIX + name: t.clone(memory_format=torch.contiguous_format)
            for name, t in source.state_dict.items()
        },
    }
    if source.optimizer_state is not None:
        checkpoint["optimizer_states"] = [source.optimizer_state]
    torch.save(checkpoint, path)
