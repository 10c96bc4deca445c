"""Training of a byte-level BPE tokenizer on the texts that ``prepare`` reads."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gpt_lightning.data.prepare.chunk import ReadPosition
from gpt_lightning.data.prepare.encode import texts_of
from gpt_lightning.data.prepare.inputs import find_inputs
from gpt_lightning.data.prepare.readers import read_chunks
from gpt_lightning.data.tokenizer import END_OF_TEXT, Tokenizer
from gpt_lightning.data.tokenizer_json import (
    FILE,
    check_library,
    read_tokenizer,
    train_byte_level,
)
from gpt_lightning.storage.atomic import atomic_output, created_folder

MIN_VOCAB_SIZE = 257  # the bytes and <|endoftext|>


def train_tokenizer(
    inputs: Sequence[str],
    out: Path,
    vocab_size: int,
    *,
    field: str = "text",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tokenizer:
    """Train a vocabulary on all documents of the inputs, and write ``out/tokenizer.json``.

    The same documents give the same file.

    Args:
        field: Field of JSON objects and tables that has the text.
        on_progress: Called with the bytes that are read, and of how many.

    Returns:
        The tokenizer. It has fewer tokens than ``vocab_size`` if the text has no more pairs to merge.

    Raises:
        ValueError, OSError: An input cannot be read or has no text, ``out`` has a tokenizer, ``vocab_size`` is out
            of range, or the package ``tokenizers`` is not installed.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size: {vocab_size} is too small; give {MIN_VOCAB_SIZE} or more: the 256 bytes and {END_OF_TEXT}"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is not a folder; give another --out")
    if (out / FILE).exists():
        raise FileExistsError(f"out: {out / FILE} exists; give another --out")
    check_library("train-tokenizer")
    sources = find_inputs(inputs)
    total = sum(source.bytes for source in sources)
    empty = True

    def texts() -> Iterator[str]:
        nonlocal empty
        for chunk in read_chunks(sources, ReadPosition(), field=field, val_ratio=0.0):
            on_progress(chunk.done, total)
            for text in texts_of(chunk, field):
                empty = empty and not text.strip()
                yield text

    file = train_byte_level(texts(), vocab_size)
    if empty:
        raise ValueError(f"{sources[0].path}: holds no document with text; give more")
    with created_folder(out), atomic_output(out / FILE) as temporary:
        temporary.write_bytes(file)
    return read_tokenizer(out / FILE)
