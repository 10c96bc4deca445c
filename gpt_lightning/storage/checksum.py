"""SHA-256 of files, and ``manifest.json``: which files belong to a folder, and their checksums.

There are three kinds of manifest: of a folder of weights (here), of a token store (``data/token_store.py``)
and of a run's checkpoints (``training/checkpoint_io.py``). All are JSON objects with their ``kind`` and a
checksum over themselves.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gpt_lightning.storage.atomic import write_text
from gpt_lightning.storage.cache import cache_folder

MANIFEST = "manifest.json"
WEIGHTS = "gpt_lightning weights 1"
CHECKPOINTS = "gpt_lightning checkpoints 1"
# the only key of manifests from before they had a kind and a checksum
_ONLY_KEY_BEFORE = {WEIGHTS: "files", CHECKPOINTS: "checkpoints"}

MIN_CACHED_BYTES = 1_000_000  # a smaller file takes a millisecond
# a file's time of change moves in ticks of up to 10 ms: a change within the tick of a checksum does not show
_TICK = 0.05


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- manifests ------------------------------------------------------------------------------------


def write_self_checksummed(path: Path, kind: str, content: dict[str, Any]) -> None:
    """A JSON file with its kind and a checksum over itself, written atomically."""
    content = {"kind": kind, **content}
    write_text(path, json.dumps({**content, "sha256": _checksum(content)}, indent=1) + "\n")


def read_self_checksummed(path: Path, kind: str, remedy: str = "remove it") -> dict[str, Any]:
    """The content that :func:`write_self_checksummed` wrote, or that a version before kinds wrote.

    Raises:
        ValueError: It is damaged, or of another kind.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and list(content) == [_ONLY_KEY_BEFORE.get(kind)]:
            return content
        recorded = content.pop("sha256")
        intact = recorded == _checksum(content)
        found_kind = content.get("kind", content.get("format"))  # token stores called it format
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact, found_kind = False, None
    if not intact or found_kind != kind:
        raise ValueError(f"{path}: is damaged; {remedy}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Record sizes and checksums of files in a folder of weights."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(names)
    }
    write_self_checksummed(folder / MANIFEST, WEIGHTS, {"files": files})


def damaged_files(folder: Path) -> list[str]:
    """Recorded files of a folder of weights that are missing or changed; empty if it has no manifest.

    Raises:
        ValueError: The manifest itself is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return []
    remedy = "remove it if the files beside it are intact"
    try:
        files = read_self_checksummed(path, WEIGHTS, remedy)["files"]
        recorded = {str(name): (f["bytes"], f["sha256"]) for name, f in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is damaged; {remedy}") from error
    return [
        name
        for name, (size, sha256) in recorded.items()
        if Path(name).name != name
        or not (folder / name).is_file()
        or (folder / name).stat().st_size != size
        or sha256_of(folder / name) != sha256
    ]


def check_manifest(folder: Path) -> None:
    """``ValueError`` if a recorded file of a folder of weights is damaged."""
    if damaged := damaged_files(folder):
        raise ValueError(
            f"{folder / damaged[0]}: is missing or damaged: it is not what {MANIFEST} beside it "
            "recorded; fetch or convert it again"
        )


# --- the cache ------------------------------------------------------------------------------------


def cached_sha256(path: Path) -> str:
    """Checksum of a file, computed once on a machine and again only when the file has changed.

    It is cached under the file's path, size, time of change (ns) and inode. A change that leaves all of
    them (a failing disk, a time of change that was set back) is noticed only before the checksum is cached;
    remove the folder ``checksums/`` of the cache to compute all checksums again.
    """
    state = file_state(path)
    cached = _cached_path(path)
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = json.loads(cached.read_text(encoding="utf-8"))
        if entry["file"] == state and len(entry["sha256"]) == 64:
            return str(entry["sha256"])
    old_enough = time.time() - state["mtime_ns"] / 1e9 > _TICK
    sha256 = sha256_of(path)
    if old_enough and state["bytes"] >= MIN_CACHED_BYTES and file_state(path) == state:
        _write_cached(cached, state, sha256)
    return sha256


def cache_sha256(path: Path, sha256: str, state: dict[str, Any]) -> None:
    """Cache the checksum of a file that this process wrote, with its :func:`file_state` after that."""
    if state["bytes"] >= MIN_CACHED_BYTES:
        _write_cached(_cached_path(path), state, sha256)


def wait_for_tick(state: dict[str, Any]) -> None:
    """Wait until a change of the file would show in its time of change, if its checksum is cached."""
    if state["bytes"] >= MIN_CACHED_BYTES:
        time.sleep(max(0.0, min(_TICK, state["mtime_ns"] / 1e9 + _TICK - time.time())))


def file_state(path: Path) -> dict[str, Any]:
    """Path, size, time of change and inode: a change of the file changes one of them."""
    status = path.stat()
    return {
        "path": str(path.resolve()),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "inode": status.st_ino,
    }


def _cached_path(path: Path) -> Path:
    key = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    return cache_folder() / "checksums" / f"{key}.json"


def _write_cached(cached: Path, state: dict[str, Any], sha256: str) -> None:
    with suppress(OSError):  # without a cache it is computed again
        cached.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"file": state, "sha256": sha256})
        write_text(cached, content, concurrent=True, durable=False)
