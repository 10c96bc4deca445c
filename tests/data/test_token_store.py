"""Token stores: damage is noticed, checksums are computed once, earlier versions are read."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import token_cache, token_store
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.token_store import open_store
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.storage import checksum
from helpers import QUICKSTART, SMALL, SMALL_QUICKSTART, Command, assert_refused, mutate
from token_stores import PARAGRAPHS, SAMPLE, as_earlier_version, store_tokens, write_lines


@pytest.mark.parametrize(
    "what", ["train-00000.bin", "train-00002.bin", "val-00000.bin", "manifest.json"]
)
def test_damaged_store_is_refused(prepared: Path, what: str) -> None:
    expected = store_tokens(prepared)
    original = (prepared / what).read_bytes()
    rng = random.Random(what)
    refused = 0
    for _ in range(250):
        (prepared / what).write_bytes(mutated := mutate(original, rng))
        try:
            found = token_cache.read_splits(str(prepared), 0.9)
        except (ValueError, OSError) as error:
            refused += mutated != original
            lines = str(error).count("\n")
        else:
            lines = 0
            assert [np.concatenate(split).tolist() for split in found] == list(expected)
        assert lines == 0
    assert refused > 200
    (prepared / what).unlink()
    with pytest.raises(ValueError, match=r"is missing|is an unfinished token store"):
        token_cache.read_splits(str(prepared), 0.9)


def test_checksum_of_a_shard_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that prepared a store does not compute it again; a changed shard is computed again."""
    monkeypatch.setattr(checksum, "MIN_CACHED_BYTES", 0)
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS)
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "store", PrepareConfig())
    summed: list[str] = []
    real = checksum.sha256_of
    monkeypatch.setattr(
        checksum, "sha256_of", lambda path: (summed.append(path.name), real(path))[1]
    )
    open_store(tmp_path / "store")
    assert summed == []
    moved = (tmp_path / "store").rename(tmp_path / "moved")
    open_store(moved)
    open_store(moved)
    assert summed == ["train-00000.bin", "val-00000.bin"]
    content = bytearray((moved / "val-00000.bin").read_bytes())
    content[5] ^= 1
    (moved / "val-00000.bin").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"val-00000.bin: is damaged: its SHA-256"):
            open_store(moved)


def test_store_of_another_tokenizer_is_refused(
    command: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = token_store.read_manifest(prepared)
    manifest["tokenizer"] = {"name": "cl100k_base"}
    checksum.write_self_checksummed(prepared / "manifest.json", token_store.KIND, manifest)
    result = command("fit", *SMALL_QUICKSTART, f"--data.text={prepared}")
    assert_refused(result, "another tokenizer (cl100k_base)")
    assert not Path("checkpoints").exists()


def test_store_of_an_earlier_version_is_read(command: Command, prepared: Path) -> None:
    expected = store_tokens(prepared)
    as_earlier_version(prepared, "manifest.json")
    assert token_store.is_store(prepared)
    assert store_tokens(prepared) == expected
    result = command("prepare", "rows.jsonl", f"--out={prepared}", "--shard_tokens=3000")
    assert result.code == 0, result.err
    assert "is already prepared" in result.err
    (prepared / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is an unfinished token store"):
        token_cache.read_splits(str(prepared), 0.9)


def test_fit_and_validate_read_a_store(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(SAMPLE)
    result = command(
        "prepare", "mine.txt", "--out=store", "--split=ratio", "--val_ratio=0.9", "--json"
    )
    assert result.code == 0, result.err
    output = json.loads(result.out)
    assert sum(output["tokens"].values()) == len(GPT2.encode_corpus(SAMPLE))
    config = QUICKSTART
    small = [argument for argument in SMALL if not argument.startswith("--data.t")]
    result = command("fit", config, *small, "--data.text=store", "--data.train_ratio=0.3",
                   "--trainer.max_steps=2")  # fmt: skip
    assert result.code == 0, result.err
    assert (
        result.err.count("data.train_ratio: 0.3 has no effect on store, of which prepare put 0.1")
        == 1
    )
    result = command("validate", config, *small, "--data.text=store", "--data.train_ratio=0.1",
                   "--init_from=checkpoints/quickstart", "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert "has no effect" not in result.err
    losses = json.loads(result.out)
    assert 0 < losses["train_tokens"] < losses["val_tokens"]
