"""Weights written to files: the model of a program, or a source in another format."""

import glob
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import psutil
from safetensors import SafetensorError

from gpt_lightning.data.tokenizer import GPT2, VOCAB_SIZE, Tokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.pretrained.add_tokens import InitAdded, add_tokens
from gpt_lightning.pretrained.average import average_weights
from gpt_lightning.pretrained.book import write_book
from gpt_lightning.pretrained.downloaded import find_downloaded
from gpt_lightning.pretrained.gguf import OutType, check_library, write_gguf
from gpt_lightning.pretrained.huggingface import write_huggingface
from gpt_lightning.pretrained.openai import write_openai
from gpt_lightning.pretrained.source import (
    check_heads,
    check_shapes,
    check_tokenizer,
    find_checkpoint,
    print_warnings,
    read_weights,
    size_to_download,
    with_ema,
)
from gpt_lightning.pretrained.weights import (
    POSITION_EMBEDDING,
    ModelWeights,
    to_one_dtype,
    unwrap_names,
    write_lightning,
)
from gpt_lightning.storage.atomic import atomic_output, remove
from gpt_lightning.storage.checksum import write_manifest
from gpt_lightning.suggestions import suggest

logger = logging.getLogger(__name__)

WeightFormat = Literal["hf", "openai-tf", "lightning", "book", "gguf"]
_WRITERS = {
    "hf": write_huggingface,
    "openai-tf": write_openai,
    "lightning": write_lightning,
    "book": write_book,
}
# the formats that can hold another tokenizer than GPT-2's
_WITH_TOKENIZER = ("hf", "lightning", "gguf")
_NO_DROPOUT = ("openai-tf", "gguf")  # the formats that do not hold the dropout rate
# the formats that are one file
_SUFFIXES = {"lightning": ".ckpt", "book": ".pth", "gguf": ".gguf"}


def convert(
    source: str,
    dest: Path,
    weight_format: WeightFormat,
    *,
    n_heads: int | None = None,
    ema: bool = False,
    average_with: Sequence[str] = (),
    added_tokens: Sequence[str] = (),
    init_added: InitAdded = "mean",
    outtype: OutType | None = None,
) -> None:
    """Write ``dest``: a folder for 'hf' and 'openai-tf', a file for 'lightning', 'book' and 'gguf'.

    Either all of ``dest`` is written or nothing. It contains the optimizer's moments if both formats can hold
    them. 'hf', 'lightning' and 'gguf' hold the tokenizer. A model whose tokenizer cannot be read is converted only
    if its vocabulary is smaller than GPT-2's, because every format but 'gguf' shows that.

    Args:
        weight_format: The format of ``dest``.
        n_heads: For a ``source`` written by the book's own code, which does not contain it.
        ema: Whether to write the exponential moving averages of the weights, see :func:`with_ema`.
        average_with: Further sources; ``dest`` gets the mean of all weights, see :func:`average_weights`.
        added_tokens: New tokens, see :func:`add_tokens`, which takes ``init_added`` too.
        outtype: The type of the matrices in a 'gguf' file; ``None``: 'f16'.

    Raises:
        ValueError: ``source`` cannot be read, or cannot be written in this format, or a token cannot be added.
        OSError: ``dest`` exists, or cannot be written, or a package is not installed.
    """
    _check_dest(dest, weight_format)
    _check_outtype(outtype, weight_format)
    models = {name: read_weights(name, n_heads=n_heads) for name in (source, *average_with)}
    for name, model in models.items():
        check_heads(model, name, n_heads)
    if average_with:
        _check_distinct(list(models))
    if ema:
        models = {name: with_ema(model, name) for name, model in models.items()}
    weights = average_weights(models) if average_with else models[source]
    if weights.other_tokenizer is not None and weights.config.vocab_size >= VOCAB_SIZE:
        raise ValueError(
            f"{source}: has another tokenizer than GPT-2's: {weights.other_tokenizer}; convert does not write "
            "it, so text would be encoded with GPT-2's; give a model with GPT-2's tokenizer"
        )
    if weight_format == "gguf":
        check_tokenizer(weights, source)
    if added_tokens:
        check_tokenizer(weights, source)
        if weight_format not in _WITH_TOKENIZER:
            raise ValueError(
                f"add_tokens: the format {weight_format} cannot hold tokens; give "
                f"--format {_any_of(_WITH_TOKENIZER)}"
            )
        weights = add_tokens(weights, added_tokens, init_added)
    if weights.tokenizer is not GPT2 and weight_format not in _WITH_TOKENIZER:
        raise ValueError(
            f"format: {weight_format} cannot hold the tokenizer of {source}, {weights.tokenizer}; give "
            f"{_any_of(_WITH_TOKENIZER)}"
        )
    _write(weights, dest, weight_format, outtype)
    print_warnings(weights)
    if "drop_rate" in weights.assumed and weight_format not in _NO_DROPOUT:
        rate = weights.config.drop_rate
        logger.warning(f"{source}: does not contain its dropout rate; writes {rate}")


def save_model(
    model: GPTModel,
    path: str | os.PathLike[str],
    format: WeightFormat = "hf",  # noqa: A002 — the name of convert's option
    *,
    tokenizer: Tokenizer = GPT2,
    outtype: OutType | None = None,
) -> None:
    """Write a model to ``path``, which :func:`load_model` and the commands read.

    Either all of it is written or nothing. The format 'lightning' is for ``init_from``; only ``fit`` writes
    checkpoints that can be resumed.

    Args:
        model: It may be compiled, and on any device.
        path: A new folder for 'hf' and 'openai-tf', a new file for 'lightning' (.ckpt), 'book' (.pth) and
            'gguf' (.gguf).
        format: As ``convert --format``. 'hf' is for Hugging Face's ``from_pretrained``, 'gguf' for llama.cpp.
        tokenizer: The model's, for 'hf', 'lightning' and 'gguf', see :func:`load_tokenizer`.
        outtype: As ``convert --outtype``.

    Raises:
        ValueError: The model is not a GPTModel, or has other layers than a GPTModel.
        OSError: ``path`` exists, or cannot be written, or a package is not installed.
    """
    if format not in get_args(WeightFormat):
        raise ValueError(f"format: {format} is unknown; {suggest(format, get_args(WeightFormat))}")
    dest = Path(path).expanduser()
    _check_dest(dest, format)
    _check_outtype(outtype, format)
    _write(replace(_weights_of(model), tokenizer=tokenizer), dest, format, outtype)


def _weights_of(model: GPTModel) -> ModelWeights:
    """The weights of a model in memory; ``ValueError`` if it is not a GPTModel with the layers of its config."""
    config = getattr(model, "config", None)
    if not isinstance(config, GPTConfig):
        raise ValueError(
            f"model: {type(model).__name__} is not a GPTModel; give the GPTModel in it"
        )
    state_dict = model.state_dict()
    names = unwrap_names(state_dict, POSITION_EMBEDDING, Path("model"))
    tensors = {ours: state_dict[name].cpu() for ours, name in names.items()}
    weights = ModelWeights(config, tensors)
    check_shapes(weights, "model", "save a model with other layers by torch.save")
    return weights


def _check_dest(dest: Path, weight_format: WeightFormat) -> None:
    if os.path.lexists(dest):
        raise FileExistsError(f"dest: {dest} exists; give a new name")
    if not dest.parent.is_dir():
        raise FileNotFoundError(f"dest: {dest.parent} is not a folder; create it first")
    suffix = _SUFFIXES.get(weight_format)
    if suffix is not None and dest.suffix != suffix:
        raise ValueError(
            f"dest: {dest} is one file in the format {weight_format}; call it {dest}{suffix}"
        )


def _check_outtype(outtype: str | None, weight_format: WeightFormat) -> None:
    if weight_format == "gguf":
        check_library()
    elif outtype is not None:
        raise ValueError(f"outtype: is for the format gguf, not for {weight_format}; leave it out")
    if outtype is not None and outtype not in get_args(OutType):
        raise ValueError(f"outtype: {outtype} is unknown; {suggest(outtype, get_args(OutType))}")


def _any_of(formats: Sequence[str]) -> str:
    return f"{', '.join(formats[:-1])} or {formats[-1]}"


def _check_distinct(sources: Sequence[str]) -> None:
    """Raise ``ValueError`` if two sources are one file, which would count twice; last.ckpt and best.ckpt may be."""
    paths = {source: _path_of(source) for source in sources}
    for (first, path), (second, other) in combinations(paths.items(), 2):
        if path.samefile(other):
            raise ValueError(f"average: {first} and {second} are one file; give it once")


def _path_of(source: str) -> Path:
    """The file or folder of a source."""
    if (size := size_to_download(source)) is not None:
        return find_downloaded(size)
    try:
        return find_checkpoint(source)
    except FileNotFoundError:  # a folder of Hugging Face or OpenAI
        return Path(os.path.expanduser(source))


def _write(
    weights: ModelWeights, dest: Path, weight_format: WeightFormat, outtype: OutType | None
) -> None:
    with _new_output(dest) as temporary:
        if weight_format == "gguf":
            write_gguf(weights, temporary, outtype or "f16", name=dest.stem)
            return
        is_folder = weight_format not in _SUFFIXES
        if is_folder:
            temporary.mkdir()
        _WRITERS[weight_format](to_one_dtype(weights), temporary)
        if is_folder:
            write_manifest(temporary, [path.name for path in temporary.iterdir()])


@contextmanager
def _new_output(dest: Path) -> Iterator[Path]:
    """Temporary path that becomes ``dest``, by :func:`atomic_output`, with errors that name ``dest``."""
    for leftover in dest.parent.glob(f".{glob.escape(dest.name)}.*.tmp"):
        pid = leftover.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            remove(leftover)  # of a conversion that was killed
    try:
        with atomic_output(dest, concurrent=True, overwrite=False) as temporary:
            yield temporary
    except FileExistsError as error:
        raise FileExistsError(f"dest: {dest} exists by now; give a new name") from error
    # a full disk may show in an error of torch or safetensors
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"dest: {dest} cannot be written ({error}); is the disk full?") from error
