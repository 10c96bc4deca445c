"""Splits by hash and by ratio."""

from pathlib import Path

import pytest

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import GPT2, decode
from helpers import Command, assert_refused
from token_stores import (
    KINDS,
    PARAGRAPHS,
    SAMPLE,
    documents_of,
    store_tokens,
    write_lines,
    written_as,
)


def test_split_by_hash_keeps_documents_in_place_when_files_are_added(tmp_path: Path) -> None:
    texts = [f"{i} {paragraph}" for i in range(6) for paragraph in PARAGRAPHS]
    write_lines(tmp_path / "b.jsonl", texts[:200])
    write_lines(tmp_path / "a.jsonl", texts[200:])
    prepare([str(tmp_path / "b.jsonl")], tmp_path / "few", PrepareConfig())
    prepare([str(tmp_path)], tmp_path / "more", PrepareConfig(), workers=2)
    few, more = (
        [set(documents_of(ids)) for ids in store_tokens(tmp_path / name)]
        for name in ("few", "more")
    )
    assert all(before <= after for before, after in zip(few, more, strict=True))
    assert not more[0] & more[1]
    assert 0.05 < len(more[1]) / len(texts) < 0.15


@pytest.mark.parametrize("val_ratio", [0.0, 0.1, 0.5, 0.93])
def test_split_by_ratio_cuts_a_text_once(tmp_path: Path, val_ratio: float) -> None:
    (tmp_path / "mine.txt").write_text(SAMPLE)
    prepare(
        [str(tmp_path / "mine.txt")], tmp_path / "out", PrepareConfig("text", "ratio", val_ratio)
    )
    train, val = store_tokens(tmp_path / "out")
    assert train + val == GPT2.encode_corpus(SAMPLE).tolist()
    cut = len(decode(train).encode()) - (1 - val_ratio) * len(SAMPLE.encode())
    assert 0 <= cut < 20


@pytest.mark.parametrize("kind", KINDS)
def test_split_by_ratio_puts_the_last_rows_into_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 2000)
    texts = [f"{i:05} {'x' * 20}" for i in range(1000)]
    path = written_as(tmp_path, kind, texts)
    prepare([str(path)], tmp_path / "out", PrepareConfig("text", "ratio", 0.25), workers=2)
    train, val = (documents_of(ids) for ids in store_tokens(tmp_path / "out"))
    assert train + val == texts
    assert len(val) == 250


def test_empty_split_is_refused_before_tokenizing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes of the documents of plain texts are enough to know it."""
    for name, text in [("a.txt", "one<|endoftext|> \n"), ("b.txt", "two " * 2000)]:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("gpt_lightning.data.prepare.pipeline.StoreWriter", None)
    assert_refused(
        command("prepare", "a.txt", "b.txt", "--out=out", "--val_ratio=1e-9"),
        "none of 2 document(s) is for validation",
    )
    assert not (tmp_path / "out").exists()
