"""Conversion of weights from one format to another."""

import glob
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import psutil
from safetensors import SafetensorError

from gpt_lightning.data.tokenizer import VOCAB_SIZE
from gpt_lightning.pretrained.book import write_book
from gpt_lightning.pretrained.huggingface import write_huggingface
from gpt_lightning.pretrained.load import check_heads, print_warnings, read_weights
from gpt_lightning.pretrained.openai import write_openai
from gpt_lightning.pretrained.weights import to_one_dtype, write_lightning
from gpt_lightning.storage.atomic import atomic_output, remove
from gpt_lightning.storage.checksum import write_manifest

logger = logging.getLogger(__name__)

WeightFormat = Literal["hf", "openai-tf", "lightning", "book"]
_WRITERS = {
    "hf": write_huggingface,
    "openai-tf": write_openai,
    "lightning": write_lightning,
    "book": write_book,
}
_SUFFIXES = {"lightning": ".ckpt", "book": ".pth"}  # the formats that are one file


def convert(
    source: str, dest: Path, weight_format: WeightFormat, *, n_heads: int | None = None
) -> None:
    """Write ``dest``: a folder for 'hf' and 'openai-tf', a file for 'lightning' and 'book'.

    Either all of ``dest`` is written or nothing. It contains the optimizer's moments if both formats can hold
    them. A model whose tokenizer is not GPT-2's is converted only if its vocabulary is smaller, because every
    format shows that; the tokenizer itself is not converted.

    Args:
        weight_format: The format of ``dest``.
        n_heads: For a ``source`` written by the book's own code, which does not contain it.

    Raises:
        ValueError: ``source`` cannot be read, or cannot be written in this format.
        OSError: ``dest`` exists, or cannot be written.
    """
    if os.path.lexists(dest):
        raise FileExistsError(f"dest: {dest} exists; give a new name")
    if not dest.parent.is_dir():
        raise FileNotFoundError(f"dest: {dest.parent} is not a folder; create it first")
    suffix = _SUFFIXES.get(weight_format)
    if suffix is not None and dest.suffix != suffix:
        raise ValueError(
            f"dest: {dest} is one file in the format {weight_format}; call it {dest}{suffix}"
        )
    weights = read_weights(source, n_heads=n_heads)
    check_heads(weights, source, n_heads)
    if weights.other_tokenizer is not None and weights.config.vocab_size >= VOCAB_SIZE:
        raise ValueError(
            f"{source}: has another tokenizer than GPT-2's: {weights.other_tokenizer}; convert does not write "
            "it, so text would be encoded with GPT-2's; give a model with GPT-2's tokenizer"
        )
    weights = to_one_dtype(weights)
    with _new_output(dest) as temporary:
        if suffix is None:
            temporary.mkdir()
        _WRITERS[weight_format](weights, temporary)
        if suffix is None:
            write_manifest(temporary, [path.name for path in temporary.iterdir()])
    print_warnings(weights)
    if "drop_rate" in weights.assumed and weight_format != "openai-tf":
        rate = weights.config.drop_rate
        logger.warning(f"{source}: does not contain its dropout rate; writes {rate}")


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
