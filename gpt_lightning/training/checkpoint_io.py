"""Checkpoints on disk: written atomically, verified against their checksums when they are read.

A save writes a temporary file, syncs it, records its checksum in ``manifest.json``, keeps the current ``last.ckpt``
as ``previous.ckpt``, renames the temporary file, and syncs the folder. Then ``step-000500.ckpt`` (of step 500) and
``best.ckpt`` may become further names of the new ``last.ckpt``. At last, checkpoints of steps that are too old are
removed. At every moment each checkpoint is complete, and its checksum is recorded. No file is changed in place, so that
a name keeps its content when another name of the same file is replaced.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torch.utils._pytree import tree_map_only

from gpt_lightning.pretrained.weights import read_checkpoint, verify_zip_checksums
from gpt_lightning.storage.atomic import (
    atomic_output,
    fsync_folder,
    replace,
    temporary_path,
)
from gpt_lightning.storage.checksum import (
    CHECKPOINTS,
    MANIFEST,
    read_self_checksummed,
    sha256_of,
    write_self_checksummed,
)
from gpt_lightning.training.hashed_save import write_hashed

logger = logging.getLogger(__name__)

LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
_STEP = re.compile(r"step-(\d{6,})\.ckpt")
# in a manifest beside those of kept steps, before unread files are read to find entries that can go
_MAX_ENTRIES = 8


class AtomicCheckpointIO(CheckpointIO):
    """Checkpoint writer and reader: durable saves; loads only tensors and primitives that match the manifest.

    Args:
        async_save: Whether a thread writes a copy of the checkpoint while training continues. The copy needs
            memory for one checkpoint; there is one save at a time.
        keep_previous: Whether the last.ckpt that is replaced is kept as previous.ckpt.
        max_to_keep: Number of checkpoints of steps that stay; ``None``: all.

    Attributes:
        failures: Errors of finished saves by file, on the rank that writes. They are not raised here, because the
            other ranks wait for that rank at a barrier. The reader of this attribute clears it.
    """

    def __init__(
        self, async_save: bool = False, keep_previous: bool = True, max_to_keep: int | None = None
    ) -> None:
        self.keep_previous = keep_previous
        self.max_to_keep = max_to_keep
        self.failures: dict[str, OSError] = {}
        self._writer = ThreadPoolExecutor(max_workers=1) if async_save else None
        self._pending: Future[None] | None = None
        # checksums of the files in the run's folder that were read or written
        self._checksums: dict[str, str] = {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Save a checkpoint, and with ``storage_options={"also_named": NAMES}`` give it further names beside it."""
        self.finish()
        also_named = storage_options["also_named"] if storage_options else ()
        if self._writer is None:
            self._attempt(checkpoint, Path(path), also_named)
        else:
            copied = _on_cpu(checkpoint)
            self._pending = self._writer.submit(self._attempt, copied, Path(path), also_named)

    def finish(self) -> None:
        """Wait for the current save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def teardown(self) -> None:
        self.finish()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        entries = read_manifest(path.parent)
        if damage := corruption_reason(path, entries):
            raise ValueError(f"{path}: is damaged: {damage}; give another")
        if entries is not None:
            self._checksums[path.name] = sha256_of(path)
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)

    def _attempt(self, checkpoint: dict[str, Any], path: Path, also_named: Sequence[str]) -> None:
        try:
            self.write(checkpoint, path)
            saved = path
            for name in also_named:
                path = saved.with_name(name)  # a failure is this name's
                self.add_name(saved, name)
            if any(map(is_step_name, also_named)):
                self._remove_too_old(saved.parent, checkpoint["global_step"])
        except (OSError, RuntimeError) as error:
            before = (
                "the file that was there is intact" if path.exists() else "there is no such file"
            )
            self.failures[path.name] = OSError(
                f"{path}: cannot be written ({cause_of_failure(error)}); {before}"
            )

    def add_name(self, saved: Path, name: str) -> None:
        """Give a checkpoint a further name, durably; that of a step gets an entry in the manifest first."""
        if saved.name not in self._checksums:
            self._checksums[saved.name] = sha256_of(saved)
        sha256 = self._checksums[saved.name]
        if is_step_name(name):
            entries = read_manifest(saved.parent) or []
            if same := [entry for entry in entries if entry["sha256"] == sha256]:
                _write_manifest(saved.parent, [*entries, {**same[-1], "file": name}])
        else:
            self._checksums[name] = sha256
        link_or_copy(saved, saved.with_name(name))

    def write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Write a checkpoint now; raise ``OSError`` or ``RuntimeError`` if a step of the save fails."""
        folder = path.parent
        folder.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(path)
        try:
            sha256 = write_hashed(checkpoint, temporary)
            entry = _entry(path.name, temporary.stat().st_size, sha256, checkpoint)
            entries = read_manifest(folder)
            if entries is None:
                entries = _existing_entries(folder)
            entries = [*entries, entry]
            _write_manifest(folder, entries)
            # a file that is not known to be intact does not replace an intact one
            if self.keep_previous and path.name == LAST and LAST in self._checksums:
                self._keep_as_previous(folder)
            replace(temporary, path)
            fsync_folder(folder)
        finally:
            temporary.unlink(missing_ok=True)
        self._checksums[path.name] = sha256
        there = [name for name in (LAST, PREVIOUS, BEST) if (folder / name).exists()]
        unknown = [name for name in there if name not in self._checksums]
        # an entry of a step is needed while its file is there, which is not read for that
        steps = [e for e in entries if is_step_name(e["file"]) and (folder / e["file"]).exists()]
        if unknown and len(entries) - len(steps) <= _MAX_ENTRIES:
            return
        self._checksums |= {name: sha256_of(folder / name) for name in unknown}
        known = set(self._checksums.values())
        _write_manifest(folder, [e for e in entries if e["sha256"] in known or e in steps])

    def _remove_too_old(self, folder: Path, step: int) -> None:
        """Remove the checkpoints of steps that are more than ``max_to_keep``, after the one of ``step`` was saved.

        Those of later steps go first: the run was resumed from an earlier one, and does not use them.
        """
        if self.max_to_keep is None:
            return
        kept = step_checkpoints(folder)
        for other in sorted(kept, key=lambda other: (other <= step, other))[: -self.max_to_keep]:
            try:
                kept[other].unlink(missing_ok=True)
            except OSError as error:  # on Windows, while a program has it open
                logger.warning(
                    f"{kept[other]}: cannot be removed ({error.strerror}); the next save tries again"
                )

    def _keep_as_previous(self, folder: Path) -> None:
        sha256 = self._checksums.pop(LAST)
        try:
            _rotate_previous(folder)
        except FileNotFoundError:
            logger.warning(
                f"{folder / LAST} is gone (moved or removed by another program); it is saved again"
            )
            return
        self._checksums[PREVIOUS] = sha256


def cause_of_failure(error: OSError | RuntimeError) -> str:
    """Why a save failed, in words; torch's writer hides a full disk in a ``RuntimeError``."""
    cause = getattr(error.__cause__ or error.__context__ or error, "strerror", None)
    return cause or "the disk may be full"


def step_name(step: int) -> str:
    """The file name of a step's checkpoint."""
    return f"step-{step:06d}.ckpt"


def is_step_name(name: str) -> bool:
    """Whether a file name is the one of a step's checkpoint."""
    return _STEP.fullmatch(name) is not None


def step_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of steps in a run's folder."""
    names = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*.ckpt")}
    return {int(match[1]): path for path, match in names.items() if match is not None}


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of saves that were killed."""
    for name in (LAST, PREVIOUS, BEST, MANIFEST):
        temporary_path(folder / name).unlink(missing_ok=True)
    for temporary in folder.glob(temporary_path(folder / "step-*.ckpt").name):
        temporary.unlink()


def _on_cpu(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a copy whose tensors are in main memory."""
    copied: dict[str, Any] = tree_map_only(
        Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint
    )
    return copied


def _rotate_previous(folder: Path) -> None:
    """Give last.ckpt the name previous.ckpt too; at every moment the file has a name."""
    try:
        _link(folder / LAST, folder / PREVIOUS)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without hard links
        replace(folder / LAST, folder / PREVIOUS)


def link_or_copy(path: Path, name: Path) -> None:
    """Give a file a second name, durably; a copy gets it on a file system without hard links."""
    try:
        _link(path, name)
    except OSError:
        with atomic_output(name) as temporary:
            shutil.copyfile(path, temporary)
    fsync_folder(name.parent)


def _link(path: Path, name: Path) -> None:
    with atomic_output(name, durable=False) as temporary:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)


def _entry(file: str, size: int, sha256: str, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": file,
        "bytes": size,
        "sha256": sha256,
        "step": checkpoint.get("global_step"),
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": dict(_versions()),
        "config_sha256": _config_checksum(checkpoint),
    }


@cache
def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("gpt-lightning", "lightning", "torch")}


def _existing_entries(folder: Path) -> list[dict[str, Any]]:
    """Make entries without a manifest, for the files that are intact by their own checksums."""
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
    """Return the entries of the manifest, oldest first; ``None`` if there is none or it is damaged.

    A damaged manifest is ignored with a warning; the checkpoints' own checksums are still verified.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        entries = read_self_checksummed(path, CHECKPOINTS)["checkpoints"]
        for entry in entries:
            if not (type(entry["bytes"]) is int and isinstance(entry["file"], str)
                    and len(bytes.fromhex(entry["sha256"])) == 32):  # fmt: skip
                raise ValueError(f"{entry} is not an entry")
    except (ValueError, KeyError, TypeError, AttributeError):
        logger.warning(
            f"{path}: is damaged; checkpoints are only verified against their own checksums"
        )
        return None
    return list(entries)


def corruption_reason(path: Path, entries: list[dict[str, Any]] | None) -> str:
    """Return what is wrong with a checkpoint; empty if it is valid."""
    # previous.ckpt and best.ckpt have the entry that they got as last.ckpt
    recorded = [e for e in entries or [] if e["file"] == path.name or path.name in (PREVIOUS, BEST)]
    if recorded:
        size = path.stat().st_size
        if not any(e["bytes"] == size for e in entries or []):
            return f"it has {size:,} bytes, {MANIFEST} recorded {recorded[-1]['bytes']:,}"
        sha256 = sha256_of(path)
        if not any(e["sha256"] == sha256 for e in entries or []):
            return f"its SHA-256 is not what {MANIFEST} recorded"
        return ""
    try:
        verify_zip_checksums(path)
    except ValueError as error:
        return str(error).removeprefix(f"{path}: ").removeprefix("is damaged: ")
    return ""
