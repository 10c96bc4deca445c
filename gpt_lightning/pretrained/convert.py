"""SOURCE in one form to DEST in another."""

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
from gpt_lightning.pretrained.load import check_heads, print_warnings, read_source
from gpt_lightning.pretrained.openai import write_openai
from gpt_lightning.pretrained.weights import in_one_dtype, write_lightning
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
_SUFFIXES = {"lightning": ".ckpt", "book": ".pth"}  # the forms that are one file


def convert(source: str, dest: Path, form: WeightFormat, *, n_heads: int | None = None) -> None:
    """Write ``dest``, a folder for 'hf' and 'openai-tf' and a file for 'lightning' and 'book'.

    It is written under a hidden name beside it and renamed when it is whole. Optimizer moments go along
    where both forms have them. A model with another tokenizer than GPT-2's is converted where its vocabulary
    is smaller, since that is seen in each form; the tokenizer stays behind.

    Raises:
        ValueError: ``source`` cannot be read, or not be written in that form.
        OSError: ``dest`` exists, or cannot be written.
    """
    if os.path.lexists(dest):
        raise FileExistsError(f"dest: {dest} exists; give a new name")
    if not dest.parent.is_dir():
        raise FileNotFoundError(f"dest: {dest.parent} is no folder; make it first")
    suffix = _SUFFIXES.get(form)
    if suffix is not None and dest.suffix != suffix:
        raise ValueError(f"dest: {dest} is one file in the form {form}; call it {dest}{suffix}")
    found = read_source(source, n_heads=n_heads)
    check_heads(found, source, n_heads)
    if found.other_tokenizer is not None and found.config.vocab_size >= VOCAB_SIZE:
        raise ValueError(
            f"{source}: has another tokenizer than GPT-2's: {found.other_tokenizer}; no form that is written here "
            "holds it, so text would be read with GPT-2's; give a model with GPT-2's tokenizer"
        )
    found = in_one_dtype(found)
    with _new_output(dest) as temporary:
        if suffix is None:
            temporary.mkdir()
        _WRITERS[form](found, temporary)
        if suffix is None:
            write_manifest(temporary, [path.name for path in temporary.iterdir()])
    print_warnings(found)
    if "drop_rate" in found.assumed and form != "openai-tf":
        rate = found.config.drop_rate
        logger.warning(f"{source}: does not hold its dropout; {rate} is written")


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
