"""Token ids on disk: a long text is tokenised once, and memory-mapped from then on."""

import hashlib
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.corpus import cache_folder, read_corpus
from gpt_lightning.data.manifest import MANIFEST, damaged_files, write_manifest
from gpt_lightning.data.tokenizer import VOCABULARY_SHA256, encode_corpus

WORTH_KEEPING = 1_000_000  # bytes of text, a tenth of a second to tokenise
_TOKENS = "tokens.u16"


class Splits(NamedTuple):
    """Token ids, each split as arrays that follow one another."""

    training: list[NDArray[np.uint16]]
    validation: list[NDArray[np.uint16]]


def read_splits(text: str, train_ratio: float) -> Splits:
    """What ``data.text`` names: the first ``train_ratio`` of its characters for training, the rest for validation.

    Raises:
        ValueError, OSError: As :func:`read_corpus`.
    """
    characters = read_corpus(text)
    split = int(train_ratio * len(characters))
    return Splits([stored_tokens(characters[:split])], [stored_tokens(characters[split:])])


def stored_tokens(text: str) -> NDArray[np.uint16]:
    """:func:`encode_corpus`; of a long text from the cache, under the sums of its content and the vocabulary.

    A store that is damaged is said to be, and made again; without room for one the tokens are in memory.
    """
    content = text.encode()
    if len(content) < WORTH_KEEPING:
        return encode_corpus(text)
    key = hashlib.sha256("".join(VOCABULARY_SHA256.values()).encode() + content).hexdigest()
    folder = cache_folder() / "tokens" / key
    if folder.exists() and not _is_whole(folder):
        print(f"gpt_lightning: {folder}: is damaged; tokenising anew", file=sys.stderr)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    if not folder.exists():
        tokens = encode_corpus(text)
        with suppress(OSError):
            _write(tokens, folder)
        if not folder.exists():
            return tokens
    return np.memmap(folder / _TOKENS, dtype="<u2", mode="r")


def _is_whole(folder: Path) -> bool:
    try:
        return (folder / MANIFEST).exists() and not damaged_files(folder)
    except ValueError:
        return False


def _write(tokens: NDArray[np.uint16], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as scratch:
        written = Path(scratch) / folder.name
        written.mkdir()
        tokens.astype("<u2").tofile(written / _TOKENS)
        write_manifest(written, [_TOKENS])
        written.rename(folder)
