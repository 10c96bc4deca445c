"""The weights that SOURCE names, as all commands take it: path, run or public name."""

import logging
import os
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import torch

from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.model.config import GPT2_NAMES, GPT2_SIZES, gpt2_size
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.book import is_book, read_book
from gpt_lightning.pretrained.downloaded import find_downloaded
from gpt_lightning.pretrained.gguf import is_gguf
from gpt_lightning.pretrained.huggingface import is_huggingface, read_huggingface
from gpt_lightning.pretrained.nanogpt import is_nanogpt, read_nanogpt
from gpt_lightning.pretrained.openai import is_openai, read_openai
from gpt_lightning.pretrained.state_dict import is_state_dict, read_state_dict
from gpt_lightning.pretrained.weights import (
    ModelWeights,
    is_lightning,
    read_lightning,
    read_torch,
    stored_dtype,
    verify_zip_checksums,
)
from gpt_lightning.storage.checksum import check_manifest

logger = logging.getLogger(__name__)

_EXPECTED_FILES = (
    "last.ckpt or best.ckpt (a run), config.json with model.safetensors (Hugging Face), "
    "hparams.json with model.ckpt.index (OpenAI)"
)

_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_checkpoint(source: str) -> Path:
    """The checkpoint file that ``source`` names.

    It is the file itself, with or without ``.ckpt``, or ``last.ckpt`` of a folder, or else its ``best.ckpt``.

    Raises:
        FileNotFoundError: There is no such file.
    """
    path = Path(os.path.expanduser(source)).resolve()
    candidates = [path, path.with_name(path.name + ".ckpt"), path / "last.ckpt", path / "best.ckpt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        size = gpt2_size(source)
        remedy = f", or {size} for the downloaded weights" if size not in (None, source) else ""
        raise FileNotFoundError(f"{source}: holds none of {_EXPECTED_FILES}; give another{remedy}")
    nearest = _nearest(source)
    general = f"give a file, a folder or one of {', '.join(GPT2_SIZES)}"
    remedy = f"did you mean {nearest}?" if nearest else general
    raise FileNotFoundError(f"{source}: does not exist; {remedy}")


def _nearest(source: str) -> str | None:
    """The public name, the path or the run in ``checkpoints`` whose spelling is closest to ``source``."""
    candidates = {name.lower(): name for name in GPT2_NAMES}
    if (path := _nearest_path(Path(os.path.expanduser(source)))) is not None:
        candidates[str(path).lower()] = str(path)
    candidates |= {run.name.lower(): str(run) for run in _children(Path("checkpoints"))}
    matches = get_close_matches(source.lower(), candidates, n=1)
    return candidates[matches[0]] if matches else None


def _nearest_path(path: Path) -> Path | None:
    """``path`` with each missing part replaced by the closest name that exists; ``None`` if there is none."""
    nearest = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (nearest / part).exists() and not (nearest / f"{part}.ckpt").is_file():
            matches = get_close_matches(part, [child.name for child in _children(nearest)], n=1)
            if not matches:
                return None
            part = matches[0]
        nearest /= part
    return nearest


def _children(folder: Path) -> list[Path]:
    """The folders and weight files among the first 1,000 entries of ``folder``."""
    try:
        children = list(islice(folder.iterdir(), 1000))
    except OSError:
        return []
    return [c for c in children if c.suffix in _SUFFIXES or c.is_dir()]


def read_weights(source: str, *, n_heads: int | None = None) -> ModelWeights:
    """Read the weights and the architecture that ``source`` names, and verify that they are complete.

    The format is detected: in a folder by its files, in a file by its content. A public name of GPT-2
    (:func:`gpt2_size`) means the files of the download command, unless there is such a path.

    Args:
        n_heads: For a file of the book's own code, which does not contain it.

    Raises:
        ValueError: The format is unknown, or the files are damaged or contradict each other.
        OSError: There is no such file, or it cannot be read.
    """
    location = _resolve_location(source)
    path = Path(os.path.expanduser(location))
    try:
        if is_huggingface(path):
            check_manifest(path)
            weights = read_huggingface(path)
        elif is_openai(path):
            check_manifest(path)
            weights = read_openai(path)
        else:
            weights = _read_file(find_checkpoint(location), n_heads)
        check_shapes(weights, source)
        weights = _with_dtype_warning(weights, source)
    # a file whose content has other types than its format says raises any of these: a number for a name, a
    # scalar for a matrix, a size beyond all memory
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        cause = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{source}: is damaged or contradicts itself ({cause}); give another"
        ) from error
    if weights.other_tokenizer is None and weights.config.vocab_size < weights.tokenizer.vocab_size:
        difference = f"its vocabulary has {weights.config.vocab_size} tokens"
        if weights.tokenizer is not GPT2:
            difference += f", fewer than {weights.tokenizer}"
        weights = replace(weights, other_tokenizer=difference)
    return weights


def check_tokenizer(weights: ModelWeights, source: str) -> None:
    """Raise ``ValueError`` if the model has a tokenizer that cannot be read."""
    if weights.other_tokenizer is not None:
        raise ValueError(
            f"{source}: has another tokenizer than GPT-2's: {weights.other_tokenizer}; give a model "
            "with GPT-2's tokenizer, or with a tokenizer.json of byte-level BPE"
        )


def check_heads(weights: ModelWeights, source: str, n_heads: int | None) -> None:
    """Raise ``ValueError`` if ``n_heads`` is given and contradicts ``source``."""
    if n_heads not in (None, weights.config.n_heads):
        raise ValueError(
            f"n_heads: {source} has {weights.config.n_heads}, not {n_heads}; leave it out"
        )


def with_ema(weights: ModelWeights, source: str) -> ModelWeights:
    """The model with the exponential moving average of its weights, as a run with ``model.ema_decay`` keeps it.

    It has no optimizer state: the moments are those of the weights.

    Raises:
        ValueError: There is no average, or it is damaged.
    """
    if weights.ema_state_dict is None:
        raise ValueError(
            f"ema: {source} has no moving average of its weights; give a checkpoint of a run with model.ema_decay, "
            "or leave --ema out"
        )
    weights = replace(
        weights,
        state_dict=weights.ema_state_dict,
        optimizer_state=None,
        ema_state_dict=None,
    )
    check_shapes(weights, source)
    return weights


def print_warnings(weights: ModelWeights) -> None:
    """Log what a user should know about how the files were read."""
    for line in weights.warnings:
        logger.warning(line)


def weight_files(source: str) -> list[Path]:
    """The files that hold the weights of ``source``. Errors are those of :func:`read_weights`."""
    location = _resolve_location(source)
    path = Path(os.path.expanduser(location))
    if is_huggingface(path):
        return sorted(path.glob("*.safetensors"))
    if is_openai(path):
        return sorted(path.glob("model.ckpt.*"))
    return [find_checkpoint(location)]


def size_to_download(source: str) -> str | None:
    """The size of GPT-2 that ``source`` names; ``None`` if it names none, or if there is such a path."""
    path = Path(os.path.expanduser(source))
    if path.exists() or path.with_name(path.name + ".ckpt").is_file():
        return None
    return gpt2_size(source)


def _resolve_location(source: str) -> str:
    """The file or folder that ``source`` names; a folder also if ``source`` is one of its files."""
    if (size := size_to_download(source)) is not None:
        return str(find_downloaded(size))
    path = Path(source)
    if path.name in ("config.json", "model.safetensors", "hparams.json", "model.ckpt.index"):
        return str(path.parent)
    return source


def _read_file(path: Path, n_heads: int | None) -> ModelWeights:
    if is_gguf(path):
        raise ValueError(
            f"{path}: is a GGUF file, which is for llama.cpp and cannot be read here; give the model that it "
            "was made from"
        )
    verify_zip_checksums(path)
    content = read_torch(path)
    if is_lightning(content):
        return read_lightning(content, path)
    if is_state_dict(content):
        return read_state_dict(content, path, n_heads)
    if is_book(content):
        return read_book(content, path, n_heads)
    if is_nanogpt(content):
        return read_nanogpt(content, path)
    raise ValueError(
        f"{path}: is not a gpt_lightning checkpoint, a GPTModel's state dict, the book's model.pth or "
        "model_and_optimizer.pth, or nanoGPT's ckpt.pt; give another"
    )


def check_shapes(weights: ModelWeights, source: str, remedy: str = "give an intact copy") -> None:
    """Raise ``ValueError`` if names, shapes or dtypes contradict the architecture. It allocates nothing."""
    blocks = {name.split(".")[1] for name in weights.state_dict if name.startswith("trf_blocks.")}
    if len(blocks) != weights.config.n_layers:  # checked before so many are built
        raise ValueError(
            f"{source}: has {len(blocks)} blocks, its architecture says {weights.config.n_layers}; {remedy}"
        )
    with torch.device("meta"):
        expected = GPTModel(weights.config).state_dict()
    for name, parameter in expected.items():
        tensor = weights.state_dict.get(name)
        if tensor is None:
            raise ValueError(f"{source}: has no {name}, which its architecture needs; {remedy}")
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{source}: {name} is {tuple(tensor.shape)}, its architecture says "
                f"{tuple(parameter.shape)}; {remedy}"
            )
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{source}: {name} holds {tensor.dtype}, which is not a dtype of weights; give another"
            )
    if unknown := weights.state_dict.keys() - expected.keys():
        raise ValueError(
            f"{source}: has {min(unknown)}, which its architecture does not have; give another"
        )


def _with_dtype_warning(weights: ModelWeights, source: str) -> ModelWeights:
    dtypes = sorted({_dtype_name(tensor.dtype) for tensor in weights.state_dict.values()})
    if len(dtypes) == 1:
        return weights
    line = (
        f"{source}: has weights in {' and '.join(dtypes)}; uses {_dtype_name(stored_dtype(weights))} for all, "
        "unless another dtype is given"
    )
    return replace(weights, warnings=(*weights.warnings, line))


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
