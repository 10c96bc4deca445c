"""Unreadable input: refused in one line, or skipped and counted."""

import gzip
import json
import os
from pathlib import Path

import pytest

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig
from helpers import Command, assert_refused
from token_stores import (
    GOOD,
    PARAGRAPHS,
    documents_of,
    interrupted_everywhere,
    read_files,
    store_tokens,
    write_lines,
    written_as,
)

BLANKS = json.dumps({"text": "a" + " " * 1_500_000 + "b"}).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.jsonl", GOOD + b"{broken\n", "a.jsonl, line 2: is not JSON; "),
        ("a.jsonl", GOOD + b'{"text": "cut', "a.jsonl, line 2: is not JSON; "),
        ("a.jsonl", GOOD + b"\n" + b'"text"\n', "a.jsonl, line 3: is not a JSON object; "),
        ("a.jsonl", GOOD + b'{"content": "x"}\n', "line 2: lacks the field text; name the text's with --field"),
        ("a.jsonl", GOOD + b'{"text": null}\n', "line 2: text is null, not text"),
        ("a.jsonl", GOOD + b'{"text": 3}\n', "line 2: text is a int, not text"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', "line 2: text holds half a surrogate pair"),
        ("a.jsonl", GOOD + b"[" * 100_000 + b"\n", "line 2: is not JSON"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', "line 2: is not UTF-8 (byte 27: invalid start byte)"),
        ("a.txt", b"good<|endoftext|>bad \xff", "a.txt: is not UTF-8 (byte 21: invalid start byte); convert it"),
        ("a.txt", b"long " * 1000 + b"\xe2\x82", "a.txt: is not UTF-8 (byte 5000: unexpected end of data)"),
        ("a.txt", b"long " * 900 + b"\xff" + b"long " * 900 + b"<|endoftext|>x", "is not UTF-8 (byte 4500"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], "a.jsonl.gz: is damaged ("),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: is damaged ("),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: is damaged ("),
        ("a.parquet", b"no parquet", "a.parquet: is damaged ("),
        ("a.txt", "text".encode("utf-16"), "a.txt: is UTF-16, not UTF-8; convert it to UTF-8"),
        ("a.txt", ("text " * 900).encode("utf-16"), "a.txt: is UTF-16, not UTF-8; convert it"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "a.jsonl, line 1: is UTF-16, not UTF-8; "),
        ("a.txt", b"\xef\xbb\xbfgood \xff", "a.txt: is not UTF-8 (byte 8: invalid start byte)"),
        ("a.txt", b"\xef\xbb\xbf\r\n", "a.txt: holds no document with text"),
        ("a.txt", b" \n\n ", "a.txt: holds no document with text"),
        ("a.jsonl", b"", "a.jsonl: holds no document with text"),
        ("a.jsonl", GOOD + BLANKS, "a.jsonl, line 2: has more blanks in a row than the tokenizer"),
        ("a.txt", b"a" + b" " * 1_500_000 + b"b", "a.txt, from byte 1: has more blanks in a row"),
        ("a.csv", b"a,b", "a.csv: is of an unknown kind; give .txt, .md, .jsonl"),
    ],
)  # fmt: skip
def test_unreadable_input_is_refused(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    part: str,
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1 << 20 if b" " * 9999 in content else 1000)
    (tmp_path / name).write_bytes(content)
    assert_refused(command("prepare", name, "--out=deep/store", "--val_ratio=0"), part)
    assert set(os.listdir(tmp_path)) - {"cache"} == {name}  # a slow machine caches a checksum


def test_skipped_documents_are_counted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n" + GOOD + b'{"text": " "}\n' + b'{"x": 1}\n')
    (tmp_path / "b.txt").write_bytes(b"long " * 900 + b"\xff<|endoftext|>good<|endoftext|>bad\xff")
    arguments = ("prepare", "a.jsonl", "b.txt", "--out=store", "--val_ratio=0", "--on_error=skip")
    result = command(*arguments, "--json")
    assert result.code == 0
    output = json.loads(result.out)
    assert (output["documents"]["train"], output["skipped"], output["empty"]) == (3, 4, 1)
    assert result.err.splitlines()[:2] == [
        "skipped: a.jsonl, line 2: is not JSON",
        "skipped: a.jsonl, line 5: lacks the field text",
    ]
    assert documents_of(store_tokens(Path("store"))[0]) == ["good"] * 3


def test_documents_the_tokenizer_cannot_read_are_skipped(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + BLANKS + GOOD)
    arguments = ("prepare", "a.jsonl", "--out=store", "--val_ratio=0", "--on_error=skip")
    result = command(*arguments, "--json")
    assert (result.code, json.loads(result.out)["skipped"]) == (0, 1)
    assert "skipped: a.jsonl, line 2: has more blanks in a row" in result.err
    assert documents_of(store_tokens(Path("store"))[0]) == ["good"] * 2


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(".jsonl.gz", "cut"), (".jsonl.gz", "zeros"), (".jsonl.zst", "cut"), (".parquet", "zeros")],
)
def test_rest_of_a_damaged_file_is_skipped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    """It counts as one; the store is the same with any number of workers and after interruptions."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    texts = [f"{i} {p}" for i in range(6) for p in PARAGRAPHS]
    path = written_as(tmp_path, kind, texts)
    content = path.read_bytes()
    middle = len(content) * 2 // 3
    path.write_bytes(
        content[:middle] + (bytes(200) + content[middle + 200 :] if damage == "zeros" else b"")
    )
    write_lines(tmp_path / "z.jsonl", PARAGRAPHS)
    inputs = [path.name, "z.jsonl"]
    settings = ("--shard_tokens=3000", "--val_ratio=0.2")
    assert_refused(command("prepare", *inputs, *settings, "--out=stopped"), path.name)
    for workers in (1, 3):
        out = f"--out={workers}"
        result = command("prepare", *inputs, *settings, out, f"--workers={workers}",
                       "--on_error=skip", "--json")  # fmt: skip
        assert result.code == 0, result.err
        output = json.loads(result.out)
        # zeros within gzip's data first decode to another text
        assert output["skipped"] == 1 or (kind, damage) == (".jsonl.gz", "zeros")
        assert f"skipped: {path.name}: is damaged (" in result.err
        assert len(PARAGRAPHS) < sum(output["documents"].values()) < 7 * len(PARAGRAPHS)
    shards = PrepareConfig(val_ratio=0.2, shard_tokens=3000)
    assert interrupted_everywhere(inputs, tmp_path / "cut", shards, 3, skip=True) > 2
    assert read_files(Path("1")) == read_files(Path("3")) == read_files(Path("cut"))
    # a preparation that stopped at the damage resumes
    assert command("prepare", *inputs, *settings, "--out=stopped", "--on_error=skip").code == 0
    assert read_files(Path("stopped")) == read_files(Path("1"))
    by_ratio = command("prepare", *inputs, "--split=ratio", "--out=ratio", "--on_error=skip")
    assert by_ratio.code == 0, by_ratio.err


def test_the_unreadable_text_of_a_few_is_named(command: Command, tmp_path: Path) -> None:
    """The first is alone in its split, but readable."""
    for name, text in [("a.txt", b" "), ("b.txt", b"one"), ("c.txt", b"bad \xff")]:
        (tmp_path / name).write_bytes(text)
    assert_refused(
        command("prepare", "a.txt", "b.txt", "c.txt", "--out=out"), "c.txt: is not UTF-8"
    )
    assert_refused(
        command("prepare", "a.txt", "b.txt", "--out=out"), "split: b.txt is one document"
    )
