"""Other tokenizers than GPT-2's: a small one that is trained on the story, and texts to compare on."""

import bz2
import json
import random
from functools import cache
from pathlib import Path

import pytest

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.tokenizer_json import train_byte_level
from helpers import ROOT

SHARED = ROOT.parent / "shared" / "data"
OWN_VOCAB_SIZE = 500


@cache
def own_file(vocab_size: int = OWN_VOCAB_SIZE) -> bytes:
    """A ``tokenizer.json`` that is trained on the sample story."""
    pytest.importorskip("tokenizers")
    return train_byte_level(iter(read_corpus("sample").split("\n\n")), vocab_size)


def write_own(folder: Path, vocab_size: int = OWN_VOCAB_SIZE) -> Path:
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(own_file(vocab_size))
    return folder


def shared_documents(count: int) -> list[str]:
    """Documents of public corpora; the test is skipped where they are not."""
    paths = [SHARED / name for name in ("wikitext-2-valid.txt", "tinyshakespeare.txt")]
    packed = SHARED / "hellaswag_val.txt.bz2"
    if not packed.is_file() or not all(path.is_file() for path in paths):
        pytest.skip(f"needs the corpora of {SHARED}")
    texts = [path.read_text(encoding="utf-8") for path in paths]
    documents = [part for text in texts for part in text.split("\n\n") if part.strip()]
    documents += bz2.decompress(packed.read_bytes()).decode().splitlines()
    assert len(documents) >= count
    return random.Random(1).sample(documents, count)


def random_string(rng: random.Random) -> str:
    """White space of all kinds, words, punctuation, all planes of Unicode, parts of special tokens."""
    parts = (" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x00", "word", "Every", "'s",
             "'LL", "42", "007", "...", "!?", "<|", "|>", "endoftext", "<|user|>", "é", "e\u0301", "ß", "語", "🦜",
             "👩‍👩‍👧", "\u200b", "\ufeff", "\ufffd", "ﷺ", "İ")  # fmt: skip
    text = ""
    for _ in range(rng.randrange(1, 12)):
        if rng.random() < 0.3:
            code = rng.choice(
                (rng.randrange(0x80), rng.randrange(0xD800), rng.randrange(0xE000, 0x110000))
            )
            text += chr(code)
        else:
            text += rng.choice(parts)
    return text


def edit_own(path: Path, **changes: object) -> Path:
    """Change keys of a ``tokenizer.json``; ``model`` is merged."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if key == "model":
            content["model"] |= value
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
