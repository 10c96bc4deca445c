"""Tables, progress bars and texts on a terminal."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_lightning.cli.console import print_table
from helpers import Command


def on_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich treat the output as a terminal
    monkeypatch.setenv("COLUMNS", str(width))


@pytest.mark.parametrize("width", [60, 80])
def test_sweep_texts_are_below_the_table_at_any_width(
    command: Command, trained_run: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    on_terminal(monkeypatch, width)
    result = command("report", "sweep", f"--from={trained_run}", "--prompt=The clock", "--temperatures=[0,1]",
                   "--top_k=[1,5,0]", "--num_samples=2", "--max_new_tokens=9", "--top_p=[0.9,1]")  # fmt: skip
    assert result.code == 0, result.err
    out = re.sub(r"\x1b\[[0-9;]*m", "", result.out)
    table, _, texts = out.partition("\none text of each setting")
    if width > 60:  # 60 is narrower than the shortest words
        for name in ("temperature", "top_k", "top_p", "repetition", "entropy", "identical"):
            assert name in table
        assert max(map(len, table.splitlines()[1:])) <= width
    names = "temperature 0: top_k 1, 5, all with top_p 0.9, 1.0; temperature 1: top_k 1 with"
    assert names in " ".join(texts.split())
    assert texts.count("The clock") >= 2


@pytest.mark.parametrize("width", [80, 160])
def test_tables_are_never_cut_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    on_terminal(monkeypatch, width)
    row = {
        "model": "checkpoints/a-run/best.ckpt",
        **{f"measure {i}": f"{i}{i}.{i} GB" for i in range(12)},
    }
    print_table("sizes", [row, {**row, "model": "checkpoints/other/best.ckpt"}])
    out = capsys.readouterr().out
    for value in row.values():
        assert out.count(value) == (1 if value == row["model"] else 2)
    assert "…" not in out


def test_control_characters_are_escaped_on_a_terminal(
    command: Command, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In texts, tables and messages. A pipe gets the text unchanged, and newlines and tabs stay."""
    prompt = "The\tclock\n\x1b]0;owned\x07\x1b[31m\x9b1m"
    base = ("generate", f"--from={trained_run}", f"--prompt={prompt}", "--max_new_tokens=1")
    assert command(*base).out.startswith(prompt)
    folder = tmp_path / "a\x1b[31m.txt"
    folder.mkdir()
    (folder / ".hidden.txt").write_text("x")
    (folder / "b.txt").write_text("y" * 9)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    escaped = "The\tclock\n\\x1b]0;owned\\x07\\x1b[31m\\x9b1m"
    for more in (["--stream=true"], ["--stream=false"], ["--num_samples=2"]):
        out = command(*base, *more).out
        assert escaped in out
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out)
    sweep_arguments = ("report", "sweep", f"--from={trained_run}", "--temperatures=[1]", "--top_k=[5]", "--num_samples=2",
               "--max_new_tokens=3")  # fmt: skip
    result = command(*sweep_arguments, f"--prompt={prompt}")
    assert "\\x1b[31m" in result.out
    assert "\x1b]" not in result.out
    result = command("prepare", str(folder), "--val_ratio=0", "--out=c\x1b[31m")
    assert result.code == 0
    assert "\x1b" not in result.out + result.err
    assert "left out: 1 hidden" in result.err


_PROGRESS = """
import logging
from gpt_lightning.cli.console import progress
from gpt_lightning.cli.logs import log_to_stderr
from gpt_lightning.cli.streams import standard_streams
with standard_streams(ignore_stdout_errors=False), log_to_stderr(logging.INFO):
    with progress("cells", 1) as advance:
        advance()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_progress_bar_of_a_report_is_drawn_on_a_terminal() -> None:
    """Its control characters move the cursor, although those of messages are escaped."""
    terminal, end = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}  # a dumb terminal has no control codes
    subprocess.run([sys.executable, "-c", _PROGRESS], stderr=end, check=True, env=environment)
    os.close(end)
    drawn_bytes = os.read(terminal, 1 << 16)
    os.close(terminal)
    assert b"cells" in drawn_bytes
    assert b"\x1b[" in drawn_bytes
    assert b"\\x1b" not in drawn_bytes


def test_samples_during_training_are_escaped_on_a_terminal(
    fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "--evaluation.prompt=The \x1b[31mclock"
    arguments = (prompt, "--trainer.max_steps=1", "--trainer.limit_train_batches=1")
    assert "The \x1b[31mclock" in fit(*arguments, "--run=pipe").out
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    out = fit(*arguments, "--run=terminal").out
    assert "The \\x1b[31mclock" in out
    assert "\x1b" not in out
