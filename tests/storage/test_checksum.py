"""Manifests with checksums."""

import json
from pathlib import Path

import pytest

from gpt_lightning.storage.checksum import (
    CHECKPOINTS,
    MANIFEST,
    WEIGHTS,
    check_manifest,
    damaged_files,
    read_self_checksummed,
    sha256_of,
    write_manifest,
    write_self_checksummed,
)


@pytest.mark.parametrize("kind", [WEIGHTS, CHECKPOINTS])
def test_manifest_of_another_kind_or_content_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / MANIFEST
    write_self_checksummed(path, kind, {"files": {}, "number": 1})
    assert read_self_checksummed(path, kind)["number"] == 1
    text = path.read_text()
    for damaged in (
        text.replace("1,", "2,"), text.replace('"kind"', '"kin"'), text[: len(text) // 2],
        "[]", "[null]", "{}", '{"files": {}, "checkpoints": []}',
    ):  # fmt: skip
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"manifest.json: is damaged; remove it"):
            read_self_checksummed(path, kind)
    write_self_checksummed(path, "something else", {})
    with pytest.raises(ValueError, match=r"manifest.json: is damaged; remove it"):
        read_self_checksummed(path, kind)


@pytest.mark.parametrize("version", ["this", "before kinds"])
def test_weights_are_verified_against_their_manifest(tmp_path: Path, version: str) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    if version == "this":
        write_manifest(tmp_path, [weights.name])
    else:
        entry = {"bytes": 7, "sha256": sha256_of(weights)}
        content = {"files": {weights.name: entry}}
        (tmp_path / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")
    assert damaged_files(tmp_path) == []
    weights.write_bytes(b"weighty")
    with pytest.raises(ValueError, match=r"model.safetensors: is missing or damaged"):
        check_manifest(tmp_path)
