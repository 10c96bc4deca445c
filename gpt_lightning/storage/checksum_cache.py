"""SHA-256 sums of large files, taken once on a machine and again only when the file has changed.

A sum is remembered in the cache under the file's path, size, time of change (ns) and inode. What changes a
file without its time of change (a failing disk, somebody who sets the time back) is so noticed the first
time only; whoever wants more empties ``sums/`` in the cache.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt_lightning.storage.cache import cache_folder
from gpt_lightning.storage.checksum import sha256_of

MIN_CACHED_BYTES = 1_000_000  # bytes, a millisecond to sum
# a file's time of change moves in ticks of up to 10 ms: a sum taken within the same tick may be of less
_TICK = 0.05


def cached_sha256(path: Path) -> str:
    """The file's sum, from the cache where it is known there."""
    state = state_of(path)
    kept = _place(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["file"] == state and len(known["sha256"]) == 64:
            return str(known["sha256"])
    old_enough = time.time() - state["mtime_ns"] / 1e9 > _TICK
    sha256 = sha256_of(path)
    if old_enough and state["bytes"] >= MIN_CACHED_BYTES and state_of(path) == state:
        _write(kept, state, sha256)
    return sha256


def cache_sha256(path: Path, sha256: str, state: dict[str, Any]) -> None:
    """Note the sum of a file that this process has written itself, which then was in that :func:`state_of`."""
    if state["bytes"] >= MIN_CACHED_BYTES:
        _write(_place(path), state, sha256)


def wait_for_a_tick(state: dict[str, Any]) -> None:
    """After it a change of the file shows in its time of change."""
    time.sleep(max(0.0, min(_TICK, state["mtime_ns"] / 1e9 + _TICK - time.time())))


def state_of(path: Path) -> dict[str, Any]:
    """What changes whenever the file does."""
    found = path.stat()
    return {
        "path": str(path.resolve()),
        "bytes": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "inode": found.st_ino,
    }


def _place(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return cache_folder() / "sums" / f"{key}.json"


def _write(kept: Path, state: dict[str, Any], sha256: str) -> None:
    with suppress(OSError):  # without a cache it is taken again
        kept.parent.mkdir(parents=True, exist_ok=True)
        hidden = kept.with_name(f".{kept.name}.{os.getpid()}")
        hidden.write_text(json.dumps({"file": state, "sha256": sha256}), encoding="utf-8")
        os.replace(hidden, kept)
