"""Fixtures: the real command, the book's text and figures, a setting small enough for a test suite."""

import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

# without a GPU our kernels run in Python; Triton asks for this when it is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# of pytest-xdist's processes each has one core, and so have the commands that they start
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from gpt_lightning.cli.logs import log_to_stderr
from gpt_lightning.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

# a model and a text that train in a second, on top of any config
SMALL = [
    "--trainer.accelerator=cpu",
    "--model.config.context_length=16",
    "--model.config.emb_dim=16",
    "--model.config.n_heads=2",
    "--model.config.n_layers=2",
    "--data.text=sample",
    "--data.train_ratio=0.1",
    "--data.stride=40",
    "--data.batch_size=2",
    "--evaluation.eval_iter=2",
    "--evaluation.max_new_tokens=5",
]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """``gpt_lightning ARGUMENTS`` in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return Done(code, out, err)

    return run


@pytest.fixture
def messages() -> Iterator[None]:
    """The package's log messages on standard error, as while a command runs."""
    with log_to_stderr(logging.INFO):
        yield


@pytest.fixture
def fit(command: Command) -> Command:
    """``fit`` on quickstart.yaml with the settings ``SMALL``; must succeed."""

    def run(*arguments: str) -> Done:
        done = command("fit", f"--config={ROOT}/configs/quickstart.yaml", *SMALL, *arguments)
        assert done.code == 0, done.err
        return done

    return run


@pytest.fixture(scope="session")
def verdict() -> Path:
    """The Verdict, from ../shared or the user's cache."""
    cache = Path(os.environ.get("GPT_LIGHTNING_CACHE", Path.home() / ".cache/gpt_lightning"))
    for path in (SHARED / "data" / "the-verdict.txt", cache / "the-verdict.txt"):
        if path.exists():
            return path
    pytest.skip(f"The Verdict is neither in {SHARED / 'data'} nor in {cache}")


@pytest.fixture
def verdict_in_cache(command: Command, verdict: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    shutil.copy(verdict, tmp_path / "cache" / "the-verdict.txt")


def reference(name: str) -> dict[str, Any]:
    path = SHARED / "reference" / name
    if not path.exists():
        pytest.skip(f"{path} is absent")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def python(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    """This Python in a process of its own, which fails the test where it hangs."""
    settings.setdefault("timeout", 300)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **settings
    )
