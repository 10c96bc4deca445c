"""Fixtures of the tests of data."""

from pathlib import Path

import pytest

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from token_stores import PARAGRAPHS, SAMPLE, SHARDS, write_lines


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Inputs: a text of many chunks with a long document, rows, and a folder."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4000)
    short = "<|endoftext|>".join(PARAGRAPHS[:20])
    (tmp_path / "a.txt").write_text(f"{short}<|endoftext|>{SAMPLE * 2}<|endoftext|>{short} end")
    write_lines(tmp_path / "b.jsonl", [f"{i} {p}" for i in range(3) for p in PARAGRAPHS])
    (tmp_path / "c").mkdir()
    for i in range(4):
        (tmp_path / "c" / f"{i}.md").write_text(SAMPLE[i * 900 :][: 2000 * i + 1])
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c")]


@pytest.fixture
def whole(corpus: list[str], tmp_path: Path) -> Path:
    prepare(corpus, tmp_path / "whole", SHARDS)
    return tmp_path / "whole"


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS * 2)
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "store", PrepareConfig(shard_tokens=3000))
    return tmp_path / "store"
