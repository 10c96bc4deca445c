"""Plain texts: cut where the tokens do not change."""

import codecs
import random
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.prepare.plain_text import safe_cut
from gpt_lightning.data.tokenizer import GPT2, encode_prompt
from token_stores import (
    awkward_text,
    store_tokens,
)


def test_safe_cut_does_not_change_the_tokens() -> None:
    rng = random.Random(1)
    cuts = 0
    for _ in range(3000):
        text = awkward_text(rng, rng.randrange(2, 40)).encode()
        if cut := safe_cut(text):
            cuts += 1
            parts = [
                GPT2.encode_corpus(part.decode()).tolist() for part in (text[:cut], text[cut:])
            ]
            assert parts[0] + parts[1] == GPT2.encode_corpus(text.decode()).tolist(), (text, cut)
    assert cuts > 1500
    # other cuts change the tokens
    assert encode_prompt("a\n\n") + encode_prompt("b") != encode_prompt("a\n\nb")


@pytest.mark.parametrize("chunk_bytes", [64, 300, 5000])
def test_text_read_in_chunks_equals_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    """With EOT delimiters, all kinds of line ends and long words."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    rng = random.Random(chunk_bytes)
    text = "<|endoftext|>".join(
        "x" + awkward_text(rng, rng.choice([3, 30, 3000])) + "y" * rng.choice([0, 500])
        for _ in range(12)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", PrepareConfig(val_ratio=0), workers=3)
    whole = GPT2.encode_corpus((tmp_path / "a.txt").read_text(encoding="utf-8"))
    assert store_tokens(tmp_path / "out") == (whole.tolist(), [])


@pytest.mark.parametrize(
    ("chunk_bytes", "split", "size"), [(40, "hash", 150), (40, "ratio", 30), (1 << 20, "hash", 30)]
)
def test_byte_order_marks_and_line_ends_change_neither_tokens_nor_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, split: Any, size: int
) -> None:
    """A text written on Windows gives the same store, in chunks too."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", chunk_bytes)
    rng = random.Random(size)
    words = ["one", " two", "\n", "\n\n", "  ", "ü", "🦜", "x" * 60]
    texts = ["<|endoftext|>".join("".join(rng.choice(words) for _ in range(size)) + f" {i} {j}."
                                  for j in range(3)) for i in range(8)]  # fmt: skip
    stores = []
    for name, mark, end in [("a", b"", "\n"), ("b", codecs.BOM_UTF8, "\r\n"), ("c", b"", "\r")]:
        folder = tmp_path / name
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt").write_bytes(mark + text.replace("\n", end).encode())
        if split == "hash":
            settings = PrepareConfig(val_ratio=0.3)
        else:  # the cut by ratio depends on the bytes
            settings = PrepareConfig(split="ratio", val_ratio=0)
        prepare([str(folder)], tmp_path / f"{name}-out", settings, workers=2)
        stores.append(store_tokens(tmp_path / f"{name}-out"))
    assert stores[0] == stores[1] == stores[2]
    if split == "ratio":
        assert stores[0][0] == GPT2.encode_corpus(read_corpus(str(tmp_path / "b"))).tolist()
