"""Checkpoints on disk: written whole or not at all, held against their sums when they are read.

A save writes beside its target, syncs, records the file's sum in ``manifest.json``, keeps the ``last.ckpt``
there is as ``previous.ckpt``, renames, and syncs the folder. At every moment in between each file that has
a name is whole and its sum is recorded.
"""

import hashlib
import json
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from gpt_lightning.pretrained.weights import check_records, read_checkpoint
from gpt_lightning.storage.atomic import fsync, temporary_path
from gpt_lightning.storage.checksum import (
    CHECKPOINTS,
    MANIFEST,
    read_self_checksummed,
    sha256_of,
    write_self_checksummed,
)

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_MAX_ENTRIES = 8  # in a manifest, before files that were not read are read to know which to keep

# what torch.load(weights_only=True) gives back as it was; by type, for a numpy float is a float too
_PRIMITIVES = {type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size}
_CONTAINERS = {dict, OrderedDict, Counter, list, tuple, set}


class AtomicCheckpointIO(CheckpointIO):
    """Saves durably, loads tensors and primitives only and only what its manifest knows.

    Args:
        async_save: Whether a copy of the checkpoint is written by a thread while training goes on. It
            costs the checkpoint's size in memory; one save is under way at a time.
        keep_previous: Whether the last.ckpt that is replaced is kept as previous.ckpt.

    Attributes:
        failures: What went wrong with saves that have ended, by file, on the rank that writes. It is not
            raised: the other ranks wait for that rank at a barrier. Whoever reads them takes them away.
    """

    def __init__(self, async_save: bool = False, keep_previous: bool = True) -> None:
        self.keep_previous = keep_previous
        self.failures: dict[str, OSError] = {}
        self._writer = ThreadPoolExecutor(max_workers=1) if async_save else None
        self._under_way: Future[None] | None = None
        # of the files in the run's folder, as far as they were read or written
        self._sums: dict[str, str] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.finish()
        if self._writer is None:
            self._attempt(checkpoint, Path(path))
        else:
            copied = copy_of(checkpoint)
            self._under_way = self._writer.submit(self._attempt, copied, Path(path))

    def finish(self) -> None:
        """Wait for the save that is under way."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def teardown(self) -> None:
        self.finish()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        sums = read_manifest(path.parent)
        if damage := corruption_reason(path, sums):
            raise ValueError(f"{path}: is damaged: {damage}; give another")
        if sums is not None:
            self._sums[path.name] = sha256_of(path)
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _attempt(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            self._write(checkpoint, path)
        except (
            OSError,
            RuntimeError,
        ) as error:  # torch's writer hides a full disk in a RuntimeError
            cause = getattr(error.__cause__ or error.__context__ or error, "strerror", None)
            before = (
                "the file that was there is intact" if path.exists() else "there is no such file"
            )
            self.failures[path.name] = OSError(
                f"{path}: cannot be written ({cause or 'the disk may be full'}); {before}"
            )

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            sha256 = _write_hashed(checkpoint, temporary)
            entry = _entry(path.name, temporary.stat().st_size, sha256, checkpoint)
            entries = read_manifest(folder)
            if entries is None:
                entries = _existing_entries(folder)
            entries = [*entries, entry]
            _write_manifest(folder, entries)
            # a file that is not known to be intact does not replace an intact one
            if self.keep_previous and path.name == LAST and LAST in self._sums:
                self._keep_as_previous(folder)
            os.replace(temporary, path)
            fsync(folder)
        finally:
            temporary.unlink(missing_ok=True)
        self._sums[path.name] = sha256
        there = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
        unknown = [name for name in there if name not in self._sums]
        if unknown and len(entries) <= _MAX_ENTRIES:
            return
        self._sums |= {name: sha256_of(folder / name) for name in unknown}
        known = set(self._sums.values())
        _write_manifest(folder, [entry for entry in entries if entry["sha256"] in known])

    def _keep_as_previous(self, folder: Path) -> None:
        sha256 = self._sums.pop(LAST)
        try:
            _rotate_previous(folder)
        except FileNotFoundError:
            logger.warning(
                f"{folder / LAST} is gone (moved or removed by another program); it is saved again"
            )
            return
        self._sums[PREVIOUS] = sha256


def remove_leftovers(folder: Path) -> None:
    """What saves that were killed have left."""
    for name in (LAST, PREVIOUS, BEST, MANIFEST):
        temporary_path(folder / name).unlink(missing_ok=True)


def copy_of(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """With tensors of its own, in main memory."""
    copied: dict[str, Any] = tree_map_only(
        Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint
    )
    return copied


def check_content(content: Any, key: str = "checkpoint") -> None:
    """``ValueError`` with the key of what is neither tensor nor primitive, and so would not load again."""
    kind = type(content)
    if isinstance(content, Tensor) or kind in _PRIMITIVES:
        return
    if kind not in _CONTAINERS:
        raise ValueError(
            f"{key}: is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds tensors, numbers, "
            "strings and containers of them: convert it where the state is made"
        )
    if isinstance(content, Mapping):
        for name, value in content.items():
            check_content(name, f"a key of {key}")
            check_content(value, f"{key}.{name}")
    else:
        for i, value in enumerate(content):
            check_content(value, f"{key}.{i}")


_SMALL = 1 << 20  # bytes


class _HashingFile:
    """Takes what ``torch.save`` writes. The sum is computed by a thread, behind the writing.

    Args:
        kept: Addresses of storages that stay as they are until the sum is there. What comes from elsewhere is
            copied where it is small, as headers are, else waited for, as copies from a GPU are.
    """

    def __init__(self, file: BinaryIO, hasher: ThreadPoolExecutor, kept: frozenset[int]) -> None:
        self._file = file
        self._hasher = hasher
        self._kept = kept
        self._sum = hashlib.sha256()
        self._behind: Future[None] | None = None

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        is_kept = np.frombuffer(data, np.uint8).ctypes.data in self._kept
        if not is_kept and written < _SMALL:
            data, is_kept = bytes(data), True
        self._behind = self._hasher.submit(self._sum.update, data)  # one thread: in this order
        if not is_kept:
            self._behind.result()
        return written

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        if self._behind is not None:
            self._behind.result()
        return self._sum.hexdigest()


def _write_hashed(checkpoint: dict[str, Any], path: Path) -> str:
    kept = frozenset(
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(checkpoint)
        if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
    )
    with path.open("wb") as file, ThreadPoolExecutor(max_workers=1) as hasher:
        hashing = _HashingFile(file, hasher, kept)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
        if hasattr(
            os, "posix_fadvise"
        ):  # its pages are of more use to the next save than to nobody's reading
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashing.hexdigest()


def _rotate_previous(folder: Path) -> None:
    """Give last.ckpt the name previous.ckpt too, without a moment in which it has none."""
    temporary = temporary_path(folder / PREVIOUS)
    temporary.unlink(missing_ok=True)
    try:
        os.link(folder / LAST, temporary)
    except FileNotFoundError:
        raise
    except OSError:  # a filesystem without links
        os.replace(folder / LAST, folder / PREVIOUS)
    else:
        os.replace(temporary, folder / PREVIOUS)
        temporary.unlink(missing_ok=True)  # a rename between two names of one file does nothing


def _entry(file: str, size: int, sha256: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": file,
        "bytes": size,
        "sha256": sha256,
        "step": checkpoint.get("global_step"),
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in ("gpt-lightning", "lightning", "torch")},
        "config_sha256": _config_checksum(checkpoint),
    }


def _existing_entries(folder: Path) -> list[dict[str, Any]]:
    """Where no manifest can be gone by: of the files that are whole by their own checksums."""
    entries = []
    for name in (BEST, PREVIOUS, LAST):
        path = folder / name
        if path.is_file() and not corruption_reason(path, None):
            checkpoint = read_checkpoint(path)
            entries.append(_entry(name, path.stat().st_size, sha256_of(path), checkpoint))
    return entries


def _config_checksum(checkpoint: Mapping[str, Any]) -> str:
    settings = json.dumps(checkpoint.get("hyper_parameters"), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()


def _write_manifest(folder: Path, entries: list[dict[str, Any]]) -> None:
    write_self_checksummed(folder / MANIFEST, CHECKPOINTS, {"checkpoints": entries})


def read_manifest(folder: Path) -> list[dict[str, Any]] | None:
    """What was recorded of each checkpoint, oldest first; none where there is no manifest to go by.

    A damaged one is said aloud and not gone by: the checkpoints' own checksums are still held against them.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        entries = read_self_checksummed(path, CHECKPOINTS)["checkpoints"]
        for entry in entries:
            if not (type(entry["bytes"]) is int and isinstance(entry["file"], str)
                    and len(bytes.fromhex(entry["sha256"])) == 32):  # fmt: skip
                raise ValueError(f"{entry} is no entry")
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning(
            f"{path}: is damaged; checkpoints are held against their own checksums alone"
        )
        return None
    return list(entries)


def corruption_reason(path: Path, entries: list[dict[str, Any]] | None) -> str:
    """What is wrong with a checkpoint, in words; empty where it is whole."""
    recorded = [e for e in entries or [] if e["file"] == path.name or path.name == PREVIOUS]
    if recorded:
        size = path.stat().st_size
        if not any(e["bytes"] == size for e in entries or []):
            return f"it has {size:,} bytes, {MANIFEST} recorded {recorded[-1]['bytes']:,}"
        sha256 = sha256_of(path)
        if not any(e["sha256"] == sha256 for e in entries or []):
            return f"its SHA-256 is not what {MANIFEST} recorded"
        return ""
    try:
        check_records(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ").removeprefix("is damaged: ")
    return ""
