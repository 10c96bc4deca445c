"""Token stores, the inputs that they are made of, and interrupted preparations."""

import gzip
import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.data import token_store
from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.token_store import open_store
from gpt_lightning.data.tokenizer import decode

SAMPLE = read_corpus("sample")


PARAGRAPHS = SAMPLE.split("\n\n")


def store_tokens(folder: Path) -> tuple[list[int], list[int]]:
    """A store's training and validation tokens."""
    train, val = open_store(folder).values()
    return np.concatenate(train).tolist(), np.concatenate(val).tolist()


def documents_of(ids: Sequence[int]) -> list[str]:
    return decode(ids).split("<|endoftext|>") if len(ids) else []


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_lines(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def awkward_text(rng: random.Random, size: int) -> str:
    """Text whose tokens change if it is cut in a wrong place: all kinds of white space and their neighbors."""
    parts = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "a", "Ünï",
             "'s", "'", "don't", "42", "7", "...", "!", "🦜", "語", "。", "word", "Every", "\u200b", "e\u0301"]  # fmt: skip
    return "".join(rng.choice(parts) for _ in range(size))


def written_as(folder: Path, kind: str, texts: Sequence[str]) -> Path:
    lines = write_lines(folder / "rows.jsonl", texts).read_bytes()
    if kind == ".jsonl":
        return folder / "rows.jsonl"
    (folder / "rows.jsonl").unlink()
    path = folder / f"rows{kind}"
    half = lines.index(b"\n", len(lines) // 2) + 1
    if kind == ".jsonl.gz":  # of two members, and two frames
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif kind == ".jsonl.zst":
        zstandard = pytest.importorskip("zstandard")
        frames = [zstandard.ZstdCompressor().compress(p) for p in (lines[:half], lines[half:])]
        path.write_bytes(b"".join(frames))
    elif kind == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = pyarrow.table({"id": list(range(len(texts))), "text": list(texts)})
        parquet.write_table(table, path, row_group_size=300)
    else:
        datasets = pytest.importorskip("datasets")
        # with its own fingerprint, for which datasets 5.2 would pickle what dill 0.4.1 does not
        table = datasets.table.InMemoryTable.from_pydict({"text": list(texts)})
        datasets.Dataset(table, fingerprint="made-here").save_to_disk(str(path))
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "-dataset"]


SHARDS = PrepareConfig(val_ratio=0.2, shard_tokens=5000)


def interrupted_everywhere(
    inputs: list[str], out: Path, settings: PrepareConfig, every: int, *, skip: bool = False
) -> int:
    """Prepare with an interrupt after each ``every`` chunks; return the number of interrupts."""
    for times in range(1000):
        seen = 0

        def interrupt(result: int, total: int, tokens: int, *, at: int = every) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise KeyboardInterrupt

        try:
            prepare(inputs, out, settings, workers=2, skip=skip, on_progress=interrupt)
            return times
        except KeyboardInterrupt:
            every += 1  # else a shard of so many chunks would never be complete
    raise AssertionError("it never ends")


GOOD = b'{"text": "good"}\n'


def as_earlier_version(store: Path, name: str) -> None:
    """Rewrite a manifest or progress as an earlier version wrote it: with a format, shards named .u16."""
    content = json.loads((store / name).read_text().replace(".bin", ".u16"))
    del content["sha256"], content["kind"]
    content = {"format": token_store.KIND, **content}
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (store / name).write_text(json.dumps({**content, "sha256": total}, indent=1) + "\n")
    for shard in store.glob("*.bin"):
        shard.rename(shard.with_suffix(".u16"))
