"""Token store: a folder with the token ids of two splits, in little-endian shards, and a manifest.

The ids are uint16, or uint32 if the vocabulary is larger. The manifest names the tokenizer; a store of another
tokenizer than GPT-2's has its ``tokenizer.json``.

``manifest.json`` is written last, so a folder that has one is complete. Until then ``progress.json`` records
how far each split was when a shard was last completed, and where reading the inputs resumes.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpt_lightning.data.tokenizer import GPT2, Ids, Tokenizer
from gpt_lightning.data.tokenizer_json import FILE, tokenizer_from
from gpt_lightning.storage.atomic import atomic_output, temporary_path
from gpt_lightning.storage.checksum import (
    MANIFEST,
    cache_sha256,
    cached_sha256,
    file_state,
    read_self_checksummed,
    wait_for_tick,
    write_self_checksummed,
)

KIND = "gpt_lightning token store 1"
PROGRESS = "progress.json"
SPLITS = ("train", "val")
_SUFFIX = ".bin"
# stores of earlier versions have shards that end in .u16; readers take the names from the manifest
_SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{5,}}(?:\{_SUFFIX}|\.u16)")
_REMEDY = "copy it again, or remove {folder} and prepare it again"


def is_store(folder: Path) -> bool:
    """Whether a folder is a token store, be it damaged or unfinished."""
    if not folder.is_dir():
        return False
    if (folder / PROGRESS).exists() or _shards_in(folder):
        return True
    return _mentions_kind(folder / MANIFEST)


def was_written_here(folder: Path) -> bool:
    """Whether a manifest or a progress file shows that prepare wrote the folder; shards alone do not."""
    return _mentions_kind(folder / MANIFEST) or _mentions_kind(folder / PROGRESS)


def _mentions_kind(path: Path) -> bool:
    return path.is_file() and KIND.encode() in path.read_bytes()


def _shards_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _SHARD.fullmatch(path.name)]


def open_store(folder: Path, tokenizer: Tokenizer = GPT2) -> dict[str, list[Ids]]:
    """Token ids of each split, memory-mapped: one array per shard, at least one.

    The size of a shard is checked each time, its SHA-256 the first time on this machine and after each change
    (see ``cached_sha256``).

    Raises:
        ValueError, OSError: It is unfinished, damaged, or of another tokenizer.
    """
    manifest = read_manifest(folder)
    _check_tokenizer(folder, manifest, tokenizer)
    splits: dict[str, list[Ids]] = {}
    for split in SPLITS:
        shards = manifest["shards"][split]
        for shard in shards:
            _check_shard(folder / shard["name"], shard, tokenizer.dtype)
        splits[split] = [
            np.memmap(folder / shard["name"], dtype=_stored(tokenizer.dtype), mode="r")
            for shard in shards
        ] or [np.empty(0, dtype=tokenizer.dtype)]
    return splits


def read_manifest(folder: Path) -> dict[str, Any]:
    """Manifest of a complete store.

    Raises:
        ValueError: It is unfinished or damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{folder}: is an unfinished token store; run the prepare command that started it again"
        )
    manifest = _read(path)
    names = [shard["name"] for split in SPLITS for shard in manifest["shards"][split]]
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path}: names a shard outside of {folder}; prepare the text again")
    return manifest


def store_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a store.

    Raises:
        ValueError: The store is unfinished or damaged, or its tokenizer is not known.
        OSError: The package ``tokenizers`` is not installed.
    """
    recorded = read_manifest(folder)["tokenizer"]
    if recorded == GPT2.record:
        return GPT2
    file = folder / FILE
    content = file.read_bytes() if file.is_file() else b""
    if not isinstance(recorded, dict) or not is_recorded(recorded, content):
        raise ValueError(
            f"{folder}: holds tokens of another tokenizer ({_name(recorded)}), not of gpt2 with this vocabulary, "
            f"and its {FILE} is missing or damaged; prepare the text again"
        )
    try:
        return tokenizer_from(content, str(recorded["name"]))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {_REMEDY.format(folder=folder)}") from error


def is_recorded(record: dict[str, Any], file: bytes) -> bool:
    """Whether ``file`` is the ``tokenizer.json`` of a tokenizer's record."""
    return record.get("sha256") == hashlib.sha256(file).hexdigest()


def _check_tokenizer(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    if manifest["tokenizer"] == tokenizer.record:
        return
    other = store_tokenizer(folder)
    if not other.equals(tokenizer):
        raise ValueError(
            f"{folder}: holds tokens of another tokenizer, {other}, not of {tokenizer}; prepare the text again with "
            "prepare --tokenizer"
        )


def _stored(dtype: type[np.unsignedinteger[Any]]) -> np.dtype[Any]:
    return np.dtype(dtype).newbyteorder("<")


def read_progress(folder: Path) -> dict[str, Any]:
    """Progress of an unfinished store."""
    return _read(folder / PROGRESS)


def _read(path: Path) -> dict[str, Any]:
    return read_self_checksummed(path, KIND, _REMEDY.format(folder=path.parent))


def check_shards(folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer) -> None:
    for split in SPLITS:
        for shard in manifest["shards"][split]:
            _check_shard(folder / shard["name"], shard, tokenizer.dtype)


def _check_shard(path: Path, shard: dict[str, Any], dtype: type[np.unsignedinteger[Any]]) -> None:
    remedy = _REMEDY.format(folder=path.parent)
    if not path.is_file():
        raise ValueError(f"{path}: is missing; {remedy}")
    size, expected = path.stat().st_size, np.dtype(dtype).itemsize * shard["tokens"]
    if size != expected:
        raise ValueError(f"{path}: is damaged: it has {size} bytes, not {expected}; {remedy}")
    if cached_sha256(path) != shard["sha256"]:
        raise ValueError(f"{path}: is damaged: its SHA-256 is not the manifest's; {remedy}")


def _name(tokenizer: object) -> str:
    return str(tokenizer.get("name")) if isinstance(tokenizer, dict) else "unknown"


# --- writing --------------------------------------------------------------------------------------


@dataclass
class _ShardWriter:
    """A split while it is written; ``checksum`` and ``filled`` are of its last shard, which is not complete yet."""

    name: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    filled: int = 0
    file: IO[bytes] | None = None
    checksum: Any = field(default_factory=hashlib.sha256)

    @property
    def tokens(self) -> int:
        return sum((shard["tokens"] for shard in self.shards), self.filled)

    @property
    def shard_name(self) -> str:
        return f"{self.name}-{len(self.shards):05}{_SUFFIX}"

    def state(self) -> dict[str, Any]:
        return {
            "shards": list(self.shards),
            "documents": self.documents,
            "filled": self.filled,
            "sha256": self.checksum.copy().hexdigest(),
        }


class StoreWriter:
    """Writer of a store, in shards of ``shard_tokens``.

    Args:
        folder: Where the shards are written; it exists.
        about: What the manifest and the progress file hold besides: settings, inputs.
    """

    def __init__(
        self,
        folder: Path,
        shard_tokens: int,
        about: dict[str, Any],
        tokenizer: Tokenizer = GPT2,
    ) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.tokenizer = tokenizer
        self.about = {"tokenizer": tokenizer.record, **about}
        self.splits = {name: _ShardWriter(name) for name in SPLITS}
        self._recorded_shards = 0

    @property
    def shards(self) -> int:
        """Complete shards."""
        return sum(len(split.shards) for split in self.splits.values())

    @property
    def has_shards_to_record(self) -> bool:
        return self.shards > self._recorded_shards

    def append(self, split: str, ids: Ids, documents: int = 1, *, begins: bool = True) -> None:
        """Append tokens to a split, after an ``<|endoftext|>`` if they ``begin`` a document that is not the first.

        Raises:
            OSError: It cannot be written.
        """
        writer = self.splits[split]
        if begins and writer.tokens:
            self._extend(
                writer, np.array([self.tokenizer.end_of_text_id], dtype=self.tokenizer.dtype)
            )
        writer.documents += documents
        self._extend(writer, ids)

    def _extend(self, writer: _ShardWriter, ids: Ids) -> None:
        while len(ids):
            if writer.file is None:
                writer.file = (self.folder / writer.shard_name).open("wb")
            fitting, ids = np.split(ids, [self.shard_tokens - writer.filled])
            data = fitting.astype(_stored(self.tokenizer.dtype)).tobytes()
            writer.file.write(data)
            writer.checksum.update(data)
            writer.filled += len(fitting)
            if writer.filled == self.shard_tokens:
                self._complete(writer)

    def _complete(self, writer: _ShardWriter) -> None:
        """Complete the last shard, durably."""
        if writer.file is None:
            return
        writer.file.flush()
        os.fsync(writer.file.fileno())
        writer.file.close()
        writer.file = None
        name, sha256 = writer.shard_name, writer.checksum.hexdigest()
        writer.shards.append({"name": name, "tokens": writer.filled, "sha256": sha256})
        writer.filled, writer.checksum = 0, hashlib.sha256()
        cache_sha256(self.folder / name, sha256, file_state(self.folder / name))

    def record(self, position: dict[str, Any]) -> None:
        """Record what was appended so far: a resumed writer has it, and its caller resumes at ``position``."""
        for writer in self.splits.values():
            if writer.file is not None:
                writer.file.flush()
                os.fsync(writer.file.fileno())
        states = {name: writer.state() for name, writer in self.splits.items()}
        write_self_checksummed(
            self.folder / PROGRESS, KIND, {**self.about, "position": position, "splits": states}
        )
        self._recorded_shards = self.shards

    def resume(self) -> dict[str, Any]:
        """Restore the state of the last :meth:`record`; returns its position. What was written later is removed.

        Raises:
            ValueError: The progress file or a shard is damaged.
        """
        progress = read_progress(self.folder)
        for name, writer in self.splits.items():
            state = progress["splits"][name]
            writer.shards, writer.documents = state["shards"], state["documents"]
            writer.filled, writer.checksum = state["filled"], hashlib.sha256()
            for shard in writer.shards:
                _check_shard(self.folder / shard["name"], shard, self.tokenizer.dtype)
            if writer.filled:
                self._reopen(writer, state["sha256"])
        recorded = {shard["name"] for split in self.splits.values() for shard in split.shards}
        recorded |= {split.shard_name for split in self.splits.values() if split.filled}
        for path in _shards_in(self.folder):
            if path.name not in recorded:
                path.unlink()
        self._recorded_shards = self.shards
        return dict(progress["position"])

    def _reopen(self, writer: _ShardWriter, sha256: str) -> None:
        path = self.folder / writer.shard_name
        if not path.is_file():  # lost, or of a version that wrote .u16
            raise ValueError(f"{path}: is missing; remove {path.parent} and prepare it again")
        file = path.open("r+b")
        file.truncate(np.dtype(self.tokenizer.dtype).itemsize * writer.filled)
        writer.checksum = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            writer.checksum.update(block)
        if writer.checksum.hexdigest() != sha256:
            file.close()
            raise ValueError(f"{path}: is damaged; remove {path.parent} and prepare it again")
        writer.file = file

    def finish(self, **extra: Any) -> dict[str, Any]:
        """Complete the last shards and write the manifest, which is returned."""
        for writer in self.splits.values():
            self._complete(writer)
            if writer.shards:
                wait_for_tick(file_state(self.folder / writer.shards[-1]["name"]))
        manifest = {
            **self.about,
            **extra,
            "tokens": {name: writer.tokens for name, writer in self.splits.items()},
            "documents": {name: writer.documents for name, writer in self.splits.items()},
            "shards": {name: writer.shards for name, writer in self.splits.items()},
        }
        if self.tokenizer.file is not None:
            with atomic_output(self.folder / FILE) as temporary:
                temporary.write_bytes(self.tokenizer.file)
        write_self_checksummed(self.folder / MANIFEST, KIND, manifest)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return manifest

    def close(self) -> None:
        """Close the files, without recording what was not recorded."""
        for writer in self.splits.values():
            if writer.file is not None:
                with suppress(OSError):  # bytes that are not on disk were not recorded
                    writer.file.close()
                writer.file = None

    def remove(self) -> None:
        """Remove all files of the store; other files stay."""
        self.close()
        for path in [
            *_shards_in(self.folder),
            self.folder / FILE,
            self.folder / PROGRESS,
            temporary_path(self.folder / PROGRESS),
        ]:
            path.unlink(missing_ok=True)
