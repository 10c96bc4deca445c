"""A ``tokenizer.json`` as tokenizer: the ids of ``tokenizers``, its bytes, and files that are refused."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data import token_cache, tokenizer_json
from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import GPT2, byte_characters
from gpt_lightning.data.tokenizer_json import (
    added_token,
    file_of,
    gpt2_content,
    read_tokenizer,
    tokenizer_from,
)
from helpers import mutate
from own_tokenizers import edit_own, own_file, random_string, shared_documents, write_own

tokenizers = pytest.importorskip("tokenizers")


def with_added(file: bytes, *tokens: str, special: bool = False) -> bytes:
    content = json.loads(file)
    first = tokenizer_from(file, "x").vocab_size
    content["added_tokens"] += [
        added_token(token, i, special=special) for i, token in enumerate(tokens, first)
    ]
    return file_of(content)


def llama_like(file: bytes) -> bytes:
    """Another pattern, in a sequence with ByteLevel, as Llama 3 and Qwen have it, and a normalizer."""
    content = json.loads(file)
    pattern = (
        r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}  # fmt: skip
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}  # fmt: skip
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    content["normalizer"] = {"type": "NFC"}
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}  # fmt: skip
    return file_of(content)


FILES: dict[str, Callable[[], bytes]] = {
    "trained": own_file,
    "added": lambda: with_added(own_file(), "<|user|>", "🦜🦜"),
    "llama": lambda: llama_like(own_file()),
    "gpt2+added": lambda: with_added(file_of(gpt2_content()), "<|user|>"),
}


def reference(file: bytes) -> Any:
    loaded = tokenizers.Tokenizer.from_str(file.decode())
    loaded.no_truncation()
    loaded.encode_special_tokens = True  # a text may hold <|endoftext|>
    return loaded


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_tokenizers(name: str) -> None:
    """On 20,000 random strings, each alone, as a prompt and among documents."""
    file = FILES[name]()
    ours, theirs = tokenizer_from(file, name), reference(file)
    rng = random.Random(name)
    texts = [random_string(rng) for _ in range(20_000)]
    expected = [encoding.ids for encoding in theirs.encode_batch_fast(texts)]
    delimited = [[*ids, ours.end_of_text_id] for ids in expected]
    assert ours.encode_documents(texts).tolist() == [i for ids in delimited for i in ids][:-1]
    for text, ids in zip(texts[:500], expected, strict=False):
        assert ours.encode_prompt(text) == ids
        if name != "llama":  # a normalizer changes the text
            assert ours.decode(ids) == text


@pytest.mark.parametrize("name", FILES)
def test_ids_of_documents_are_those_of_tokenizers(name: str) -> None:
    file = FILES[name]()
    ours, theirs = tokenizer_from(file, name), reference(file)
    documents = shared_documents(10_000)
    expected = [encoding.ids for encoding in theirs.encode_batch_fast(documents)]
    delimited = [[*ids, ours.end_of_text_id] for ids in expected]
    ids = ours.encode_documents(documents)
    assert ids.dtype == np.uint16
    assert ids.tolist() == [i for ids in delimited for i in ids][:-1]
    text_bytes = sum(len(document.encode()) for document in documents)
    if name != "llama":
        assert ours.byte_lengths[ids.astype(np.int64)].sum() == text_bytes


def test_gpt2s_file_is_gpt2s_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(file_of(gpt2_content()))
    assert read_tokenizer(path) is read_tokenizer(tmp_path) is GPT2


def test_gpt2_with_an_added_token_has_gpt2s_ids_elsewhere() -> None:
    extended = tokenizer_from(FILES["gpt2+added"](), "x")
    assert extended.vocab_size == GPT2.vocab_size + 1
    rng = random.Random(3)
    for text in [random_string(rng).replace("<|user|>", "") for _ in range(5000)]:
        assert extended.encode_prompt(text) == GPT2.encode_prompt(text), repr(text)


@pytest.mark.parametrize("name", FILES)
def test_long_documents_are_cut_where_tokens_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 6000)
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 1 << 40)
    own = tokenizer_from(FILES[name](), name)
    rng = random.Random(9)
    parts = ["word", " two", " 3", "!?", "?\n", "\n\n", " <|user|>", "é", " ", "\t", "'s"]
    text = "".join(rng.choices(parts, k=30_000))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    settings = PrepareConfig(val_ratio=0)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", settings, tokenizer=own, workers=2)
    (stored,), _ = token_cache.read_splits(str(tmp_path / "out"), 1.0, own)
    assert stored.tolist() == own.encode_corpus(text).tolist()


def test_special_tokens_are_plain_characters_unless_asked_for() -> None:
    own = tokenizer_from(with_added(own_file(), "<|pad|>", special=True), "own")
    text = "one<|endoftext|>two<|pad|>"
    plain, special = own.encode_prompt(text), own.encode_prompt(text, special=True)
    assert own.end_of_text_id not in plain
    assert special.count(own.end_of_text_id) == special.count(own.vocab_size - 1) == 1
    assert own.decode(plain) == own.decode(special) == text
    corpus = own.encode_corpus(text).tolist()
    assert corpus.count(own.end_of_text_id) == 1
    assert own.vocab_size - 1 not in corpus
    assert own.decode([0, 10**6]) == "<|endoftext|>\ufffd"


def test_surrogates_are_joined_or_refused() -> None:
    own = tokenizer_from(own_file(), "own")
    assert own.encode_prompt("\ud83e\udd9c") == own.encode_prompt("🦜")
    with pytest.raises(ValueError, match="prompt: is not valid UTF-8"):
        own.encode_prompt("caf\udce9")


def test_layout_of_the_file_does_not_matter() -> None:
    own = tokenizer_from(own_file(), "own")
    content = json.loads(own_file())
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_id": 0,
                          "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}  # fmt: skip
    again = tokenizer_from(json.dumps(content).encode(), "again")
    assert own.checksums != again.checksums
    assert own.equals(again)
    assert again.equals(own)
    assert not own.equals(tokenizer_from(own_file(400), "own"))
    assert not own.equals(GPT2)
    assert (
        again.encode_documents(["a", "Every effort"]).tolist()
        == own.encode_documents(["a", "Every effort"]).tolist()
    )


def test_tokenizer_can_be_pickled() -> None:
    own = pickle.loads(pickle.dumps(tokenizer_from(own_file(), "own")))
    assert own.decode(own.encode_prompt("The tower clock")) == "The tower clock"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "word piece": ({"model": {"type": "WordPiece"}}, "holds a WordPiece tokenizer"),
    "not ByteLevel": (
        {"pre_tokenizer": {"type": "Whitespace"}},
        "is not byte-level BPE: its pre_tokenizer is not ByteLevel",
    ),
    "no decoder": ({"decoder": None}, "is not byte-level BPE: its decoder is not ByteLevel"),
    "dropout": ({"model": {"dropout": 0.1}}, "has dropout 0.1"),
    "suffix": ({"model": {"end_of_word_suffix": "</w>"}}, "has end_of_word_suffix '</w>'"),
    "bytes": ({"model": {"vocab": {"a": 0, "<|endoftext|>": 1}}}, "is not byte-level BPE: it lacks tokens of 255 of the 256"),
    "no delimiter": (
        {"added_tokens": [], "model": {"vocab": {c: i for i, c in enumerate(byte_characters())},
                                       "merges": []}},
        "has no token that ends a document",
    ),
    "ids": ({"added_tokens": [added_token("<|endoftext|>", 1 << 40, special=True)]}, "has ids that"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    changes, cause = REFUSED[name]
    path = edit_own(write_own(tmp_path / "own") / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match=r"; give a tokenizer\.json of byte-level BPE") as caught:
        read_tokenizer(path)
    assert str(caught.value).startswith(f"tokenizer: {path} {cause}"), caught.value


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    """Or they are another tokenizer, that decodes what it encodes."""
    original = own_file()
    rng = random.Random(8)
    path = tmp_path / "tokenizer.json"
    refused = 0
    for _ in range(150):
        path.write_bytes(mutate(original, rng))
        message = ""
        try:
            damaged = read_tokenizer(path)
            damaged.decode(damaged.encode_prompt("The tower clock"))
        except ValueError as error:
            message = str(error)
        assert message == "" or message.startswith(f"tokenizer: {path} ")
        assert "\n" not in message
        refused += bool(message)
    assert refused > 75


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_json, "find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"pip install 'gpt-lightning\[tokenizers\]'"):
        tokenizer_from(own_file(300), "own")
