"""An interrupted prepare resumes to the same store, or is refused with what changed."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gpt_lightning.data import token_cache, token_store
from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.tokenizer import encode_prompt
from gpt_lightning.storage import checksum
from helpers import Command, assert_refused, python
from token_stores import (
    GOOD,
    PARAGRAPHS,
    SAMPLE,
    SHARDS,
    as_earlier_version,
    documents_of,
    interrupted_everywhere,
    read_files,
    store_tokens,
    write_lines,
)


def test_store_interrupted_after_any_chunk_equals_an_uninterrupted_one(
    corpus: list[str], whole: Path, tmp_path: Path
) -> None:
    for every in (1, 5):
        assert interrupted_everywhere(corpus, tmp_path / f"{every}", SHARDS, every) > 3
        assert read_files(tmp_path / f"{every}") == read_files(whole)


def test_store_split_by_ratio_interrupted_equals_an_uninterrupted_one(
    corpus: list[str], tmp_path: Path
) -> None:
    """The split falls into the long document."""
    settings = PrepareConfig("text", "ratio", 0.8, shard_tokens=3000)
    prepare(corpus, tmp_path / "straight", settings, workers=2)
    assert interrupted_everywhere(corpus, tmp_path / "cut", settings, 1) > 3
    assert read_files(tmp_path / "cut") == read_files(tmp_path / "straight")
    train, val = store_tokens(tmp_path / "cut")
    assert documents_of(train)[-1] + documents_of(val)[0] == SAMPLE * 2


@pytest.mark.parametrize("name", ["replace", pytest.param("fsync", marks=pytest.mark.slow)])
def test_store_after_a_crash_at_any_write_equals_an_uninterrupted_one(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A crash at the n-th sync or rename, for each n: nothing happens after it, as with a SIGKILL."""
    real = getattr(os, name)
    shards = PrepareConfig(val_ratio=0.2, shard_tokens=12_000)
    prepare(corpus, tmp_path / "whole", shards)
    for n in range(1, 200):
        calls = 0

        def crash(*arguments: Any, n: int = n) -> None:
            nonlocal calls
            calls += 1
            if calls == n:
                raise KeyboardInterrupt
            real(*arguments)

        out = tmp_path / f"{name}{n}"
        monkeypatch.setattr(os, name, crash)
        try:
            prepare(corpus, out, shards)
            crashed = False
        except KeyboardInterrupt:
            crashed = True
        monkeypatch.setattr(os, name, real)
        if not crashed:
            assert n > 4
            return
        prepare(corpus, out, shards)
        assert read_files(out) == read_files(tmp_path / "whole"), n
    raise AssertionError("it never ends")


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpt_lightning", "prepare", *arguments]


@pytest.fixture
def megabytes(tmp_path: Path) -> list[str]:
    """Arguments of a preparation of about a second."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(PARAGRAPHS, k=20)) for _ in range(700)]
    write_lines(tmp_path / "rows.jsonl", texts)
    return [str(tmp_path / "rows.jsonl"), "--shard_tokens=20000"]


def test_store_killed_five_times_equals_an_uninterrupted_one(
    megabytes: list[str], tmp_path: Path
) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    subprocess.run(command_line(*megabytes, f"--out={straight}", "--workers=1"), check=True)
    rng = random.Random(6)
    kills = 0
    while kills < 5:
        before = len(list(cut.glob("*.bin")))
        process = subprocess.Popen(command_line(*megabytes, f"--out={cut}", "--workers=2"))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(cut.glob("*.bin"))) > before:  # at work, with a shard more than before
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
        kills += 1
    subprocess.run(command_line(*megabytes, f"--out={cut}"), check=True)
    assert read_files(cut) == read_files(straight)


def test_ctrl_c_says_how_to_resume(megabytes: list[str], tmp_path: Path) -> None:
    """The signal comes when the third shard is opened, on a slow machine too."""
    interrupted = """
import os, signal, sys
from gpt_lightning.cli.main import main
def press(event, arguments, pressed=[]):
    if event == "open" and str(arguments[0]).endswith("train-00002.bin") and not pressed:
        pressed.append(True)
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(press)
sys.exit(main(sys.argv[1:]))
"""
    out = tmp_path / "out"
    arguments = (*megabytes, f"--out={out}", "--workers=1", "--quiet")
    result = python("-c", interrupted, "prepare", *arguments)
    assert result.returncode == 130
    assert "the same command resumes" in result.stderr
    assert result.stderr.count("\n") == 1
    assert len(list(out.glob("*.bin"))) < 10
    with pytest.raises(ValueError, match="is an unfinished token store; run the prepare"):
        token_cache.read_splits(str(out), 0.9)
    result = python(*command_line(*megabytes, f"--out={out}", "--json")[1:])
    assert result.returncode == 0
    assert json.loads(result.stdout)["documents"] == {"train": 643, "val": 57}


def test_full_disk_is_reported_in_one_line(tmp_path: Path, megabytes: list[str]) -> None:
    limited = (
        "import resource, sys; from gpt_lightning.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); sys.exit(main(sys.argv[1:]))"
    )
    result = python("-c", limited, "prepare", *megabytes, f"--out={tmp_path}/full", "--quiet")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "full: cannot be written (File too large); make room, and run the same" in result.stderr
    assert not (tmp_path / "full").exists()


def test_prepare_resumes_after_a_full_disk(
    command: Command, corpus: list[str], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = 8
    real = token_store.write_self_checksummed

    def write(path: Path, kind: str, content: dict[str, Any]) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, kind, content)

    monkeypatch.setattr(token_store, "write_self_checksummed", write)
    arguments = ("prepare", *corpus, "--out=store", "--val_ratio=0.2", "--shard_tokens=5000")
    assert_refused(
        command(*arguments), "store: cannot be written (No space left on device); make room"
    )
    assert len(list(Path("store").glob("*.bin"))) > 7
    assert command(*arguments).code == 0
    assert read_files(Path("store")) == read_files(whole)


def test_prepare_stopped_at_a_bad_line_resumes_from_the_last_shard(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", [f"{i} {p}" for i in range(4) for p in PARAGRAPHS])
    with path.open("a") as file:
        file.write('{"no": 1}\n')
    arguments = ("prepare", "a.jsonl", "--out=store", "--shard_tokens=5000")
    assert_refused(command(*arguments), "lacks the field text")
    shards = {p.name: p.stat().st_mtime_ns for p in Path("store").glob("train*")}
    assert len(shards) >= 2
    result = command(*arguments, "--on_error=skip")
    assert result.code == 0
    assert f"skipped: a.jsonl, line {4 * len(PARAGRAPHS) + 1}: lacks the field text\n" in result.err
    assert Path("store/train-00000.bin").stat().st_mtime_ns == shards["train-00000.bin"]
    assert command(*arguments, "--on_error=skip", "--shard_tokens=5000").code == 0


@pytest.fixture
def stopped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[str], dict[str, bytes]]:
    """A command that stopped at a bad row in the second of three inputs, and the files of its store."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    write_lines(tmp_path / "a.jsonl", PARAGRAPHS)
    path = write_lines(tmp_path / "b.jsonl", [f"{i} {p}" for i in range(4) for p in PARAGRAPHS])
    with path.open("a") as file:
        file.write("{\n")
    write_lines(tmp_path / "c.jsonl", PARAGRAPHS[:3])
    arguments = ["prepare", "a.jsonl", "b.jsonl", "c.jsonl", "--shard_tokens=3000"]
    assert_refused(command(*arguments, "--out=store"), "b.jsonl")
    before = read_files(Path("store"))
    assert json.loads(before["progress.json"])["position"]["at"][:2] > [1, 0]
    return arguments, before


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl"])
def test_unfinished_store_refuses_a_changed_input_that_was_read(
    command: Command, stopped: tuple[list[str], dict[str, bytes]], name: str
) -> None:
    arguments, before = stopped
    Path(name).write_bytes(Path(name).read_bytes().replace(b"{\n", b"") + GOOD)
    assert_refused(
        command(*arguments, "--out=store", "--on_error=skip"),
        f"store: is unfinished, and its input {name} has changed; remove store to start again, or give",
    )  # fmt: skip
    assert read_files(Path("store")) == before


def test_unfinished_store_takes_a_changed_input_that_was_not_read(
    command: Command, stopped: tuple[list[str], dict[str, bytes]]
) -> None:
    arguments, _ = stopped
    write_lines(Path("c.jsonl"), PARAGRAPHS[3:9])
    arguments.append("--on_error=skip")
    times = {p.name: p.stat().st_mtime_ns for p in Path("store").glob("train*")}
    result = command(*arguments, "--out=store")
    assert result.code == 0, result.err
    assert Path("store/train-00001.bin").stat().st_mtime_ns == times["train-00001.bin"]
    assert command(*arguments, "--out=straight").code == 0
    assert read_files(Path("store")) == read_files(Path("straight"))


def test_unfinished_store_split_by_ratio_refuses_any_changed_input(
    command: Command, tmp_path: Path
) -> None:
    """The sizes of all inputs decide where validation begins."""
    path = write_lines(tmp_path / "a.jsonl", [f"{i} {p}" for i in range(60) for p in PARAGRAPHS])
    with path.open("a") as file:
        file.write("{\n")
    write_lines(tmp_path / "b.jsonl", PARAGRAPHS)
    arguments = ["prepare", "a.jsonl", "b.jsonl", "--split=ratio", "--shard_tokens=3000"]
    # quiet: without the extra fast, a line of the log says so
    assert_refused(command(*arguments, "--out=store", "--quiet"), "is not JSON")
    write_lines(tmp_path / "b.jsonl", PARAGRAPHS[1:])
    result = command(*arguments, "--out=store", "--on_error=skip")
    assert_refused(result, "store: is unfinished, and its input b.jsonl has changed")


def test_unfinished_store_of_an_earlier_version_is_refused(
    command: Command, stopped: tuple[list[str], dict[str, bytes]]
) -> None:
    arguments, _ = stopped
    as_earlier_version(Path("store"), "progress.json")
    before = read_files(Path("store"))
    result = command(*arguments, "--out=store", "--on_error=skip")
    assert_refused(result, ".bin: is missing; remove store and prepare it again")
    assert read_files(Path("store")) == before


def test_store_of_an_earlier_reader_is_not_resumed(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    arguments = ("prepare", "a.txt", "--out=store", "--val_ratio=0")
    assert command(*arguments).code == 0
    manifest = token_store.read_manifest(Path("store"))
    del manifest["reader"]
    checksum.write_self_checksummed(Path("store/manifest.json"), token_store.KIND, manifest)
    assert_refused(
        command(*arguments), "store: was prepared by a version that reads byte order marks"
    )
    assert store_tokens(Path("store"))[0] == encode_prompt("one")
