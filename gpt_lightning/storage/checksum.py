"""Sizes and SHA-256 sums of a folder's files, kept beside them in ``manifest.json``."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

MANIFEST = "manifest.json"


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Record the named files as they are now."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in sorted(names)
    }
    hidden = folder / f".{MANIFEST}.tmp"
    hidden.write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")
    os.replace(hidden, folder / MANIFEST)


def damaged_files(folder: Path) -> list[str]:
    """The recorded files that are missing or other than recorded; none where nothing is recorded.

    Raises:
        ValueError: The manifest itself is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return []
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        recorded = {str(name): (f["bytes"], f["sha256"]) for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: is damaged; remove it if the files beside it are whole"
        ) from error
    return [
        name
        for name, (size, sha256) in recorded.items()
        if Path(name).name != name
        or not (folder / name).is_file()
        or (folder / name).stat().st_size != size
        or sha256_of(folder / name) != sha256
    ]


def check_manifest(folder: Path) -> None:
    """``ValueError`` where a recorded file is damaged."""
    if damaged := damaged_files(folder):
        raise ValueError(
            f"{folder / damaged[0]}: is missing or damaged: it is not what {MANIFEST} beside it "
            "recorded; fetch or convert it anew"
        )
