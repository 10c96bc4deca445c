"""Rows of JSON Lines, Parquet and datasets: the same documents from each, bad rows refused or skipped."""

import gzip
import random
import sys
from pathlib import Path

import pytest

from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.chunk import content_hash, split_of
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, encode_prompt
from helpers import Command, assert_refused, python
from token_stores import (
    KINDS,
    PARAGRAPHS,
    awkward_text,
    documents_of,
    interrupted_everywhere,
    read_files,
    store_tokens,
    write_lines,
    written_as,
)


def test_byte_order_marks_of_rows_are_removed(tmp_path: Path) -> None:
    """At the start of a file and of a text; line ends within a text are kept."""
    content = (
        '\ufeff{"text": "\ufeffone\\r\\n"}\r\n{"text": "two"}\r\n{"text": "\ufeff"}\r\n'.encode()
    )
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "b.jsonl.gz"):
        prepare([str(tmp_path / name)], tmp_path / f"{name}-out", PrepareConfig(val_ratio=0))
        assert documents_of(store_tokens(tmp_path / f"{name}-out")[0]) == ["one\r\n", "two"]


def test_a_row_that_is_not_utf8_is_named(command: Command, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = pyarrow.array(
        [b"good", b"caf\xe9", b"\xef\xbb\xbfmark", b"\xff\xfex\x00"], pyarrow.binary()
    )
    texts = pyarrow.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    arguments = ("prepare", "a.parquet", "--out=store", "--val_ratio=0")
    assert_refused(
        command(*arguments), "a.parquet, row 2: is not UTF-8 (byte 3: unexpected end of data); "
    )
    result = command(*arguments, "--on_error=skip")
    assert "skipped: a.parquet, row 4: is UTF-16, not UTF-8" in result.err
    assert documents_of(store_tokens(Path("store"))[0]) == ["good", "mark"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_formats_give_the_same_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The documents are equal, and a preparation interrupted after any chunk gives the same store."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 3000)
    rng = random.Random(3)
    texts = [awkward_text(rng, rng.choice([1, 20, 300])) + f" {i}" for i in range(700)]
    path = written_as(tmp_path, kind, texts)
    settings = PrepareConfig(val_ratio=0.2, shard_tokens=4000)
    prepare([str(path)], tmp_path / "out", settings, workers=2)
    train, val = store_tokens(tmp_path / "out")
    for ids, split in [(train, "train"), (val, "val")]:
        expected = [t for t in texts if split_of(content_hash(t.encode()), 0.2) == split]
        assert documents_of(ids) == expected
    assert 80 < len(documents_of(val)) < 210
    interrupted_everywhere([str(path)], tmp_path / "cut", settings, every=7)
    assert read_files(tmp_path / "cut") == read_files(tmp_path / "out")


def test_an_end_of_text_in_a_row_is_plain_text(tmp_path: Path) -> None:
    texts = ["one <|endoftext|> two", "three"]
    path = write_lines(tmp_path / "rows.jsonl", texts)
    prepare([str(path)], tmp_path / "out", PrepareConfig(val_ratio=0))
    ids, _ = store_tokens(tmp_path / "out")
    assert ids.count(END_OF_TEXT_ID) == 1
    assert ids == [*encode_prompt(texts[0]), END_OF_TEXT_ID, *encode_prompt(texts[1])]


@pytest.mark.parametrize(
    ("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_missing_library_is_named(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    # without --quiet a line says that the extra fast is missing, which pyarrow belongs to
    result = command("prepare", name, "--out=store", "--quiet")
    assert_refused(result, f"{name}: needs {library} to be read; pip install 'gpt-lightning[data]'")


def test_missing_library_is_not_skipped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    result = command("prepare", "a.jsonl.zst", "--out=store", "--on_error=skip")
    assert_refused(result, "a.jsonl.zst: needs zstandard to be read")


def test_parquet_without_the_field_is_refused(command: Command, tmp_path: Path) -> None:
    path = written_as(tmp_path, ".parquet", ["x"])
    assert_refused(
        command("prepare", str(path), "--field=content", "--out=store"),
        "has no text content (but id, text)", "--field",
    )  # fmt: skip
    assert_refused(
        command("prepare", str(path), "--field=id", "--out=store"),
        "has no text id, but int64; name",
    )


@pytest.mark.parametrize("kind", ["string_view", "dictionary"])
def test_parquet_with_other_types_of_strings_is_read(
    command: Command, tmp_path: Path, kind: str
) -> None:
    """As polars and the categories of pandas write them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([f"{i % 40} {PARAGRAPHS[i % 40]}" for i in range(700)])
    other = texts.dictionary_encode() if kind == "dictionary" else texts.cast(pyarrow.string_view())
    for name, column in [("plain", texts), ("other", other)]:
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        result = command("prepare", f"{name}.parquet", f"--out={name}", "--val_ratio=0.3")
        assert result.code == 0, result.err
    kinds = parquet.read_schema(tmp_path / "other.parquet").field("text").type
    assert kind in str(kinds)
    assert store_tokens(Path("other")) == store_tokens(Path("plain"))


def test_highly_compressed_file_takes_no_memory(tmp_path: Path) -> None:
    """Peak RSS for 5 and for 80 MB of text."""
    zstandard = pytest.importorskip("zstandard")
    code = ("import sys; from gpt_lightning.cli.main import main; assert main(sys.argv[1:]) == 0; "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")  # fmt: skip
    empty = b'{"text": "' + b" " * (1 << 20) + b'"}\n'
    peaks = []
    for times in (5, 80):
        path = tmp_path / f"{times}.jsonl.zst"
        compressor = zstandard.ZstdCompressor(level=19)
        path.write_bytes(compressor.compress(b'{"text": "one"}\n' + empty * times))
        assert path.stat().st_size < 20_000
        out = f"--out={tmp_path}/{times}"
        result = python("-c", code, "prepare", str(path), out, "--val_ratio=0", "--workers=1")
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40
