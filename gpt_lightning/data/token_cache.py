"""Turns ``data.text`` into token ids: opens a token store, or tokenizes a text and caches the ids if it is long."""

import hashlib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.corpus import read_corpus, text_files
from gpt_lightning.data.token_store import (
    SPLITS,
    TOKENIZER,
    StoreWriter,
    is_store,
    open_store,
    read_manifest,
)
from gpt_lightning.data.tokenizer import encode_corpus
from gpt_lightning.storage.atomic import atomic_output, remove
from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.storage.checksum import cached_sha256, sha256_of

logger = logging.getLogger(__name__)

MIN_CACHED_BYTES = 1_000_000  # of text: a tenth of a second to tokenize
LONG_TEXT_BYTES = 500_000_000  # a minute to tokenize, in five times as much memory
_SHARD_TOKENS = 1 << 40  # one shard: the text was in memory
_READER = "2"  # grows when the same bytes are read as another text: see decode_text


class Splits(NamedTuple):
    """Token ids, each split as arrays that follow one another."""

    training: list[NDArray[np.uint16]]
    validation: list[NDArray[np.uint16]]


def read_splits(text: str, train_ratio: float) -> Splits:
    """What ``data.text`` names: a text's first ``train_ratio`` of characters for training, the rest for validation.

    A token store is split already; a warning says so if it was split by another ratio.

    A text of a megabyte or more is tokenized once, into a store in the cache, under the checksums of its content
    and the vocabulary. A damaged store is written again, with a warning; if it cannot be written, the tokens
    stay in memory.

    Raises:
        ValueError, OSError: As :func:`read_corpus` and :func:`open_store`.
    """
    path = Path(os.path.expanduser(text))
    if text in ("verdict", "sample"):
        return _in_memory(text, train_ratio)
    if is_store(path):
        prepared = Splits(*open_store(path).values())
        _warn_of_other_ratio(path, train_ratio)
        return prepared
    folder = _cached_store(path, train_ratio)
    if folder is None:
        return _in_memory(text, train_ratio)
    if folder.exists():
        try:
            return Splits(*open_store(folder).values())
        except (ValueError, OSError):
            logger.warning(f"{folder}: is damaged; tokenizing again")
            with suppress(OSError):
                remove(folder)
    _warn_if_long(path)
    splits = _in_memory(text, train_ratio)
    with suppress(OSError, ValueError):
        _write(splits, folder)
        return Splits(*open_store(folder).values())
    return splits


def count_training_tokens(text: str, train_ratio: float) -> int:
    """Number of training tokens of :func:`read_splits`, from the manifest if it is a store.

    Nothing is written, so a long text that is not in the cache is tokenized each time.

    Raises:
        ValueError, OSError: As :func:`read_splits`, except that the shards of a store are not checked.
    """
    path = Path(os.path.expanduser(text))
    if text not in ("verdict", "sample"):
        if is_store(path):
            _warn_of_other_ratio(path, train_ratio)
            return _training_tokens(path)
        folder = _cached_store(path, train_ratio, sha256_of)
        if folder is not None and folder.exists():
            with suppress(ValueError, OSError):  # a damaged store: fit writes it again
                return _training_tokens(folder)
    return len(_tokenize(text, _split(text, train_ratio)[0]))


def _training_tokens(store: Path) -> int:
    return sum(int(shard["tokens"]) for shard in read_manifest(store)["shards"]["train"])


def _split(text: str, train_ratio: float) -> tuple[str, str]:
    characters = read_corpus(text)
    split = int(train_ratio * len(characters))
    return characters[:split], characters[split:]


def _in_memory(text: str, train_ratio: float) -> Splits:
    training, validation = _split(text, train_ratio)
    return Splits([_tokenize(text, training)], [_tokenize(text, validation)])


def _tokenize(name: str, part: str) -> NDArray[np.uint16]:
    try:
        return encode_corpus(part)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@cache
def _warn_of_other_ratio(path: Path, train_ratio: float) -> None:
    settings = read_manifest(path)["settings"]
    store_ratio = 1 - settings["val_ratio"]
    if abs(store_ratio - train_ratio) > 1e-6:
        logger.warning(
            f"data.train_ratio: {train_ratio} has no effect on {path}, of which prepare "
            f"put {store_ratio:g} into training"
        )


def _warn_if_long(path: Path) -> None:
    size = sum(file.stat().st_size for file in text_files(path))
    if size >= LONG_TEXT_BYTES:
        logger.warning(
            f"data.text: {path} is {size / 1e9:.1f} GB, tokenized in memory by one processor; "
            "the command prepare needs little memory and uses all processors"
        )


# --- the cache ------------------------------------------------------------------------------------


def _cached_store(
    path: Path, train_ratio: float, sha256: Callable[[Path], str] = cached_sha256
) -> Path | None:
    """Folder of the tokens of a long text in the cache. ``None``: the text is short, or does not exist."""
    try:
        files = text_files(path)
        if sum(file.stat().st_size for file in files) < MIN_CACHED_BYTES:
            return None
        checksums = [sha256(file) for file in files]
    except OSError:  # reading it says why
        return None
    parts = [_READER, *TOKENIZER.values(), repr(train_ratio), *checksums]
    return cache_folder() / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(splits: Splits, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder, concurrent=True, overwrite=False) as temporary:
        temporary.mkdir()
        writer = StoreWriter(temporary, _SHARD_TOKENS, {"settings": {}, "sources": []})
        for name, (tokens,) in zip(SPLITS, splits, strict=True):
            writer.append(name, tokens)
        writer.finish()
