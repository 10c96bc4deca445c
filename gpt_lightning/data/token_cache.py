"""Turns ``data.text`` into token ids: opens a token store, or tokenizes a text and caches the ids if it is long."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from gpt_lightning.data.corpus import read_corpus, text_files
from gpt_lightning.data.token_store import (
    SPLITS,
    StoreWriter,
    is_store,
    open_store,
    read_manifest,
    store_tokenizer,
)
from gpt_lightning.data.tokenizer import GPT2, Ids, Tokenizer
from gpt_lightning.data.tokenizer_json import read_tokenizer
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

    training: list[Ids]
    validation: list[Ids]


def find_tokenizer(
    given: str | None, texts: Sequence[str], model: Tokenizer | None = None
) -> Tokenizer:
    """The tokenizer of a run: the model's, or ``given`` as ``data.tokenizer``, or that of a token store, or GPT-2's.

    Args:
        texts: What ``data.text`` or ``data.mixture`` names.
        model: The tokenizer of the weights that the run starts from. ``None``: it starts from random weights.

    Raises:
        ValueError: Two of them differ, or one cannot be read.
        OSError: There is no such file, or the package ``tokenizers`` is not installed.
    """
    found = [] if model is None else [("the model's", model)]
    if given is not None:
        path = Path(os.path.expanduser(given))
        tokenizer = GPT2 if given == GPT2.name and not path.exists() else read_tokenizer(path)
        found.append((f"data.tokenizer {given}", tokenizer))
    for text in texts:
        path = Path(os.path.expanduser(text))
        if text not in ("verdict", "sample") and is_store(path):
            found.append((f"the token store {text}", store_tokenizer(path)))
    for what, tokenizer in found[1:]:
        first, expected = found[0]
        if not tokenizer.equals(expected):
            raise ValueError(
                f"data.tokenizer: {what} is {tokenizer}, {first} is {expected}; give data and a model of the same "
                "tokenizer"
            )
    return found[0][1] if found else GPT2


def read_splits(text: str, train_ratio: float, tokenizer: Tokenizer = GPT2) -> Splits:
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
        return _in_memory(text, train_ratio, tokenizer)
    if is_store(path):
        prepared = Splits(*open_store(path, tokenizer).values())
        _warn_of_other_ratio(path, train_ratio)
        return prepared
    folder = _cached_store(path, train_ratio, tokenizer)
    if folder is None:
        return _in_memory(text, train_ratio, tokenizer)
    if folder.exists():
        try:
            return Splits(*open_store(folder, tokenizer).values())
        except (ValueError, OSError):
            logger.warning(f"{folder}: is damaged; tokenizing again")
            with suppress(OSError):
                remove(folder)
    _warn_if_long(path)
    splits = _in_memory(text, train_ratio, tokenizer)
    with suppress(OSError, ValueError):
        _write(splits, folder, tokenizer)
        return Splits(*open_store(folder, tokenizer).values())
    return splits


def count_training_tokens(text: str, train_ratio: float, tokenizer: Tokenizer = GPT2) -> int:
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
        folder = _cached_store(path, train_ratio, tokenizer, sha256_of)
        if folder is not None and folder.exists():
            with suppress(ValueError, OSError):  # a damaged store: fit writes it again
                return _training_tokens(folder)
    return len(_tokenize(text, _split(text, train_ratio)[0], tokenizer))


def _training_tokens(store: Path) -> int:
    return sum(int(shard["tokens"]) for shard in read_manifest(store)["shards"]["train"])


def _split(text: str, train_ratio: float) -> tuple[str, str]:
    characters = read_corpus(text)
    split = int(train_ratio * len(characters))
    return characters[:split], characters[split:]


def _in_memory(text: str, train_ratio: float, tokenizer: Tokenizer) -> Splits:
    training, validation = _split(text, train_ratio)
    return Splits([_tokenize(text, training, tokenizer)], [_tokenize(text, validation, tokenizer)])


def _tokenize(name: str, part: str, tokenizer: Tokenizer) -> Ids:
    try:
        return tokenizer.encode_corpus(part)
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
    path: Path,
    train_ratio: float,
    tokenizer: Tokenizer,
    sha256: Callable[[Path], str] = cached_sha256,
) -> Path | None:
    """Folder of the tokens of a long text in the cache. ``None``: the text is short, or does not exist."""
    try:
        files = text_files(path)
        if sum(file.stat().st_size for file in files) < MIN_CACHED_BYTES:
            return None
        checksums = [sha256(file) for file in files]
    except OSError:  # reading it says why
        return None
    parts = [_READER, *tokenizer.record.values(), repr(train_ratio), *checksums]
    return cache_folder() / "tokens" / hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write(splits: Splits, folder: Path, tokenizer: Tokenizer) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_output(folder, concurrent=True, overwrite=False) as temporary:
        temporary.mkdir()
        writer = StoreWriter(temporary, _SHARD_TOKENS, {"settings": {}, "sources": []}, tokenizer)
        for name, (tokens,) in zip(SPLITS, splits, strict=True):
            writer.append(name, tokens)
        writer.finish()
