"""The output folder: files of others stay, a prepared store is not prepared again."""

from pathlib import Path

import pytest

from gpt_lightning.data.prepare import chunk
from helpers import Command, assert_refused
from token_stores import GOOD, PARAGRAPHS, read_files, write_lines


def test_folder_with_other_content_is_refused(
    command: Command, tmp_path: Path, prepared: Path
) -> None:
    before = read_files(prepared)
    result = command("prepare", "rows.jsonl", f"--out={prepared}", "--shard_tokens=3000")
    assert result.code == 0
    assert "is already prepared, from the same inputs" in result.err
    write_lines(tmp_path / "other.jsonl", PARAGRAPHS)
    same = (f"--out={prepared}", "--shard_tokens=3000")
    assert_refused(
        command("prepare", "other.jsonl", *same), "holds a store of other inputs", "other.jsonl"
    )
    assert_refused(command("prepare", "rows.jsonl", "other.jsonl", *same), "other.jsonl")
    assert_refused(
        command("prepare", "rows.jsonl", f"--out={prepared}"),
        "was started with --shard_tokens 3000",
    )
    assert read_files(prepared) == before
    (prepared / "train-00001.bin").write_bytes(before["train-00001.bin"][:-2])
    assert_refused(command("prepare", "rows.jsonl", *same), "train-00001.bin: is damaged")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    assert_refused(
        command("prepare", "rows.jsonl", "--out=photos"), "photos: holds something else (cat.jpg)"
    )
    assert_refused(
        command("prepare", "rows.jsonl", "--out=rows.jsonl"), "rows.jsonl: is not a folder"
    )


@pytest.mark.parametrize("name", ["mine.bin", "train-00000.bin", "progress.json"])
def test_files_of_others_are_kept(command: Command, tmp_path: Path, name: str) -> None:
    """In a folder without progress or manifest of prepare, under any name."""
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"{\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    assert_refused(
        command("prepare", "rows.jsonl", "--out=out"), f"out: holds something else ({name})"
    )
    assert read_files(tmp_path / "out") == {name: b"precious"}


def test_files_beside_an_unfinished_store_are_kept(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS)
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b"{\n")
    arguments = ("prepare", "rows.jsonl", "--out=out", "--shard_tokens=1000", "--val_ratio=0")
    assert_refused(command(*arguments), "is not JSON")
    (tmp_path / "out" / "mine.bin").write_text("precious")
    assert command(*arguments, "--on_error=skip").code == 0
    assert (tmp_path / "out" / "mine.bin").read_text() == "precious"
