"""The tokenizer: GPT-2's, one per thread, with limits; its vocabulary files are verified."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from gpt_lightning.data import tokenizer
from gpt_lightning.data.tokenizer import (
    END_OF_TEXT_ID,
    GPT2,
    decode,
    encode_prompt,
    gpt2_encoding,
)
from helpers import mutate


def test_tokenizer_is_that_of_gpt2() -> None:
    assert gpt2_encoding().n_vocab == 50257
    assert encode_prompt("Every effort moves you") == [6109, 3626, 6100, 345]
    text = "Ünïcode, emoji 🦜, tabs\tand\n\nnewlines  with   spaces"
    assert decode(encode_prompt(text)) == text


def test_too_many_blanks_are_refused() -> None:
    """They overflow the stack of tiktoken's regular expressions."""
    for encode in (GPT2.encode_corpus, encode_prompt):
        with pytest.raises(
            ValueError, match="has more blanks in a row than the tokenizer can read"
        ):
            encode("a" + " " * 1_100_000 + "b")


def test_each_thread_has_its_own_encoding() -> None:
    """A shared encoding costs two threads up to 1.6 times the processor time: see its docstring."""
    with ThreadPoolExecutor(1) as pool:
        of_another = pool.submit(gpt2_encoding).result()
    assert gpt2_encoding() is gpt2_encoding() is not of_another
    assert of_another.encode("Every effort") == gpt2_encoding().encode("Every effort")


def test_end_of_text_is_a_token_in_a_corpus_and_plain_text_in_a_prompt() -> None:
    text = "one<|endoftext|>two"
    assert GPT2.encode_corpus(text).tolist().count(50256) == 1
    assert 50256 not in encode_prompt(text)
    assert encode_prompt(text, special=True).count(50256) == 1


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_lone_surrogates_are_refused(text: str) -> None:
    for encode in (GPT2.encode_corpus, encode_prompt):
        with pytest.raises(ValueError, match="is not valid UTF-8"):
            encode(text)


def test_surrogate_pairs_are_one_character() -> None:
    assert encode_prompt("\ud83e\udd9c") == encode_prompt("🦜")


def test_documents_encoded_together_equal_documents_encoded_alone() -> None:
    """Documents may hold a part of the EOT delimiter or all of it."""
    rng = random.Random(4)
    parts = ["<|", "endoftext", "|>", "<|endoftext|>", " ", "\n", "a", "<", ">"]
    for _ in range(300):
        texts = ["".join(rng.choices(parts, k=rng.randrange(1, 6))) for _ in range(3)]
        one, two, three = map(encode_prompt, texts)
        assert GPT2.encode_documents(texts).tolist() == [
            *one,
            END_OF_TEXT_ID,
            *two,
            END_OF_TEXT_ID,
            *three,
        ]


def test_ranks_are_those_of_tiktoken() -> None:
    files = {name: tokenizer.vocabulary_file(name) for name in ("vocab.bpe", "encoder.json")}
    assert tokenizer.token_ranks() == data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=files["vocab.bpe"], encoder_json_file=files["encoder.json"]
    )


@pytest.mark.parametrize(
    ("name", "read"), [("encoder.json", tokenizer.token_ids), ("vocab.bpe", tokenizer.merges)]
)
def test_damaged_vocabulary_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Any
) -> None:
    expected = read()
    rng = random.Random("vocabulary")
    original = Path(tokenizer.vocabulary_file(name)).read_bytes()
    for i in range(20):
        damaged = tmp_path / f"{i}{name}"
        damaged.write_bytes(mutate(original, rng))
        monkeypatch.setattr(tokenizer, "vocabulary_file", {name: str(damaged)}.__getitem__)
        read.cache_clear()
        with pytest.raises(ValueError, match="is damaged; reinstall") as caught:
            read()
        assert "\n" not in str(caught.value)
    monkeypatch.undo()
    read.cache_clear()
    assert read() == expected
