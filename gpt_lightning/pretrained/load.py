"""SOURCE, wherever a command takes one, to weights."""

import logging
import os
from dataclasses import replace
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

import torch

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.model.config import GPT2_NAMES, GPT2_SIZES, gpt2_size
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.book import is_book, read_book
from gpt_lightning.pretrained.download import find_downloaded
from gpt_lightning.pretrained.huggingface import is_huggingface, read_huggingface
from gpt_lightning.pretrained.nanogpt import is_nanogpt, read_nanogpt
from gpt_lightning.pretrained.openai import is_openai, read_openai
from gpt_lightning.pretrained.weights import (
    ModelWeights,
    check_records,
    is_lightning,
    read_lightning,
    read_torch,
    release_tensors,
    stored_dtype,
    take_weights,
)
from gpt_lightning.storage.checksum import check_manifest

logger = logging.getLogger(__name__)

_LOOKED_FOR = (
    "last.ckpt or best.ckpt (a run), config.json with model.safetensors (Hugging Face), "
    "hparams.json with model.ckpt.index (OpenAI)"
)


_SUFFIXES = (".ckpt", ".pth", ".pt", ".safetensors")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def find_checkpoint(source: str) -> Path:
    """A checkpoint file: itself, ``last`` or ``best`` of a run's folder, or of a folder its ``last``.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(os.path.expanduser(source)).resolve()
    candidates = [path, path.with_name(path.name + ".ckpt"), path / "last.ckpt", path / "best.ckpt"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if path.is_dir():
        size = gpt2_size(source)
        remedy = f", or {size} for the downloaded weights" if size not in (None, source) else ""
        raise FileNotFoundError(f"{source}: holds none of {_LOOKED_FOR}; give another{remedy}")
    near = _nearest(source)
    other = f"give a file, a folder or one of {', '.join(GPT2_SIZES)}"
    remedy = f"did you mean {near}?" if near else other
    raise FileNotFoundError(f"{source}: does not exist; {remedy}")


def _nearest(source: str) -> str | None:
    """The public name, the path or the run in ``checkpoints`` that is spelled most like ``source``."""
    known = {name.lower(): name for name in GPT2_NAMES}
    if (path := _nearest_path(Path(os.path.expanduser(source)))) is not None:
        known[str(path).lower()] = str(path)
    known |= {run.name.lower(): str(run) for run in _children(Path("checkpoints"))}
    near = get_close_matches(source.lower(), known, n=1)
    return known[near[0]] if near else None


def _nearest_path(path: Path) -> Path | None:
    """``path`` with each part that does not exist replaced by the nearest one that does."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not (found / part).exists() and not (found / f"{part}.ckpt").is_file():
            near = get_close_matches(part, [child.name for child in _children(found)], n=1)
            if not near:
                return None
            part = near[0]
        found /= part
    return found


def _children(folder: Path) -> list[Path]:
    """Folders and files of weights in ``folder``, 1,000 at most."""
    try:
        children = list(islice(folder.iterdir(), 1000))
    except OSError:
        return []
    return [c for c in children if c.suffix in _SUFFIXES or c.is_dir()]


def read_source(source: str, *, n_heads: int | None = None) -> ModelWeights:
    """Weights and architecture of what ``source`` names, whatever its form, checked for being whole.

    The form is told by what is there: a folder by its files, a file by what it holds. A public name of
    GPT-2 (:func:`gpt2_size`) that is no path is what the download command has fetched.

    Args:
        n_heads: For a file of the book's own code, which does not hold it.

    Raises:
        ValueError: It is none of the forms, damaged, or contradicts itself.
        OSError: There is no such file, or it cannot be read.
    """
    located = _located(source)
    path = Path(os.path.expanduser(located))
    try:
        if is_huggingface(path):
            check_manifest(path)
            found = read_huggingface(path)
        elif is_openai(path):
            check_manifest(path)
            found = read_openai(path)
        else:
            found = _read_file(find_checkpoint(located), n_heads)
        _check(found, source)
        found = _with_dtype_warning(found, source)
    # what a content of another kind than its form has may run into: a number for a name, a scalar for a
    # matrix, a size beyond all memory
    except (RuntimeError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        brief = " ".join(str(error).split())[:120]
        raise ValueError(f"{source}: is damaged or contradicts itself ({brief})") from error
    if found.other_tokenizer is None and found.config.vocab_size < VOCAB_SIZE:
        cause = f"its vocabulary has {found.config.vocab_size} tokens"
        found = replace(found, other_tokenizer=cause)
    return found


def check_tokenizer(found: ModelWeights, source: str) -> None:
    """``ValueError`` where text for this model cannot be encoded with GPT-2's tokenizer."""
    if found.other_tokenizer is not None:
        raise ValueError(
            f"{source}: has another tokenizer than GPT-2's: {found.other_tokenizer}; give a model "
            "with GPT-2's tokenizer"
        )


def check_heads(found: ModelWeights, source: str, n_heads: int | None) -> None:
    """``ValueError`` where ``n_heads`` is given and contradicts ``source``."""
    if n_heads not in (None, found.config.n_heads):
        raise ValueError(
            f"n_heads: {source} has {found.config.n_heads}, not {n_heads}; leave it out"
        )


def print_warnings(found: ModelWeights) -> None:
    for line in found.warnings:
        logger.warning(f"{line}")


def load_model(
    source: str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    n_heads: int | None = None,
    for_text: bool = False,
) -> GPTModel:
    """The model that ``source`` names, in eval mode; for arguments and errors see :func:`read_source`.

    Args:
        for_text: Whether a model whose tokenizer is not GPT-2's is refused; else there is a warning.
    """
    found = read_source(source, n_heads=n_heads)
    check_heads(found, source, n_heads)
    if for_text:
        check_tokenizer(found, source)
    elif found.other_tokenizer is not None:
        line = f"{source}: has another tokenizer than GPT-2's: {found.other_tokenizer}"
        found = replace(found, warnings=(*found.warnings, line))
    print_warnings(found)
    return build_model(replace(found, optimizer_state=None), device=device, dtype=dtype)


def build_model(
    found: ModelWeights,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GPTModel:
    """The model of weights that were read, in eval mode. It takes them over, ``found`` is left without."""
    with torch.device("meta"):
        model = GPTModel(found.config)
    model.load_state_dict(take_weights(found, dtype), assign=True)
    return model.to(device=device).eval()


def weight_files(source: str) -> list[Path]:
    """The files in which the weights of ``source`` lie; errors as :func:`read_source`."""
    located = _located(source)
    path = Path(os.path.expanduser(located))
    if is_huggingface(path):
        return sorted(path.glob("*.safetensors"))
    if is_openai(path):
        return sorted(path.glob("model.ckpt.*"))
    return [find_checkpoint(located)]


def size_to_download(source: str) -> str | None:
    """The size of GPT-2 that ``source`` names; None where it names none, or there is such a path."""
    path = Path(os.path.expanduser(source))
    if path.exists() or path.with_name(path.name + ".ckpt").is_file():
        return None
    return gpt2_size(source)


def _located(source: str) -> str:
    """The file or folder; a folder also where one of its files is named."""
    if (size := size_to_download(source)) is not None:
        return str(find_downloaded(size))
    path = Path(source)
    if path.name in ("config.json", "model.safetensors", "hparams.json", "model.ckpt.index"):
        return str(path.parent)
    return source


def _read_file(path: Path, n_heads: int | None) -> ModelWeights:
    check_records(path)
    content = read_torch(path)
    if is_lightning(content):
        found = read_lightning(content, path)
    elif is_book(content):
        found = read_book(content, path, n_heads)
    elif is_nanogpt(content):
        found = read_nanogpt(content, path)
    else:
        raise ValueError(
            f"{path}: is no checkpoint of gpt_lightning, nor the book's model.pth or "
            "model_and_optimizer.pth, nor nanoGPT's ckpt.pt; give another"
        )
    let_go = release_tensors(content)
    let_go()
    return replace(found, let_go=let_go)


def _check(found: ModelWeights, source: str) -> None:
    """Names and shapes against the architecture, on the meta device: nothing is copied."""
    blocks = {name.split(".")[1] for name in found.state_dict if name.startswith("trf_blocks.")}
    if len(blocks) != found.config.n_layers:  # before that many are built
        raise ValueError(
            f"{source}: has {len(blocks)} blocks, its architecture says {found.config.n_layers}"
        )
    with torch.device("meta"):
        expected = GPTModel(found.config).state_dict()
    for name, tensor in expected.items():
        own = found.state_dict.get(name)
        if own is None:
            raise ValueError(f"{source}: has no {name}, which its architecture calls for")
        if own.shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} is {tuple(own.shape)}, its architecture says "
                f"{tuple(tensor.shape)}; give a whole copy"
            )
        if own.dtype not in _DTYPES:
            raise ValueError(f"{source}: {name} holds {own.dtype}, no weights; give another")
    if unknown := found.state_dict.keys() - expected.keys():
        raise ValueError(f"{source}: has {min(unknown)}, which is no part of its architecture")


def _with_dtype_warning(found: ModelWeights, source: str) -> ModelWeights:
    dtypes = sorted({_name(tensor.dtype) for tensor in found.state_dict.values()})
    if len(dtypes) == 1:
        return found
    line = (
        f"{source}: has weights in {' and '.join(dtypes)}; {_name(stored_dtype(found))} is used for all, "
        "where no other dtype is asked for"
    )
    return replace(found, warnings=(*found.warnings, line))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
