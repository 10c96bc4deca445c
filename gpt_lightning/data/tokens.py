"""Token ids on disk: a long text is tokenised once, and memory-mapped from then on."""

import hashlib
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.corpus import cache_folder
from gpt_lightning.data.manifest import MANIFEST, damaged_files, write_manifest
from gpt_lightning.data.tokenizer import VOCABULARY_SHA256, encode_corpus

WORTH_KEEPING = 1_000_000  # bytes of text, a tenth of a second to tokenise
_TOKENS = "tokens.u16"


def split_tokens(text: str, train_ratio: float) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    """Ids of the training and the validation split: the first ``train_ratio`` of the characters, the rest."""
    split = int(train_ratio * len(text))
    return stored_tokens(text[:split]), stored_tokens(text[split:])


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
