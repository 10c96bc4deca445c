"""Standard streams that cannot take a text: a run still trains, another command's exit code says so."""

import errno
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpt_lightning.cli.streams import is_closed_pipe
from helpers import (
    ROOT,
    SMALL_QUICKSTART,
    Command,
    python,
)

FIT = ("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1")


Redirect = Callable[..., io.TextIOWrapper]


def without_a_reader() -> int:
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.fixture
def redirect(monkeypatch: pytest.MonkeyPatch) -> Iterator[Redirect]:
    """Make a descriptor ``sys.stdout`` or ``sys.stderr``, as Python does when it starts."""
    opened = []

    def to(descriptor: int, *, name: str = "stdout", encoding: str = "utf-8") -> io.TextIOWrapper:
        raw = io.FileIO(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(io.BufferedWriter(raw), encoding)
        opened.append(descriptor)
        monkeypatch.setattr(sys, name, stream)
        return stream

    yield to
    for descriptor in opened:
        os.close(descriptor)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_run_trains_without_its_output(
    command: Command, redirect: Redirect, tmp_path: Path
) -> None:
    redirect(full_disk())
    result = command(*FIT, "--run=full")
    assert result.code == 0
    lines = result.err.splitlines()
    (warning,) = (line for line in lines if "training continues" in line)
    assert "gpt_lightning: standard output: cannot be written (No space left on device)" in warning
    assert lines[-1].startswith("checkpoints/full: done")
    assert (tmp_path / "checkpoints" / "full" / "last.ckpt").exists()

    redirect(without_a_reader())
    redirect(without_a_reader(), name="stderr")
    assert command(*FIT, "--run=pipes").code == 0
    assert (tmp_path / "checkpoints" / "pipes" / "last.ckpt").exists()


def test_characters_that_cannot_be_encoded_are_escaped(
    command: Command, redirect: Redirect, tmp_path: Path
) -> None:
    folder = tmp_path / "Übungen"
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        redirect(os.dup(out.fileno()), encoding="ascii")
        redirect(os.dup(err.fileno()), name="stderr", encoding="ascii")
        root = f"--trainer.default_root_dir={folder}"
        assert command(*FIT, root, "--evaluation.prompt=Übermut – tut").code == 0
        source = f"--from={folder}/checkpoints/quickstart"
        for stream in ("true", "false"):
            prompt = ("--prompt=Übermut", "--max_new_tokens=1", f"--stream={stream}")
            assert command("generate", source, *prompt).code == 0
        assert command("--help").code == 0
    printed = (tmp_path / "out").read_text("ascii")
    assert "\n\\xdcbermut \\u2013 tut" in printed
    assert printed.count("\n\\xdcbermut") == 3
    assert "usage: " in printed
    assert "\\xdcbungen/checkpoints/quickstart: done" in (tmp_path / "err").read_text("ascii")


def closed() -> int:
    return os.open(os.devnull, os.O_RDONLY)  # writing fails as on a closed descriptor


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("--help",),
        ("generate", "--help"),
        ("fit", "--help"),
        ("report", "sampling"),
        ("report", "sampling", "--json"),
        ("fit", "--print_config"),
        ("prepare", f"{ROOT}/README.md", "--split=ratio", "--out=corpus"),
    ],
    ids=" ".join,
)
def test_lost_result_is_reported(
    command: Command, redirect: Redirect, arguments: tuple[str, ...]
) -> None:
    redirect(without_a_reader())
    result = command(*arguments)
    assert (result.code, result.err) == (141, "")
    for descriptor, cause in {full_disk(): "No space left", closed(): "Bad file"}.items():
        redirect(descriptor)
        result = command(*arguments)
        assert result.code == 2
        assert f"gpt_lightning: error: standard output: cannot be written ({cause}" in result.err
        assert result.err.count("\n") <= 2  # prepare says what was prepared before


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
def test_file_name_that_is_not_utf8(command: Command, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / name).write_text("A text. " * 1000)
    own = ("--data.train_ratio=0.5", "--data.stride=16")
    result = command(*FIT, "--data.text", name, *own)
    assert (result.code, result.err.splitlines()[-1][:32]) == (
        0,
        "checkpoints/quickstart: done; te",
    )


def test_streams_are_restored(command: Command) -> None:
    before = sys.stdout, sys.stderr
    command("--version")
    command("nonsense")
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
def test_closed_descriptors(tmp_path: Path) -> None:
    def closing(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        shell = f'exec "$0" -m gpt_lightning "$@" {redirection}'
        command = ["sh", "-c", shell, sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    result = closing(">&-", "--version")
    assert result.returncode == 2
    assert result.stderr.startswith("gpt_lightning: error: standard output: cannot be written")
    assert closing("2>&-", "--version").returncode == 0
    assert closing("2>&-", "nonsense").returncode == 2
    # a file that the command opens must not become its standard output
    text = tmp_path / "text.txt"
    text.write_text("A text. " * 1000)
    closing("<&- >&- 2>&-", "prepare", "text.txt", "--split=ratio", "--out=corpus")
    assert text.read_text() == "A text. " * 1000
    assert (tmp_path / "corpus" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("redirection", "devices"),
    [("| head -1", 1), ("<&- >&- 2>&-", 1), ("<&- >&- 2>&-", 2), ("2>&1 | head -c 1", 2)],
)
def test_run_trains_with_closed_streams(tmp_path: Path, redirection: str, devices: int) -> None:
    ranks = [f"--trainer.devices={devices}", "--trainer.strategy=ddp"][: 2 * (devices > 1)]
    shell = f'"$0" -m gpt_lightning "$@" {redirection}'
    subprocess.run(["sh", "-c", shell, sys.executable, *FIT, *ranks], cwd=tmp_path, check=True)
    run = tmp_path / "checkpoints" / "quickstart"
    assert (run / "last.ckpt").exists()
    assert len((run / "metrics.csv").read_text().splitlines()) == 2


@pytest.mark.slow
def test_run_trains_unbuffered_on_a_full_disk(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-u", "-m", "gpt_lightning", *FIT]
        subprocess.run(command, cwd=tmp_path, stdout=full, stderr=full, check=True)
    assert (tmp_path / "checkpoints" / "quickstart" / "last.ckpt").exists()
    assert python("-u", "-m", "gpt_lightning", "--version").stdout.startswith("gpt_lightning 0")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_errors_are_escaped_on_a_terminal() -> None:
    """A path may hold an escape sequence, which an error message escapes."""
    import pty

    pid, terminal = pty.fork()
    if not pid:
        path = "evil\x1b[2Jpath"
        os.execv(sys.executable, [sys.executable, "-m", "gpt_lightning", "generate",
                                  f"--from={path}", "--prompt=A"])  # fmt: skip
    output = b""
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # the process has ended
            break
        if not part:
            break
        output += part
    os.waitpid(pid, 0)
    os.close(terminal)
    assert b"error: evil\\x1b[2Jpath: does not exist" in output
    assert b"\x1b" not in output


def test_closed_pipe_of_windows_is_an_invalid_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    invalid = OSError(errno.EINVAL, "Invalid argument")
    assert is_closed_pipe(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert not is_closed_pipe(invalid)
    assert not is_closed_pipe(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(os, "name", "nt")
    assert is_closed_pipe(invalid)
