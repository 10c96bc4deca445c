"""prepare: whatever it is given, however it is run and interrupted, the same tokens; and read_splits on them."""

import codecs
import errno
import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL, Command, Done, python
from test_durability import mutate

from gpt_lightning.cli import prepare as cli_prepare
from gpt_lightning.data import token_cache, token_store
from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.prepare import chunk
from gpt_lightning.data.prepare.chunk import content_hash, split_of
from gpt_lightning.data.prepare.pipeline import PrepareConfig, prepare
from gpt_lightning.data.prepare.plain_text import safe_cut
from gpt_lightning.data.token_store import open_store
from gpt_lightning.data.tokenizer import decode, encode_corpus, encode_documents, encode_prompt
from gpt_lightning.storage import checksum

SAMPLE = read_corpus("sample")
PARAGRAPHS = SAMPLE.split("\n\n")
END = 50256


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))


def joined(folder: Path) -> tuple[list[int], list[int]]:
    """A store's training and validation tokens."""
    train, val = open_store(folder).values()
    return np.concatenate(train).tolist(), np.concatenate(val).tolist()


def documents_of(ids: Sequence[int]) -> list[str]:
    return decode(ids).split("<|endoftext|>") if len(ids) else []


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_lines(path: Path, texts: Sequence[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def awkward(rng: random.Random, size: int) -> str:
    """Text in which a cut in the wrong place shows: runs of all kinds of white space, and what clings to it."""
    parts = [" ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "a", "Ünï",
             "'s", "'", "don't", "42", "7", "...", "!", "🦜", "語", "。", "word", "Every", "\u200b", "e\u0301"]  # fmt: skip
    return "".join(rng.choice(parts) for _ in range(size))


# --- the same tokens ------------------------------------------------------------------------------


def test_a_text_is_cut_where_its_tokens_are_the_wholes() -> None:
    rng = random.Random(1)
    cuts = 0
    for _ in range(3000):
        text = awkward(rng, rng.randrange(2, 40)).encode()
        if cut := safe_cut(text):
            cuts += 1
            parts = [encode_corpus(part.decode()).tolist() for part in (text[:cut], text[cut:])]
            assert parts[0] + parts[1] == encode_corpus(text.decode()).tolist(), (text, cut)
    assert cuts > 1500
    # which is not so everywhere
    assert encode_prompt("a\n\n") + encode_prompt("b") != encode_prompt("a\n\nb")


@pytest.mark.parametrize("piece", [64, 300, 5000])
def test_a_long_text_in_pieces_is_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """Marks, line ends of all kinds and long words included."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", piece)
    rng = random.Random(piece)
    text = "<|endoftext|>".join(
        "x" + awkward(rng, rng.choice([3, 30, 3000])) + "y" * rng.choice([0, 500])
        for _ in range(12)
    )
    (tmp_path / "a.txt").write_bytes(text.encode())
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", PrepareConfig(val_ratio=0), workers=3)
    whole = encode_corpus((tmp_path / "a.txt").read_text(encoding="utf-8"))
    assert joined(tmp_path / "out") == (whole.tolist(), [])


def test_a_folder_is_what_data_text_reads(tmp_path: Path) -> None:
    folder = tmp_path / "texts" / "more"
    folder.mkdir(parents=True)
    for i, paragraph in enumerate(PARAGRAPHS[:9]):
        (folder.parent if i % 2 else folder).joinpath(f"{i}.txt").write_text(paragraph)
    (folder / "z.csv").write_text("a,b")
    prepare([str(folder.parent)], tmp_path / "out", PrepareConfig(val_ratio=0))
    expected = encode_corpus(read_corpus(str(folder.parent)))
    assert joined(tmp_path / "out")[0] == expected.tolist()


@pytest.mark.parametrize(
    ("piece", "split", "size"), [(40, "hash", 150), (40, "ratio", 30), (1 << 20, "hash", 30)]
)
def test_byte_order_marks_and_line_ends_decide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, split: Any, size: int
) -> None:
    """Neither tokens nor splits: the same text from Windows is the same text; in pieces too."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", piece)
    rng = random.Random(size)
    words = ["one", " two", "\n", "\n\n", "  ", "ü", "🦜", "x" * 60]
    texts = ["<|endoftext|>".join("".join(rng.choice(words) for _ in range(size)) + f" {i} {j}."
                                  for j in range(3)) for i in range(8)]  # fmt: skip
    stores = []
    for name, mark, end in [("a", b"", "\n"), ("b", codecs.BOM_UTF8, "\r\n"), ("c", b"", "\r")]:
        folder = tmp_path / name
        folder.mkdir()
        for i, text in enumerate(texts):
            (folder / f"{i:02}.txt").write_bytes(mark + text.replace("\n", end).encode())
        if split == "hash":
            settings = PrepareConfig(val_ratio=0.3)
        else:  # whose cut depends on the bytes
            settings = PrepareConfig(split="ratio", val_ratio=0)
        prepare([str(folder)], tmp_path / f"{name}-out", settings, workers=2)
        stores.append(joined(tmp_path / f"{name}-out"))
    assert stores[0] == stores[1] == stores[2]
    if split == "ratio":
        assert stores[0][0] == encode_corpus(read_corpus(str(tmp_path / "b"))).tolist()


def test_byte_order_marks_of_rows(tmp_path: Path) -> None:
    """At a file's beginning and, left from the file it came from, at a text's; line ends of a text are data."""
    content = (
        '\ufeff{"text": "\ufeffone\\r\\n"}\r\n{"text": "two"}\r\n{"text": "\ufeff"}\r\n'.encode()
    )
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "b.jsonl.gz"):
        prepare([str(tmp_path / name)], tmp_path / f"{name}-out", PrepareConfig(val_ratio=0))
        assert documents_of(joined(tmp_path / f"{name}-out")[0]) == ["one\r\n", "two"]


def test_a_row_of_a_table_that_is_not_utf_8_is_named(command: Command, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    raw = pyarrow.array(
        [b"good", b"caf\xe9", b"\xef\xbb\xbfmark", b"\xff\xfex\x00"], pyarrow.binary()
    )
    texts = pyarrow.StringArray.from_buffers(4, raw.buffers()[1], raw.buffers()[2])
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    arguments = ("prepare", "a.parquet", "--out=store", "--val_ratio=0")
    refused(
        command(*arguments), "a.parquet, row 2: is not UTF-8 (byte 3: unexpected end of data); "
    )
    done = command(*arguments, "--on_error=skip")
    assert "skipped: a.parquet, row 4: is UTF-16, not UTF-8" in done.err
    assert documents_of(joined(Path("store"))[0]) == ["good", "mark"]


def test_hidden_files_and_second_links_are_left_out(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As data.text leaves them out."""
    for name in ("g/.git", "g/.ipynb_checkpoints", "g/a"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.txt").write_text(f"in {name}")
    (tmp_path / "g" / "._a.jsonl").write_bytes(b"\xff")
    (tmp_path / "g" / "2.txt").write_text("text")
    (tmp_path / "g" / "3.txt").symlink_to("2.txt")
    (tmp_path / "g" / "4.txt").hardlink_to(tmp_path / "g" / "2.txt")
    for out, name in [("glob", "g/*"), ("folder", "g")]:
        done = command("prepare", name, f"--out={out}", "--val_ratio=0", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["sources"] == 2
        assert sorted(documents_of(joined(Path(out))[0])) == ["in g/a", "text"]
    assert "g: left out: 3 hidden files or folders (._a.jsonl, .git, .ipynb_ch" in done.err
    assert "2 links to files already read (3.txt, 4.txt)" in done.err
    assert documents_of(joined(Path("folder"))[0]) == read_corpus("g").split("<|endoftext|>")[:2]
    refused(command("prepare", "g/.git/1.txt", "--out=x", "--split=hash"), "1.txt is one document")


def test_inputs_of_a_config(command: Command, tmp_path: Path) -> None:
    """A text or a list; those of the command line replace them."""
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
        done = command("prepare", *more, "--config=mine.yaml")
        assert done.code == 0, done.err
        assert documents_of(joined(Path(f"x{i}-out"))[0]) == expected


def test_a_store_of_an_earlier_reader_is_not_continued(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    arguments = ("prepare", "a.txt", "--out=store", "--val_ratio=0")
    assert command(*arguments).code == 0
    manifest = token_store.read_manifest(Path("store"))
    del manifest["reader"]
    checksum.write_self_checksummed(Path("store/manifest.json"), token_store.KIND, manifest)
    refused(command(*arguments), "store: was prepared by a version that reads byte order marks")
    assert joined(Path("store"))[0] == encode_prompt("one")


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
        # with a fingerprint of its own, for which datasets 5.2 would pickle what dill 0.4.1 does not
        table = datasets.table.InMemoryTable.from_pydict({"text": list(texts)})
        datasets.Dataset(table, fingerprint="made-here").save_to_disk(str(path))
    return path


KINDS = [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", "-dataset"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In one way or the other the same documents; and interrupted after any piece the same store."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 3000)
    rng = random.Random(3)
    texts = [awkward(rng, rng.choice([1, 20, 300])) + f" {i}" for i in range(700)]
    path = written_as(tmp_path, kind, texts)
    settings = PrepareConfig(val_ratio=0.2, shard_tokens=4000)
    prepare([str(path)], tmp_path / "out", settings, workers=2)
    train, val = joined(tmp_path / "out")
    for ids, split in [(train, "train"), (val, "val")]:
        expected = [t for t in texts if split_of(content_hash(t.encode()), 0.2) == split]
        assert documents_of(ids) == expected
    assert 80 < len(documents_of(val)) < 210
    interrupted_everywhere([str(path)], tmp_path / "cut", settings, every=7)
    assert everything(tmp_path / "cut") == everything(tmp_path / "out")


def test_an_end_of_text_in_a_row_is_plain_text(tmp_path: Path) -> None:
    texts = ["one <|endoftext|> two", "three"]
    path = write_lines(tmp_path / "rows.jsonl", texts)
    prepare([str(path)], tmp_path / "out", PrepareConfig(val_ratio=0))
    ids, _ = joined(tmp_path / "out")
    assert ids.count(END) == 1
    assert ids == [*encode_prompt(texts[0]), END, *encode_prompt(texts[1])]


def test_documents_are_tokenised_as_each_by_itself() -> None:
    """Though joined, and though they may hold parts of the mark, or all of it."""
    rng = random.Random(4)
    parts = ["<|", "endoftext", "|>", "<|endoftext|>", " ", "\n", "a", "<", ">"]
    for _ in range(300):
        texts = ["".join(rng.choices(parts, k=rng.randrange(1, 6))) for _ in range(3)]
        one, two, three = map(encode_prompt, texts)
        assert encode_documents(texts).tolist() == [*one, END, *two, END, *three]


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_have_no_say(corpus: list[str], whole: Path, tmp_path: Path, workers: int) -> None:
    prepare(corpus, tmp_path / "out", SHARDS, workers=workers)
    assert everything(tmp_path / "out") == everything(whole)


# --- interrupted ----------------------------------------------------------------------------------

SHARDS = PrepareConfig(val_ratio=0.2, shard_tokens=5000)


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A text of many pieces with a long document in the middle, lines, and a folder."""
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 4000)
    short = "<|endoftext|>".join(PARAGRAPHS[:20])
    (tmp_path / "a.txt").write_text(f"{short}<|endoftext|>{SAMPLE * 2}<|endoftext|>{short} end")
    write_lines(tmp_path / "b.jsonl", [f"{i} {p}" for i in range(3) for p in PARAGRAPHS])
    (tmp_path / "c").mkdir()
    for i in range(4):
        (tmp_path / "c" / f"{i}.md").write_text(SAMPLE[i * 900 :][: 2000 * i + 1])
    return [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c")]


@pytest.fixture
def whole(corpus: list[str], tmp_path: Path) -> Path:
    prepare(corpus, tmp_path / "whole", SHARDS)
    return tmp_path / "whole"


def interrupted_everywhere(
    inputs: list[str], out: Path, settings: PrepareConfig, every: int, *, skip: bool = False
) -> int:
    """Prepare, interrupted ``every`` pieces; returns how many times."""
    for times in range(1000):
        seen = 0

        def interrupt(done: int, total: int, tokens: int, *, at: int = every) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise KeyboardInterrupt

        try:
            prepare(inputs, out, settings, workers=2, skip=skip, on_progress=interrupt)
            return times
        except KeyboardInterrupt:
            every += 1  # else a shard of so many pieces would never be whole
    raise AssertionError("it never ends")


def test_interrupted_after_any_piece_it_is_the_same(
    corpus: list[str], whole: Path, tmp_path: Path
) -> None:
    for every in (1, 5):
        assert interrupted_everywhere(corpus, tmp_path / f"{every}", SHARDS, every) > 3
        assert everything(tmp_path / f"{every}") == everything(whole)


def test_interrupted_by_ratio_too(corpus: list[str], tmp_path: Path) -> None:
    """The cut falls into the long document."""
    settings = PrepareConfig("text", "ratio", 0.8, shard_tokens=3000)
    prepare(corpus, tmp_path / "straight", settings, workers=2)
    assert interrupted_everywhere(corpus, tmp_path / "cut", settings, 1) > 3
    assert everything(tmp_path / "cut") == everything(tmp_path / "straight")
    train, val = joined(tmp_path / "cut")
    assert documents_of(train)[-1] + documents_of(val)[0] == SAMPLE * 2


@pytest.mark.parametrize("name", ["replace", pytest.param("fsync", marks=pytest.mark.slow)])
def test_crashed_at_any_write_it_is_the_same(
    corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """At the n-th sync or rename, for every n: nothing after it happens, as with a SIGKILL."""
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
        assert everything(out) == everything(tmp_path / "whole"), n
    raise AssertionError("it never ends")


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "gpt_lightning", "prepare", *arguments]


@pytest.fixture
def megabytes(tmp_path: Path) -> list[str]:
    """Arguments that take about a second."""
    rng = random.Random(5)
    texts = [" ".join(rng.choices(PARAGRAPHS, k=20)) for _ in range(700)]
    write_lines(tmp_path / "rows.jsonl", texts)
    return [str(tmp_path / "rows.jsonl"), "--shard_tokens=20000"]


def test_killed_five_times_it_is_the_same(megabytes: list[str], tmp_path: Path) -> None:
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    subprocess.run(command_line(*megabytes, f"--out={straight}", "--workers=1"), check=True)
    rng = random.Random(6)
    kills = 0
    while kills < 5:
        begun = len(list(cut.glob("*.bin")))
        process = subprocess.Popen(command_line(*megabytes, f"--out={cut}", "--workers=2"))
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(cut.glob("*.bin"))) > begun:  # at work, with a shard more than before
                break
            time.sleep(0.002)
        time.sleep(rng.random() * 0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it was killed"
        kills += 1
    subprocess.run(command_line(*megabytes, f"--out={cut}"), check=True)
    assert everything(cut) == everything(straight)


def test_ctrl_c_says_how_to_go_on(megabytes: list[str], tmp_path: Path) -> None:
    """Its signal comes when the third shard is begun, however busy the machine is."""
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
    done = python("-c", interrupted, "prepare", *megabytes, f"--out={out}", "--workers=1")
    assert done.returncode == 130
    assert done.stderr.count("\n") == 1
    assert "the same command resumes" in done.stderr
    assert len(list(out.glob("*.bin"))) < 10
    with pytest.raises(ValueError, match="is an unfinished token store; run the prepare"):
        token_cache.read_splits(str(out), 0.9)
    done = python(*command_line(*megabytes, f"--out={out}", "--json")[1:])
    assert done.returncode == 0
    assert json.loads(done.stdout)["documents"] == {"train": 643, "val": 57}


def test_a_full_disk_is_one_line(tmp_path: Path, megabytes: list[str]) -> None:
    limited = (
        "import resource, sys; from gpt_lightning.cli.main import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); sys.exit(main(sys.argv[1:]))"
    )
    done = python("-c", limited, "prepare", *megabytes, f"--out={tmp_path}/full")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "full: cannot be written (File too large); make room, and run the same" in done.stderr
    assert not (tmp_path / "full").exists()


def test_a_disk_that_fills_up_is_gone_on_from(
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
    refused(command(*arguments), "store: cannot be written (No space left on device); make room")
    assert len(list(Path("store").glob("*.bin"))) > 7
    assert command(*arguments).code == 0
    assert everything(Path("store")) == everything(whole)


def test_two_at_once(corpus: list[str], tmp_path: Path) -> None:
    inside, go = threading.Event(), threading.Event()

    def wait(*_: int) -> None:
        inside.set()
        go.wait(30)

    first = threading.Thread(
        target=prepare, args=(corpus, tmp_path / "out", SHARDS), kwargs={"on_progress": wait}
    )
    first.start()
    try:
        assert inside.wait(30)
        with pytest.raises(ValueError, match="another prepare is writing it"):
            prepare(corpus, tmp_path / "out", SHARDS)
    finally:
        go.set()
        first.join()
    assert open_store(tmp_path / "out")


# --- splits ---------------------------------------------------------------------------------------


def test_by_hash_more_files_move_none(tmp_path: Path) -> None:
    texts = [f"{i} {paragraph}" for i in range(6) for paragraph in PARAGRAPHS]
    write_lines(tmp_path / "b.jsonl", texts[:200])
    write_lines(tmp_path / "a.jsonl", texts[200:])
    prepare([str(tmp_path / "b.jsonl")], tmp_path / "few", PrepareConfig())
    prepare([str(tmp_path)], tmp_path / "more", PrepareConfig(), workers=2)
    few, more = (
        [set(documents_of(ids)) for ids in joined(tmp_path / name)] for name in ("few", "more")
    )
    assert all(before <= after for before, after in zip(few, more, strict=True))
    assert not more[0] & more[1]
    assert 0.05 < len(more[1]) / len(texts) < 0.15


@pytest.mark.parametrize("val_ratio", [0.0, 0.1, 0.5, 0.93])
def test_by_ratio_a_text_is_cut_once(tmp_path: Path, val_ratio: float) -> None:
    (tmp_path / "mine.txt").write_text(SAMPLE)
    prepare(
        [str(tmp_path / "mine.txt")], tmp_path / "out", PrepareConfig("text", "ratio", val_ratio)
    )
    train, val = joined(tmp_path / "out")
    assert train + val == encode_corpus(SAMPLE).tolist()
    cut = len(decode(train).encode()) - (1 - val_ratio) * len(SAMPLE.encode())
    assert 0 <= cut < 20


@pytest.mark.parametrize("kind", KINDS)
def test_by_ratio_the_last_rows_are_for_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 2000)
    texts = [f"{i:05} {'x' * 20}" for i in range(1000)]
    path = written_as(tmp_path, kind, texts)
    prepare([str(path)], tmp_path / "out", PrepareConfig("text", "ratio", 0.25), workers=2)
    train, val = (documents_of(ids) for ids in joined(tmp_path / "out"))
    assert train + val == texts
    assert len(val) == 250


# --- reading it -----------------------------------------------------------------------------------


def test_fit_and_validate_take_a_store(command: Command, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(SAMPLE)
    done = command(
        "prepare", "mine.txt", "--out=store", "--split=ratio", "--val_ratio=0.9", "--json"
    )
    assert done.code == 0, done.err
    said = json.loads(done.out)
    assert sum(said["tokens"].values()) == len(encode_corpus(SAMPLE))
    config = f"--config={ROOT}/configs/quickstart.yaml"
    small = [argument for argument in SMALL if not argument.startswith("--data.t")]
    done = command("fit", config, *small, "--data.text=store", "--data.train_ratio=0.3",
                   "--trainer.max_steps=2")  # fmt: skip
    assert done.code == 0, done.err
    assert (
        done.err.count("data.train_ratio: 0.3 has no effect on store, of which prepare put 0.1")
        == 1
    )
    done = command("validate", config, *small, "--data.text=store", "--data.train_ratio=0.1",
                   "--init_from=checkpoints/quickstart", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "has no effect" not in done.err
    losses = json.loads(done.out)
    assert 0 < losses["train_tokens"] < losses["val_tokens"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS * 2)
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "store", PrepareConfig(shard_tokens=3000))
    return tmp_path / "store"


@pytest.mark.parametrize(
    "what", ["train-00000.bin", "train-00002.bin", "val-00000.bin", "manifest.json"]
)
def test_no_mutation_is_silent(prepared: Path, what: str) -> None:
    expected = joined(prepared)
    original = (prepared / what).read_bytes()
    rng = random.Random(what)
    refused = 0
    for _ in range(250):
        (prepared / what).write_bytes(mutated := mutate(original, rng))
        try:
            found = token_cache.read_splits(str(prepared), 0.9)
        except (ValueError, OSError) as error:
            refused += mutated != original
            lines = str(error).count("\n")
        else:
            lines = 0
            assert [np.concatenate(split).tolist() for split in found] == list(expected)
        assert lines == 0
    assert refused > 200
    (prepared / what).unlink()
    with pytest.raises(ValueError, match=r"is missing|is an unfinished token store"):
        token_cache.read_splits(str(prepared), 0.9)


def test_a_whole_shard_is_summed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not by the process that opens what prepare has written here; again when it has changed."""
    monkeypatch.setattr(checksum, "MIN_CACHED_BYTES", 0)
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS)
    prepare([str(tmp_path / "rows.jsonl")], tmp_path / "store", PrepareConfig())
    summed: list[str] = []
    real = checksum.sha256_of
    monkeypatch.setattr(
        checksum, "sha256_of", lambda path: (summed.append(path.name), real(path))[1]
    )
    open_store(tmp_path / "store")
    assert summed == []
    moved = (tmp_path / "store").rename(tmp_path / "moved")
    open_store(moved)
    open_store(moved)
    assert summed == ["train-00000.bin", "val-00000.bin"]
    content = bytearray((moved / "val-00000.bin").read_bytes())
    content[5] ^= 1
    (moved / "val-00000.bin").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"val-00000.bin: is damaged: its SHA-256"):
            open_store(moved)


def test_a_store_of_another_tokenizer(
    command: Command, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = token_store.read_manifest(prepared)
    manifest["tokenizer"] = {"name": "cl100k_base"}
    checksum.write_self_checksummed(prepared / "manifest.json", token_store.KIND, manifest)
    done = command(
        "fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, f"--data.text={prepared}"
    )
    refused(done, "another tokenizer (cl100k_base)")
    assert not Path("checkpoints").exists()


def test_a_long_text_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens come from the cache afterwards; another text or ratio is another store."""
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
        patched.setattr(token_cache, "_READER", "1")  # what another version has kept
        patched.setattr(token_cache, "read_corpus", None)
        with pytest.raises(TypeError):
            token_cache.read_splits(str(path), 0.5)
    path.write_text(SAMPLE[1:])
    (changed,), _ = token_cache.read_splits(str(path), 0.5)
    assert changed.tolist() == encode_corpus(SAMPLE[1:][: len(SAMPLE[1:]) // 2]).tolist()


# --- bad input ------------------------------------------------------------------------------------


def refused(done: Done, *parts: str) -> None:
    assert (done.code, done.out) == (2, ""), done
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err


GOOD = b'{"text": "good"}\n'
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
def test_what_cannot_be_read(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    content: bytes,
    part: str,
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1 << 20 if b" " * 9999 in content else 1000)
    (tmp_path / name).write_bytes(content)
    refused(command("prepare", name, "--out=deep/store", "--val_ratio=0"), part)
    assert os.listdir(tmp_path) == [name]


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
def test_what_is_meant_is_not_clear(
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
    refused(command("prepare", *arguments, "--out=store"), *parts)
    assert os.listdir(tmp_path / "here") == []


def test_skipped_are_counted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n" + GOOD + b'{"text": " "}\n' + b'{"x": 1}\n')
    (tmp_path / "b.txt").write_bytes(b"long " * 900 + b"\xff<|endoftext|>good<|endoftext|>bad\xff")
    arguments = ("prepare", "a.jsonl", "b.txt", "--out=store", "--val_ratio=0", "--on_error=skip")
    done = command(*arguments, "--json")
    assert done.code == 0
    said = json.loads(done.out)
    assert (said["documents"]["train"], said["skipped"], said["empty"]) == (3, 4, 1)
    assert done.err.splitlines()[:2] == [
        "skipped: a.jsonl, line 2: is not JSON",
        "skipped: a.jsonl, line 5: lacks the field text",
    ]
    assert documents_of(joined(Path("store"))[0]) == ["good"] * 3


def test_what_the_tokenizer_does_not_take_is_skipped(command: Command, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD + BLANKS + GOOD)
    arguments = ("prepare", "a.jsonl", "--out=store", "--val_ratio=0", "--on_error=skip")
    done = command(*arguments, "--json")
    assert (done.code, json.loads(done.out)["skipped"]) == (0, 1)
    assert "skipped: a.jsonl, line 2: has more blanks in a row" in done.err
    assert documents_of(joined(Path("store"))[0]) == ["good"] * 2


@pytest.mark.parametrize(
    ("kind", "damage"),
    [(".jsonl.gz", "cut"), (".jsonl.gz", "zeros"), (".jsonl.zst", "cut"), (".parquet", "zeros")],
)
def test_of_a_damaged_file_the_rest_is_skipped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, damage: str
) -> None:
    """As one; by any number of workers and after interruptions the same."""
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
    refused(command("prepare", *inputs, *settings, "--out=stopped"), path.name)
    for workers in (1, 3):
        out = f"--out={workers}"
        done = command("prepare", *inputs, *settings, out, f"--workers={workers}",
                       "--on_error=skip", "--json")  # fmt: skip
        assert done.code == 0, done.err
        said = json.loads(done.out)
        # zeros in gzip's data are first another text
        assert said["skipped"] == 1 or (kind, damage) == (".jsonl.gz", "zeros")
        assert f"skipped: {path.name}: is damaged (" in done.err
        assert len(PARAGRAPHS) < sum(said["documents"].values()) < 7 * len(PARAGRAPHS)
    shards = PrepareConfig(val_ratio=0.2, shard_tokens=3000)
    assert interrupted_everywhere(inputs, tmp_path / "cut", shards, 3, skip=True) > 2
    assert everything(Path("1")) == everything(Path("3")) == everything(Path("cut"))
    # stopped at it, it is gone on with
    assert command("prepare", *inputs, *settings, "--out=stopped", "--on_error=skip").code == 0
    assert everything(Path("stopped")) == everything(Path("1"))
    by_ratio = command("prepare", *inputs, "--split=ratio", "--out=ratio", "--on_error=skip")
    assert by_ratio.code == 0, by_ratio.err


def test_a_library_that_is_missing_is_not_skipped(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    done = command("prepare", "a.jsonl.zst", "--out=store", "--on_error=skip")
    refused(done, "a.jsonl.zst: needs zstandard to be read")


def test_folders_that_a_glob_matches_and_links_are_read(command: Command, tmp_path: Path) -> None:
    for name in ("g/a/deep", "g/photos", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    for i, name in enumerate(["g/a/deep/1.txt", "g/2.txt", "elsewhere/3.txt", "g/photos/cat.jpg"]):
        (tmp_path / name).write_text(f"text {i}")
    (tmp_path / "g" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "g")
    for out, name in [("glob", "g/*"), ("folder", "g")]:
        done = command("prepare", name, f"--out={out}", "--val_ratio=0", "--json")
        assert done.code == 0, done.err
        assert json.loads(done.out)["sources"] == 3
    texts = ["text 1", "text 0", "text 2"]
    assert documents_of(joined(Path("folder"))[0]) == texts
    assert documents_of(joined(Path("glob"))[0]) == texts
    assert read_corpus("g").split("<|endoftext|>") == texts
    refused(command("prepare", "g/ph*", "--out=none"), "g/ph*: matches nothing to read")


def test_stopped_at_a_bad_line_it_goes_on_from_the_last_shard(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    path = write_lines(tmp_path / "a.jsonl", [f"{i} {p}" for i in range(4) for p in PARAGRAPHS])
    with path.open("a") as file:
        file.write('{"no": 1}\n')
    arguments = ("prepare", "a.jsonl", "--out=store", "--shard_tokens=5000")
    refused(command(*arguments), "lacks the field text")
    shards = {p.name: p.stat().st_mtime_ns for p in Path("store").glob("train*")}
    assert len(shards) >= 2
    done = command(*arguments, "--on_error=skip")
    assert done.code == 0
    assert f"skipped: a.jsonl, line {4 * len(PARAGRAPHS) + 1}: lacks the field text\n" in done.err
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
    refused(command(*arguments, "--out=store"), "b.jsonl")
    begun = everything(Path("store"))
    assert json.loads(begun["progress.json"])["position"]["at"][:2] > [1, 0]
    return arguments, begun


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl"])
def test_unfinished_store_refuses_a_changed_input_that_was_read(
    command: Command, stopped: tuple[list[str], dict[str, bytes]], name: str
) -> None:
    arguments, begun = stopped
    Path(name).write_bytes(Path(name).read_bytes().replace(b"{\n", b"") + GOOD)
    refused(
        command(*arguments, "--out=store", "--on_error=skip"),
        f"store: is unfinished, and its input {name} has changed; remove store to start again, or give",
    )  # fmt: skip
    assert everything(Path("store")) == begun


def test_unfinished_store_takes_a_changed_input_that_was_not_read(
    command: Command, stopped: tuple[list[str], dict[str, bytes]]
) -> None:
    arguments, _ = stopped
    write_lines(Path("c.jsonl"), PARAGRAPHS[3:9])
    arguments.append("--on_error=skip")
    times = {p.name: p.stat().st_mtime_ns for p in Path("store").glob("train*")}
    done = command(*arguments, "--out=store")
    assert done.code == 0, done.err
    assert Path("store/train-00001.bin").stat().st_mtime_ns == times["train-00001.bin"]
    assert command(*arguments, "--out=straight").code == 0
    assert everything(Path("store")) == everything(Path("straight"))


def test_unfinished_store_split_by_ratio_refuses_any_changed_input(
    command: Command, tmp_path: Path
) -> None:
    """The sizes of all inputs decide where validation begins."""
    path = write_lines(tmp_path / "a.jsonl", [f"{i} {p}" for i in range(60) for p in PARAGRAPHS])
    with path.open("a") as file:
        file.write("{\n")
    write_lines(tmp_path / "b.jsonl", PARAGRAPHS)
    arguments = ["prepare", "a.jsonl", "b.jsonl", "--split=ratio", "--shard_tokens=3000"]
    refused(command(*arguments, "--out=store"), "is not JSON")
    write_lines(tmp_path / "b.jsonl", PARAGRAPHS[1:])
    done = command(*arguments, "--out=store", "--on_error=skip")
    refused(done, "store: is unfinished, and its input b.jsonl has changed")


# --- stores of earlier versions -------------------------------------------------------------------


def as_before(store: Path, name: str) -> None:
    """A manifest or progress without a kind, with a format; shards are called .u16."""
    content = json.loads((store / name).read_text().replace(".bin", ".u16"))
    del content["sha256"], content["kind"]
    content = {"format": token_store.KIND, **content}
    total = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (store / name).write_text(json.dumps({**content, "sha256": total}, indent=1) + "\n")
    for shard in store.glob("*.bin"):
        shard.rename(shard.with_suffix(".u16"))


def test_store_of_an_earlier_version_is_read(command: Command, prepared: Path) -> None:
    expected = joined(prepared)
    as_before(prepared, "manifest.json")
    assert token_store.is_store(prepared)
    assert joined(prepared) == expected
    done = command("prepare", "rows.jsonl", f"--out={prepared}", "--shard_tokens=3000")
    assert done.code == 0, done.err
    assert "is already prepared" in done.err
    (prepared / "manifest.json").unlink()
    with pytest.raises(ValueError, match="is an unfinished token store"):
        token_cache.read_splits(str(prepared), 0.9)


def test_unfinished_store_of_an_earlier_version_is_refused(
    command: Command, stopped: tuple[list[str], dict[str, bytes]]
) -> None:
    arguments, _ = stopped
    as_before(Path("store"), "progress.json")
    before = everything(Path("store"))
    done = command(*arguments, "--out=store", "--on_error=skip")
    refused(done, ".bin: is missing; remove store and prepare it again")
    assert everything(Path("store")) == before


def test_a_folder_that_holds_something(command: Command, tmp_path: Path, prepared: Path) -> None:
    before = everything(prepared)
    done = command("prepare", "rows.jsonl", f"--out={prepared}", "--shard_tokens=3000")
    assert done.code == 0
    assert "is already prepared, from the same inputs" in done.err
    write_lines(tmp_path / "other.jsonl", PARAGRAPHS)
    same = (f"--out={prepared}", "--shard_tokens=3000")
    refused(
        command("prepare", "other.jsonl", *same), "holds a store of other inputs", "other.jsonl"
    )
    refused(command("prepare", "rows.jsonl", "other.jsonl", *same), "other.jsonl")
    refused(
        command("prepare", "rows.jsonl", f"--out={prepared}"),
        "was started with --shard_tokens 3000",
    )
    assert everything(prepared) == before
    (prepared / "train-00001.bin").write_bytes(before["train-00001.bin"][:-2])
    refused(command("prepare", "rows.jsonl", *same), "train-00001.bin: is damaged")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    refused(
        command("prepare", "rows.jsonl", "--out=photos"), "photos: holds something else (cat.jpg)"
    )
    refused(command("prepare", "rows.jsonl", "--out=rows.jsonl"), "rows.jsonl: is not a folder")


@pytest.mark.parametrize("name", ["mine.bin", "train-00000.bin", "progress.json"])
def test_what_another_wrote_stays(command: Command, tmp_path: Path, name: str) -> None:
    """In a folder without a record of prepare's, however it is called."""
    (tmp_path / "rows.jsonl").write_bytes(GOOD + b"{\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("precious")
    refused(command("prepare", "rows.jsonl", "--out=out"), f"out: holds something else ({name})")
    assert everything(tmp_path / "out") == {name: b"precious"}


def test_what_lies_beside_an_unfinished_store_stays(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "CHUNK_BYTES", 1000)
    write_lines(tmp_path / "rows.jsonl", PARAGRAPHS)
    with (tmp_path / "rows.jsonl").open("ab") as file:
        file.write(b"{\n")
    arguments = ("prepare", "rows.jsonl", "--out=out", "--shard_tokens=1000", "--val_ratio=0")
    refused(command(*arguments), "is not JSON")
    (tmp_path / "out" / "mine.bin").write_text("precious")
    assert command(*arguments, "--on_error=skip").code == 0
    assert (tmp_path / "out" / "mine.bin").read_text() == "precious"


def test_of_few_texts_the_one_that_cannot_be_read_is_named(
    command: Command, tmp_path: Path
) -> None:
    """Not the first, because it is alone in its split."""
    for name, text in [("a.txt", b" "), ("b.txt", b"one"), ("c.txt", b"bad \xff")]:
        (tmp_path / name).write_bytes(text)
    refused(command("prepare", "a.txt", "b.txt", "c.txt", "--out=out"), "c.txt: is not UTF-8")
    refused(command("prepare", "a.txt", "b.txt", "--out=out"), "split: b.txt is one document")


def test_a_split_that_stays_empty_is_known_before(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of plain texts: their documents' hashes say it before a token is made."""
    for name, text in [("a.txt", "one<|endoftext|> \n"), ("b.txt", "two " * 2000)]:
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("gpt_lightning.data.prepare.pipeline.StoreWriter", None)
    refused(
        command("prepare", "a.txt", "b.txt", "--out=out", "--val_ratio=1e-9"),
        "none of 2 document(s) is for validation",
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "library"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")]
)
def test_a_library_that_is_missing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, library: str
) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, library, None)
    done = command("prepare", name, "--out=store")
    refused(done, f"{name}: needs {library} to be read; pip install 'gpt-lightning[data]'")


def test_a_parquet_without_the_field(command: Command, tmp_path: Path) -> None:
    path = written_as(tmp_path, ".parquet", ["x"])
    refused(
        command("prepare", str(path), "--field=content", "--out=store"),
        "has no text content (but id, text)", "--field",
    )  # fmt: skip
    refused(
        command("prepare", str(path), "--field=id", "--out=store"),
        "has no text id, but int64; name",
    )


@pytest.mark.parametrize("kind", ["string_view", "dictionary"])
def test_a_parquet_of_other_strings(command: Command, tmp_path: Path, kind: str) -> None:
    """What polars and pandas' category write."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([f"{i % 40} {PARAGRAPHS[i % 40]}" for i in range(700)])
    other = texts.dictionary_encode() if kind == "dictionary" else texts.cast(pyarrow.string_view())
    for name, column in [("plain", texts), ("other", other)]:
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{name}.parquet")
        done = command("prepare", f"{name}.parquet", f"--out={name}", "--val_ratio=0.3")
        assert done.code == 0, done.err
    kinds = parquet.read_schema(tmp_path / "other.parquet").field("text").type
    assert kind in str(kinds)
    assert joined(Path("other")) == joined(Path("plain"))


# --- how it runs ----------------------------------------------------------------------------------


def test_it_tells_how_far_it_is(
    command: Command, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_prepare, "SECONDS_BETWEEN_LINES", 0.0)
    done = command("prepare", *corpus, "--out=store")
    assert done.code == 0
    assert re.search(r"^\d+ of \d+ MB, [\d,]+ tokens, [\d.]+ MB/s, eta \d+ s$", done.err, re.M)


def test_it_imports_neither_lightning_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    code = ("import sys; from gpt_lightning.cli.main import main; "
            "main(['prepare', 'a.txt', '--out', 'store', '--val_ratio', '0']); "
            "sys.stderr.write(' '.join(sys.modules))")  # fmt: skip
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0
    assert not {"lightning", "torch"} & set(done.stderr.split())


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Peak RSS of a process, for one long document and many short ones: 4 times the text, at most 4 MB more."""
    code = ("import sys; from gpt_lightning.cli.main import main; from gpt_lightning.data.prepare import chunk; "
            "chunk.CHUNK_BYTES = 1 << 16; assert main(sys.argv[1:]) == 0; "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")  # fmt: skip
    peaks = []
    for times in (80, 320):
        rows = str(write_lines(tmp_path / "a.jsonl", [SAMPLE] * times))
        (tmp_path / "a.txt").write_text(SAMPLE * times)
        out = f"--out={tmp_path}/{times}"
        done = python("-c", code, "prepare", rows, f"{tmp_path}/a.txt", out, "--val_ratio=0")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 4
    assert peaks[1] < 200


def test_a_file_that_holds_ten_thousand_times_its_size_takes_no_memory(tmp_path: Path) -> None:
    """Peak RSS of a process, for 5 and for 80 MB of text."""
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
        done = python("-c", code, "prepare", str(path), out, "--val_ratio=0", "--workers=1")
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 40
