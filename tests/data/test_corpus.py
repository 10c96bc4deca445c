"""Texts and folders of texts: how they are read, what is left out."""

import os
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.tokenizer import GPT2


def test_sample_is_a_text_without_repetition() -> None:
    text = read_corpus("sample")
    assert len(text) >= 20_000
    paragraphs = text.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 50


def test_folder_is_its_files_in_order(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "b.txt").write_text("second", encoding="utf-8")
    (tmp_path / "a.md").write_text("first", encoding="utf-8")
    (tmp_path / "c.bin").write_bytes(b"\xff\xfe")
    assert read_corpus(str(tmp_path)) == "first<|endoftext|>second"


LINES = "One.\nTwo.\n\nThree, at the end.\n"


@pytest.mark.parametrize("name", ["file", "folder"])
@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINES.encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n").encode(),
    ],
    ids=["BOM", "CRLF", "CR", "both"],
)
def test_byte_order_marks_and_kinds_of_line_ends_do_not_change_the_text(
    tmp_path: Path, content: bytes, name: str
) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(content)
    text = read_corpus(str(path if name == "file" else tmp_path))
    assert text == LINES
    assert GPT2.encode_corpus(text).tolist() == GPT2.encode_corpus(LINES).tolist()


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused_by_name(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes(("\ufeff" * (encoding[-1] == "e") + LINES).encode(encoding))
    named = encoding[:6].upper()
    with pytest.raises(ValueError, match=f"a.txt is {named}, not UTF-8; convert it to UTF-8"):
        read_corpus(str(tmp_path))


def test_a_byte_order_mark_alone_is_an_empty_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\r\n")
    with pytest.raises(ValueError, match="is empty"):
        read_corpus(str(tmp_path / "a.txt"))


def test_hidden_files_and_second_links_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "texts"
    for name in (".ipynb_checkpoints", ".git", "more"):
        (folder / name).mkdir(parents=True)
        (folder / name / "b.txt").write_text(f"in {name}")
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    (folder / ".DS_Store").write_bytes(b"\xff")
    (folder / "a.txt").write_text("first")
    (folder / "c.txt").symlink_to("a.txt")
    (folder / "d.md").hardlink_to(folder / "a.txt")
    (folder / "e").symlink_to("more")
    assert read_corpus(str(folder)) == "first<|endoftext|>in more"
    assert read_corpus(str(folder)) == "first<|endoftext|>in more"
    (warning,) = caplog.messages
    hidden = "3 hidden files or folders (._a.txt, .git, .ipynb_checkpoints)"
    assert f"texts: left out: {hidden}, 2 links to files already read (c.txt, d.md)" in warning
    (tmp_path / ".texts").mkdir()  # a hidden file that is named is read
    (tmp_path / ".texts" / "a.txt").write_text("named")
    (tmp_path / ".b.txt").write_text("named too")
    assert read_corpus(str(tmp_path / ".texts")) == "named"
    assert read_corpus(str(tmp_path / ".b.txt")) == "named too"
    assert caplog.messages == [warning]


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path: str) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError):
        read_corpus(str(tmp_path))
