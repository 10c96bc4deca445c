"""prepare as a pipeline: workers, memory, imports, progress."""

import re
import threading
from pathlib import Path

import pytest

from gpt_lightning.cli import console
from gpt_lightning.data.prepare.pipeline import prepare
from gpt_lightning.data.token_store import open_store
from helpers import Command, python
from token_stores import SAMPLE, SHARDS, read_files, write_lines


@pytest.mark.parametrize("workers", [2, 4])
def test_number_of_workers_does_not_change_the_store(
    corpus: list[str], whole: Path, tmp_path: Path, workers: int
) -> None:
    prepare(corpus, tmp_path / "out", SHARDS, workers=workers)
    assert read_files(tmp_path / "out") == read_files(whole)


def test_second_prepare_of_one_store_is_refused(corpus: list[str], tmp_path: Path) -> None:
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


def test_progress_is_reported(
    command: Command, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    result = command("prepare", *corpus, "--out=store")
    assert result.code == 0
    assert re.search(r"^\d+ of \d+ MB, [\d,]+ tokens, [\d.]+ MB/s, eta \d+ s$", result.err, re.M)


def test_prepare_imports_neither_lightning_nor_torch(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    code = ("import sys; from gpt_lightning.cli.main import main; "
            "main(['prepare', 'a.txt', '--out', 'store', '--val_ratio', '0']); "
            "sys.stderr.write(' '.join(sys.modules))")  # fmt: skip
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0
    assert not {"lightning", "torch"} & set(result.stderr.split())


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    """Peak RSS for one long document and many short ones: 50 MB of text more take less than 12 MB more.

    With the extra ``fast`` the peak itself varies by 5 MB, because a thread loads it meanwhile.
    """
    code = ("import sys; from gpt_lightning.cli.main import main; from gpt_lightning.data.prepare import chunk; "
            "chunk.CHUNK_BYTES = 1 << 16; assert main(sys.argv[1:]) == 0; "
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")  # fmt: skip
    peaks = []
    for times in (80, 1280):
        rows = str(write_lines(tmp_path / "a.jsonl", [SAMPLE] * times))
        (tmp_path / "a.txt").write_text(SAMPLE * times)
        out = f"--out={tmp_path}/{times}"
        result = python("-c", code, "prepare", rows, f"{tmp_path}/a.txt", out, "--val_ratio=0")
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] - peaks[0] < 12
    assert peaks[1] < 250  # 40 of them are pyarrow, which the extra fast needs
