"""Log messages: --quiet and --verbose choose them, a Python program silences them."""

import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND, log_to_stderr
from helpers import (
    SMALL_QUICKSTART,
    Command,
    python,
)

FIT = ("fit", *SMALL_QUICKSTART, "--trainer.max_steps=2")


@contextmanager
def stderr_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[bytearray]:
    """Make standard error a pseudo-terminal; after the block, the bytes that were written to it."""
    pty = pytest.importorskip("pty")
    controller, descriptor = pty.openpty()
    shown = bytearray()

    def read() -> None:
        with suppress(OSError):  # at the end of the terminal
            while chunk := os.read(controller, 4096):
                shown.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with monkeypatch.context() as patch, open(descriptor, "w", encoding="utf-8") as stream:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", stream)
        yield shown
    reader.join()
    os.close(controller)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_quiet_fit_shows_results_and_warnings_only(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stderr_on_a_terminal(monkeypatch) as shown:
        # a setting that has no effect, so that there is a warning
        result = command(*FIT, "--trainer.num_sanity_val_steps=1", "--quiet")
    assert result.code == 0
    assert "The tower clock" in result.out
    line = b"gpt_lightning: trainer.num_sanity_val_steps: has no effect"
    assert shown.startswith(line)
    assert shown.count(b"\n") == 1

    with stderr_on_a_terminal(monkeypatch) as shown:
        assert command(*FIT, "--run=again").code == 0
    assert b"eta" in shown  # the progress bar
    assert b"checkpoints/again: done" in shown


def test_quiet_command_still_reports_errors(command: Command) -> None:
    result = command("generate", "--from=nowhere", "--prompt=x", "--quiet")
    assert result.code == 2
    assert result.err.startswith("gpt_lightning: error: nowhere: does not exist")


LIGHTNING_INFO = "`Trainer.fit` stopped"  # one of Lightning's messages, at the end of each run


@pytest.mark.slow
def test_only_verbose_fit_shows_lightnings_messages(command: Command, tmp_path: Path) -> None:
    """In a separate process, because Lightning sets up its logger when it is imported."""
    result = python("-m", "gpt_lightning", *FIT, "--verbose", "--run=verbose", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert LIGHTNING_INFO in result.stderr
    assert LIGHTNING_INFO not in result.stdout
    quiet = command(*FIT)
    assert LIGHTNING_INFO not in quiet.err + quiet.out


NOTEBOOK = """
import logging, sys
import gpt_lightning
from gpt_lightning import RunConfig, fit, validate

logging.getLogger("gpt_lightning").setLevel(sys.argv[1])
config = RunConfig(
    model={"config": dict(context_length=16, emb_dim=4, n_heads=1, n_layers=1)},
    data={"text": "sample", "train_ratio": 0.1, "stride": 40},
    trainer={"accelerator": "cpu", "max_steps": 2},
)
fit(config)
config.ckpt_path = "last"
validate(config)
print([logging.getLogger(f"lightning.{name}").level for name in ("pytorch", "fabric")])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("level", "is_shown"), [("NOTSET", False), ("DEBUG", True)])
def test_python_program_does_not_see_lightnings_tips(
    tmp_path: Path, level: str, is_shown: bool
) -> None:
    result = python("-W", "default", "-c", NOTEBOOK, level, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for message in (LIGHTNING_INFO, "Seed set to", "GPU available"):
        assert (message in result.stderr) == is_shown
    assert "LeafSpec" not in result.stderr
    assert "logging interval" not in result.stderr
    # Lightning's own levels are back
    assert result.stdout.splitlines()[-1] == str([logging.INFO] * 2)


def test_quiet_and_verbose_contradict(command: Command) -> None:
    result = command("fit", "--quiet", "--verbose")
    assert (result.code, result.err) == (
        2,
        "gpt_lightning: error: quiet: contradicts --verbose; give one of them\n",
    )


def test_only_the_options_are_taken_from_the_arguments(command: Command) -> None:
    """``quiet``, ``verbose`` and ``debug`` are also words that a user may give as a value."""
    for word in ("quiet", "verbose", "debug"):
        assert f"{word}: does not exist" in command("generate", "--from", word, "--prompt=x").err


@pytest.mark.parametrize(
    "asked",
    ["--help", "fit --help-all", "validate --help-all", "plan --help-all", "generate --help",
     "report --help", "report sampling --help", "report sweep --help", "report sizes --help",
     "download --help", "prepare --help", "convert --help", "verify-resume --help"],
)  # fmt: skip
def test_every_complete_help_names_the_options_of_every_command(
    command: Command, asked: str
) -> None:
    shown = command(*asked.split()).out
    assert OPTIONS_OF_EVERY_COMMAND in " ".join(shown.split())


def test_profilers_report_is_shown_even_by_quiet(command: Command) -> None:
    result = command(*FIT, "--trainer.profiler=simple", "--quiet")
    assert result.code == 0
    assert "Profiler Report" in result.err


def test_main_leaves_no_handler_behind(command: Command) -> None:
    def handlers() -> dict[str, list[logging.Handler]]:
        names = ("gpt_lightning", "lightning.pytorch.profilers")
        return {name: logging.getLogger(name).handlers[:] for name in names}

    logger = logging.getLogger("gpt_lightning")
    before = handlers(), logger.level, logger.propagate
    command("--version")
    command(*FIT)
    command("nonsense", "--verbose")
    assert (handlers(), logger.level, logger.propagate) == before
    with pytest.raises(KeyError), log_to_stderr(logging.DEBUG):
        raise KeyError
    assert (handlers(), logger.level, logger.propagate) == before


LIBRARY = """
import logging, sys, torch
from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.pretrained.source import logger

def log():
    logger.info("an info"); logger.warning("a warning")

log()
ours = logging.getLogger("gpt_lightning")
ours.setLevel(logging.ERROR)
log()
ours.setLevel(logging.NOTSET)
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
log()
"""


def test_python_program_decides_what_it_sees() -> None:
    result = python("-c", LIBRARY)
    assert result.returncode == 0
    assert result.stderr.splitlines() == [
        "a warning",  # as Python's logging does for every library
        "gpt_lightning.pretrained.source an info",
        "gpt_lightning.pretrained.source a warning",
    ]


def test_command_leaves_nothing_behind_in_a_notebook(command: Command) -> None:
    """No handlers, signal handlers, filters of warnings or replaced streams."""

    def state() -> list[object]:
        names = ("", "gpt_lightning", "lightning.pytorch", "lightning.fabric")
        loggers = [logging.getLogger(name) for name in names]
        handlers = [(logger.handlers[:], logger.level) for logger in loggers]
        signals = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        return [handlers, signals, warnings.filters[:], sys.stdout, sys.stderr, sys.excepthook]

    before = state()
    assert command(*FIT).code == 0
    assert command("fit", "--config=none.yaml").code == 2
    assert command("validate", "--help-all").code == 0
    assert state() == before


@pytest.mark.slow
def test_backend_of_a_notebook_does_not_end_a_command(tmp_path: Path) -> None:
    """``!python -m gpt_lightning`` inherits a kernel's MPLBACKEND, also into an environment that lacks the backend."""
    env = os.environ | {"MPLBACKEND": "module://not_installed.backend_inline"}
    for arguments in (
        ["report", "sampling", "--num_samples=10", "--out=figures"],
        [*FIT, "--trainer.accelerator=cpu"],
    ):
        result = python("-m", "gpt_lightning", *arguments, cwd=tmp_path, env=env)
        assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("figures/*.png"))
    assert list(tmp_path.glob("checkpoints/*/loss.png"))
