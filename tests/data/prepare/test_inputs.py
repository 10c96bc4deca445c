"""Inputs: files, folders, globs, links, a configuration."""

import json
import os
from pathlib import Path

import pytest

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import GPT2
from helpers import Command, assert_refused
from token_stores import PARAGRAPHS, documents_of, store_tokens


def test_folder_equals_what_data_text_reads(tmp_path: Path) -> None:
    folder = tmp_path / "texts" / "more"
    folder.mkdir(parents=True)
    for i, paragraph in enumerate(PARAGRAPHS[:9]):
        (folder.parent if i % 2 else folder).joinpath(f"{i}.txt").write_text(paragraph)
    (folder / "z.csv").write_text("a,b")
    prepare([str(folder.parent)], tmp_path / "out", PrepareConfig(val_ratio=0))
    expected = GPT2.encode_corpus(read_corpus(str(folder.parent)))
    assert store_tokens(tmp_path / "out")[0] == expected.tolist()


def test_hidden_files_and_second_links_are_left_out(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in data.text."""
    for name in ("g/.git", "g/.ipynb_checkpoints", "g/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").write_text(f"in {name}")
    (tmp_path / "g" / "._a.jsonl").write_bytes(b"\xff")
    (tmp_path / "g" / "2.txt").write_text("text")
    (tmp_path / "g" / "3.txt").symlink_to("2.txt")
    (tmp_path / "g" / "4.txt").hardlink_to(tmp_path / "g" / "2.txt")
    for out, name in [("glob", "g/*"), ("folder", "g")]:
        result = command("prepare", name, f"--out={out}", "--val_ratio=0", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["sources"] == 2
        assert sorted(documents_of(store_tokens(Path(out))[0])) == ["in g/a", "text"]
    assert "g: left out: 3 hidden files or folders (._a.jsonl, .git, .ipynb_ch" in result.err
    assert "2 links to files already read (3.txt, 4.txt)" in result.err
    assert (
        documents_of(store_tokens(Path("folder"))[0]) == read_corpus("g").split("<|endoftext|>")[:2]
    )
    assert_refused(
        command("prepare", "g/.git/1.txt", "--out=x", "--split=hash"), "1.txt is one document"
    )


def test_inputs_of_a_config(command: Command, tmp_path: Path) -> None:
    """Inputs are a text or a list; inputs of the command line replace them."""
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "b.txt").write_text("second")
    for i, (config, more, expected) in enumerate([
        ("inputs: a.txt", [], ["first"]),
        ("inputs: [a.txt, b.txt]", [], ["first", "second"]),
        ("inputs: a.txt", ["b.txt"], ["second"]),
    ]):  # fmt: skip
        (tmp_path / "mine.yaml").write_text(
            f"{config}\nval_ratio: 0\nout: {i}-out\n".replace("out: ", "out: x")
        )
        result = command("prepare", *more, "--config=mine.yaml")
        assert result.code == 0, result.err
        assert documents_of(store_tokens(Path(f"x{i}-out"))[0]) == expected


def test_folders_that_a_glob_matches_and_links_are_read(command: Command, tmp_path: Path) -> None:
    for name in ("g/a/deep", "g/photos", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for i, name in enumerate(["g/a/deep/1.txt", "g/2.txt", "elsewhere/3.txt", "g/photos/cat.jpg"]):
        (tmp_path / name).write_text(f"text {i}")
    (tmp_path / "g" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "g")
    for out, name in [("glob", "g/*"), ("folder", "g")]:
        result = command("prepare", name, f"--out={out}", "--val_ratio=0", "--json")
        assert result.code == 0, result.err
        assert json.loads(result.out)["sources"] == 3
    texts = ["text 1", "text 0", "text 2"]
    assert documents_of(store_tokens(Path("folder"))[0]) == texts
    assert documents_of(store_tokens(Path("glob"))[0]) == texts
    assert read_corpus("g").split("<|endoftext|>") == texts
    assert_refused(command("prepare", "g/ph*", "--out=none"), "g/ph*: matches nothing to read")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere"], ["nowhere: does not exist"]),
        (["*.jsonl"], ["*.jsonl: matches nothing to read"]),
        (["."], [".: holds nothing to read"]),
        (["../one.txt"], ["one.txt is one document", "--split ratio"]),
        (["../two.txt", "--val_ratio=1e-9"], ["none of 2 document(s) is for validation"]),
        (["../two.txt", "--val_ratio=1"], ["val_ratio: 1.0"]),
        (["../two.txt", "--val_ratio=-0.1"], ["val_ratio: -0.1"]),
        (["../two.txt", "--shard_tokens=0"], ["shard_tokens: 0"]),
        (["../two.txt", "--workers=0"], ["workers: 0"]),
        (["../two.txt", "--split=half"], ["split"]),
        (["../two.txt", "--shard_tokns=5"], ["did you mean shard_tokens?"]),
        ([], ["nputs"]),
    ],
)
def test_unclear_inputs_are_refused(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    parts: list[str],
) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("one<|endoftext|>two")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert_refused(command("prepare", *arguments, "--out=store"), *parts)
    assert os.listdir(tmp_path / "here") == []
