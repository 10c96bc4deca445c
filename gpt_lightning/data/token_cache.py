"""What ``data.text`` names, as token ids: a prepared store, or a text, which if long is one in the cache."""

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

MIN_CACHED_BYTES = 1_000_000  # bytes of text, a tenth of a second to tokenise
LONG_TEXT_BYTES = 500_000_000  # a minute, and five times as much memory
_SHARD_TOKENS = 1 << 40  # a text of this length was in memory
_READER = "2"  # changes where the same bytes are read as another text: see decode_text


class Splits(NamedTuple):
    """Token ids, each split as arrays that follow one another."""

    training: list[NDArray[np.uint16]]
    validation: list[NDArray[np.uint16]]


def read_splits(text: str, train_ratio: float) -> Splits:
    """What ``data.text`` names: a text's first ``train_ratio`` of characters for training, the rest for validation.

    What ``prepare`` has written is split already; said once where it was in another ratio.

    A text of a megabyte or more is tokenised once, into a store in the cache under the sums of its content
    and the vocabulary. One that is damaged is said to be, and made again; without room for one the tokens
    are in memory.

    Raises:
        ValueError, OSError: As :func:`read_corpus` and :func:`open_store`.
    """
    path = Path(os.path.expanduser(text))
    if text in ("verdict", "sample"):
        return _in_memory(text, train_ratio)
    if is_store(path):
        prepared = Splits(*open_store(path).values())
        _say_if_other_ratio(path, train_ratio)
        return prepared
    folder = _kept(path, train_ratio)
    if folder is None:
        return _in_memory(text, train_ratio)
    if folder.exists():
        try:
            return Splits(*open_store(folder).values())
        except (ValueError, OSError):
            logger.warning(f"{folder}: is damaged; tokenising anew")
            with suppress(OSError):
                remove(folder)
    _say_if_long(path)
    splits = _in_memory(text, train_ratio)
    with suppress(OSError, ValueError):
        _keep(splits, folder)
        return Splits(*open_store(folder).values())
    return splits


def count_training_tokens(text: str, train_ratio: float) -> int:
    """How many :func:`read_splits` gives for training, by a store's manifest where there is one; writes nothing.

    So a long text that is not in the cache is tokenised for it each time.

    Raises:
        ValueError, OSError: As :func:`read_splits`, but that a store's shards are not looked at.
    """
    path = Path(os.path.expanduser(text))
    if text not in ("verdict", "sample"):
        if is_store(path):
            _say_if_other_ratio(path, train_ratio)
            return _training_tokens(path)
        folder = _kept(path, train_ratio, sha256_of)
        if folder is not None and folder.exists():
            with suppress(ValueError, OSError):  # a damaged one: whoever trains makes it again
                return _training_tokens(folder)
    return len(_tokenised(text, _split(text, train_ratio)[0]))


def _training_tokens(store: Path) -> int:
    return sum(int(shard["tokens"]) for shard in read_manifest(store)["shards"]["train"])


def _split(text: str, train_ratio: float) -> tuple[str, str]:
    characters = read_corpus(text)
    split = int(train_ratio * len(characters))
    return characters[:split], characters[split:]


def _in_memory(text: str, train_ratio: float) -> Splits:
    training, validation = _split(text, train_ratio)
    return Splits([_tokenised(text, training)], [_tokenised(text, validation)])


def _tokenised(name: str, part: str) -> NDArray[np.uint16]:
    try:
        return encode_corpus(part)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@cache
def _say_if_other_ratio(path: Path, train_ratio: float) -> None:
    settings = read_manifest(path)["settings"]
    own = 1 - settings["val_ratio"]
    if abs(own - train_ratio) > 1e-6:
        logger.warning(
            f"data.train_ratio: {train_ratio} has no effect on {path}, of which prepare "
            f"put {own:g} into training"
        )


def _say_if_long(path: Path) -> None:
    size = sum(file.stat().st_size for file in text_files(path))
    if size >= LONG_TEXT_BYTES:
        logger.warning(
            f"data.text: {path} is {size / 1e9:.1f} GB, tokenised in memory and by one processor; "
            "the command prepare does it in little memory and by all"
        )


# --- the cache ------------------------------------------------------------------------------------


def _kept(
    path: Path, train_ratio: float, sha256: Callable[[Path], str] = cached_sha256
) -> Path | None:
    """Where the tokens of a long text are kept; none: it is short, or not there."""
    try:
        files = text_files(path)
        if sum(file.stat().st_size for file in files) < MIN_CACHED_BYTES:
            return None
        sums = [sha256(file) for file in files]
    except OSError:  # whoever reads it says why
        return None
    parts = [_READER, *TOKENIZER.values(), repr(train_ratio), *sums]
    return cache_folder() / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _keep(splits: Splits, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder, concurrent=True, overwrite=False) as temporary:
        temporary.mkdir()
        writer = StoreWriter(temporary, _SHARD_TOKENS, {"settings": {}, "sources": []})
        for name, (tokens,) in zip(SPLITS, splits, strict=True):
            writer.append(name, tokens)
        writer.finish()
