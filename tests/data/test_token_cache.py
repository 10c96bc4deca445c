"""Tokens in the cache: made once, made again if damaged."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import token_cache
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.storage.checksum import MANIFEST
from helpers import mutate
from token_stores import SAMPLE


def test_tokens_of_a_long_text_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text or ratio has another store."""
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 1000)
    path = tmp_path / "mine.txt"
    path.write_text(SAMPLE)
    first = token_cache.read_splits(str(path), 0.5)
    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "read_corpus", None)
        again = token_cache.read_splits(str(path), 0.5)
        with pytest.raises(TypeError):
            token_cache.read_splits(str(path), 0.6)
    assert [a.tolist() for (a,) in first] == [a.tolist() for (a,) in again]
    with monkeypatch.context() as patched:
        patched.setattr(token_cache, "_READER", "1")  # as another version wrote it
        patched.setattr(token_cache, "read_corpus", None)
        with pytest.raises(TypeError):
            token_cache.read_splits(str(path), 0.5)
    path.write_text(SAMPLE[1:])
    (changed,), _ = token_cache.read_splits(str(path), 0.5)
    assert changed.tolist() == GPT2.encode_corpus(SAMPLE[1:][: len(SAMPLE[1:]) // 2]).tolist()


@pytest.mark.parametrize(
    "what",
    [
        "train-00000.bin",
        pytest.param("val-00000.bin", marks=pytest.mark.slow),
        pytest.param(MANIFEST, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.usefixtures("messages")
def test_damaged_cached_tokens_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """The tokens always equal those of the text."""
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "MIN_CACHED_BYTES", 100)
    text = tmp_path / "mine.txt"
    text.write_text("Every effort moves you. " * 200)
    split = int(0.8 * len(text.read_text()))
    expected = [GPT2.encode_corpus(text.read_text()[:split]),
                GPT2.encode_corpus(text.read_text()[split:])]  # fmt: skip

    def are_right(found: token_cache.Splits) -> bool:
        return all(
            np.array_equal(*pair) for pair in zip([a for (a,) in found], expected, strict=True)
        )

    assert are_right(token_cache.read_splits(str(text), 0.8))
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    original = (folder / what).read_bytes()
    rng = random.Random(what)
    made_again = 0
    for _ in range(200):
        (folder / what).write_bytes(mutate(original, rng))
        assert are_right(token_cache.read_splits(str(text), 0.8))
        made_again += "is damaged; tokenizing again" in caplog.text
        caplog.clear()
    assert made_again > 150
    assert isinstance(token_cache.read_splits(str(text), 0.8).training[0], np.memmap)
    assert [path.name for path in (tmp_path / "cache" / "tokens").iterdir()] == [folder.name]
    # without a cache folder the text is tokenized
    shutil.rmtree(tmp_path / "cache" / "tokens")
    (tmp_path / "cache" / "tokens").write_text("a file")
    assert are_right(token_cache.read_splits(str(text), 0.8))
