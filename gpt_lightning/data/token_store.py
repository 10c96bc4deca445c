"""A token store: one folder with two splits' token ids, uint16 little-endian, in shards, and a manifest.

``manifest.json`` comes last, so a folder that has one is whole. Until then ``progress.json`` tells how far
each split was when a shard was last completed, and where the sources go on from there.
"""

import hashlib
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, VOCABULARY_SHA256
from gpt_lightning.storage.atomic import temporary_path
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
TOKENIZER = {"name": "gpt2", **VOCABULARY_SHA256}
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
    """Whether a manifest or progress says that this wrote the folder; shards alone may be anyone's."""
    return _mentions_kind(folder / MANIFEST) or _mentions_kind(folder / PROGRESS)


def _mentions_kind(path: Path) -> bool:
    return path.is_file() and KIND.encode() in path.read_bytes()


def _shards_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if _SHARD.fullmatch(path.name)]


def open_store(folder: Path) -> dict[str, list[NDArray[np.uint16]]]:
    """Each split's token ids, memory-mapped: one array a shard, at least one.

    A shard's size is checked each time, its SHA-256 the first time on this machine and after each change
    (see ``sums.py``).

    Raises:
        ValueError, OSError: It is unfinished, damaged, or of another tokenizer.
    """
    manifest = read_manifest(folder)
    found: dict[str, list[NDArray[np.uint16]]] = {}
    for split in SPLITS:
        shards = manifest["shards"][split]
        for shard in shards:
            _check_shard(folder / shard["name"], shard)
        found[split] = [
            np.memmap(folder / shard["name"], dtype="<u2", mode="r") for shard in shards
        ] or [np.empty(0, dtype=np.uint16)]
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """A whole store's manifest.

    Raises:
        ValueError: It is unfinished, damaged, or of another tokenizer.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise ValueError(
            f"{folder}: is an unfinished token store; go on with the prepare command that began it"
        )
    manifest = _read(path)
    names = [shard["name"] for split in SPLITS for shard in manifest["shards"][split]]
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{path}: names a shard outside of {folder}; prepare the text anew")
    if manifest["tokenizer"] != TOKENIZER:
        raise ValueError(
            f"{folder}: holds tokens of another tokenizer ({_name(manifest['tokenizer'])}), not of "
            f"{TOKENIZER['name']} with this vocabulary; prepare the text anew"
        )
    return manifest


def read_progress(folder: Path) -> dict[str, Any]:
    """Of an unfinished store."""
    return _read(folder / PROGRESS)


def _read(path: Path) -> dict[str, Any]:
    return read_self_checksummed(path, KIND, _REMEDY.format(folder=path.parent))


def check_shards(folder: Path, manifest: dict[str, Any]) -> None:
    for split in SPLITS:
        for shard in manifest["shards"][split]:
            _check_shard(folder / shard["name"], shard)


def _check_shard(path: Path, shard: dict[str, Any]) -> None:
    remedy = _REMEDY.format(folder=path.parent)
    if not path.is_file():
        raise ValueError(f"{path}: is missing; {remedy}")
    size, expected = path.stat().st_size, 2 * shard["tokens"]
    if size != expected:
        raise ValueError(f"{path}: is damaged: it has {size} bytes, not {expected}; {remedy}")
    if cached_sha256(path) != shard["sha256"]:
        raise ValueError(f"{path}: is damaged: its SHA-256 is not the manifest's; {remedy}")


def _name(tokenizer: object) -> str:
    return str(tokenizer.get("name")) if isinstance(tokenizer, dict) else "unknown"


# --- writing --------------------------------------------------------------------------------------


@dataclass
class _ShardWriter:
    """A split while it is written; ``sum`` and ``filled`` are of its last shard, which is not whole yet."""

    name: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    documents: int = 0
    filled: int = 0
    file: IO[bytes] | None = None
    sum: Any = field(default_factory=hashlib.sha256)

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
            "sha256": self.sum.copy().hexdigest(),
        }


class StoreWriter:
    """Splits' tokens into shards of ``shard_tokens``.

    Args:
        folder: Where the shards are; it exists.
        about: What the manifest and the progress say besides: settings, sources.
    """

    def __init__(self, folder: Path, shard_tokens: int, about: dict[str, Any]) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.about = {"tokenizer": TOKENIZER, **about}
        self.splits = {name: _ShardWriter(name) for name in SPLITS}
        self._recorded_shards = 0

    @property
    def shards(self) -> int:
        """Whole ones."""
        return sum(len(split.shards) for split in self.splits.values())

    @property
    def has_whole_shards_to_record(self) -> bool:
        return self.shards > self._recorded_shards

    def append(
        self, split: str, ids: NDArray[np.uint16], documents: int = 1, *, begins: bool = True
    ) -> None:
        """More of a split, after an ``<|endoftext|>`` where it ``begins`` a document and is not the first.

        Raises:
            OSError: It cannot be written.
        """
        growing = self.splits[split]
        if begins and growing.tokens:
            self._extend(growing, np.array([END_OF_TEXT_ID], dtype=np.uint16))
        growing.documents += documents
        self._extend(growing, ids)

    def _extend(self, growing: _ShardWriter, ids: NDArray[np.uint16]) -> None:
        while len(ids):
            if growing.file is None:
                growing.file = (self.folder / growing.shard_name).open("wb")
            fitting, ids = np.split(ids, [self.shard_tokens - growing.filled])
            data = fitting.astype("<u2").tobytes()
            growing.file.write(data)
            growing.sum.update(data)
            growing.filled += len(fitting)
            if growing.filled == self.shard_tokens:
                self._complete(growing)

    def _complete(self, growing: _ShardWriter) -> None:
        """The last shard is whole, and on disk."""
        if growing.file is None:
            return
        growing.file.flush()
        os.fsync(growing.file.fileno())
        growing.file.close()
        growing.file = None
        name, sha256 = growing.shard_name, growing.sum.hexdigest()
        growing.shards.append({"name": name, "tokens": growing.filled, "sha256": sha256})
        growing.filled, growing.sum = 0, hashlib.sha256()
        cache_sha256(self.folder / name, sha256, file_state(self.folder / name))

    def record(self, position: dict[str, Any]) -> None:
        """What was appended so far is what a resumed writer has; its caller goes on at ``position``."""
        for growing in self.splits.values():
            if growing.file is not None:
                growing.file.flush()
                os.fsync(growing.file.fileno())
        states = {name: growing.state() for name, growing in self.splits.items()}
        write_self_checksummed(
            self.folder / PROGRESS, KIND, {**self.about, "position": position, "splits": states}
        )
        self._recorded_shards = self.shards

    def resume(self) -> dict[str, Any]:
        """Be as at the last :meth:`record`; returns its position. What was written after it is removed.

        Raises:
            ValueError: The progress or a shard is damaged.
        """
        progress = read_progress(self.folder)
        for name, growing in self.splits.items():
            state = progress["splits"][name]
            growing.shards, growing.documents = state["shards"], state["documents"]
            growing.filled = state["filled"]
            for shard in growing.shards:
                _check_shard(self.folder / shard["name"], shard)
            if growing.filled:
                self._reopen(growing, state["sha256"])
        known = {shard["name"] for split in self.splits.values() for shard in split.shards}
        known |= {split.shard_name for split in self.splits.values() if split.filled}
        for path in _shards_in(self.folder):
            if path.name not in known:
                path.unlink()
        self._recorded_shards = self.shards
        return dict(progress["position"])

    def _reopen(self, growing: _ShardWriter, sha256: str) -> None:
        path = self.folder / growing.shard_name
        if not path.is_file():  # lost, or of a version that wrote .u16
            raise ValueError(f"{path}: is missing; remove {path.parent} and prepare it again")
        file = path.open("r+b")
        file.truncate(2 * growing.filled)
        growing.sum = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            growing.sum.update(block)
        if growing.sum.hexdigest() != sha256:
            file.close()
            raise ValueError(f"{path}: is damaged; remove {path.parent} and prepare it again")
        growing.file = file

    def finish(self, **more: Any) -> dict[str, Any]:
        """Complete the last shards and write the manifest, which is returned."""
        for growing in self.splits.values():
            self._complete(growing)
            if growing.shards:
                wait_for_tick(file_state(self.folder / growing.shards[-1]["name"]))
        manifest = {
            **self.about,
            **more,
            "tokens": {name: growing.tokens for name, growing in self.splits.items()},
            "documents": {name: growing.documents for name, growing in self.splits.items()},
            "shards": {name: growing.shards for name, growing in self.splits.items()},
        }
        write_self_checksummed(self.folder / MANIFEST, KIND, manifest)
        (self.folder / PROGRESS).unlink(missing_ok=True)
        return manifest

    def close(self) -> None:
        """Leave the files as they are."""
        for growing in self.splits.values():
            if growing.file is not None:
                with suppress(OSError):  # what is not on disk was not recorded
                    growing.file.close()
                growing.file = None

    def remove(self) -> None:
        """Leave nothing of its own."""
        self.close()
        for path in [
            *_shards_in(self.folder),
            self.folder / PROGRESS,
            temporary_path(self.folder / PROGRESS),
        ]:
            path.unlink(missing_ok=True)
