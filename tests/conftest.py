"""Fixtures of all tests: the real command, a trained run, the book's text."""

import gc
import importlib.util
import io
import logging
import os
import shutil
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# each of pytest-xdist's processes has one core, and so have the commands that they start; OpenMP
# reads this when torch is first imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# without a GPU our kernels run in Python; Triton asks for this when it is first imported
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# the tests' servers are on this machine, not behind a proxy that it uses
os.environ["NO_PROXY"] = f"127.0.0.1,{os.environ.get('NO_PROXY', '')}".rstrip(",")
os.environ["no_proxy"] = f"127.0.0.1,{os.environ.get('no_proxy', '')}".rstrip(",")

from faulty_host import FaultyHost, handler
from forked_runs import Runs
from gpt_lightning.cli.logs import log_to_stderr
from gpt_lightning.cli.main import main
from gpt_lightning.data import corpus
from gpt_lightning.storage.cache import cache_folder
from helpers import ROOT, SMALL_QUICKSTART, Command, CommandResult

NO_VERDICT = (
    "The Verdict is neither in ../shared/data nor in the user's cache, and it cannot be downloaded "
    f"from {corpus.VERDICT_URL}"
)


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of the tests' process are not synced: no test needs it, and it takes long on a slow disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """``gpt_lightning ARGUMENTS`` in this process, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "stdin", io.StringIO())

    from gpt_lightning.training import run_files

    draw = run_files.figure_to_array

    def draw_little(figure: Any) -> Any:
        figure.set_dpi(20)
        for axes in figure.axes:
            axes.set_axis_off()  # tests/reports/test_plotting.py draws labels
        return draw(figure)

    monkeypatch.setattr(run_files, "figure_to_array", draw_little)

    def run(*arguments: str) -> CommandResult:
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        return CommandResult(code, out, err)

    return run


@pytest.fixture
def messages() -> Iterator[None]:
    """The package's log messages on standard error, as while a command runs."""
    with log_to_stderr(logging.INFO):
        yield


@pytest.fixture
def fit(command: Command) -> Command:
    """``fit`` on quickstart.yaml with the settings ``SMALL``; must succeed."""

    def run(*arguments: str) -> CommandResult:
        result = command("fit", *SMALL_QUICKSTART, *arguments)
        assert result.code == 0, result.err
        return result

    return run


@pytest.fixture
def host() -> Iterator[FaultyHost]:
    """A server on this machine with faults that a test chooses."""
    host = FaultyHost()

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            error = sys.exception()
            if not isinstance(error, ConnectionError):  # a client may hang up
                host.errors.append(repr(error))

    server = Server(("127.0.0.1", 0), handler(host))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    host.url = f"http://127.0.0.1:{server.server_port}"
    yield host
    server.shutdown()
    thread.join()
    server.server_close()
    assert host.errors == []


@pytest.fixture
def nowhere() -> str:
    """An address that refuses every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small run that was trained for a few steps; tests only read it."""
    folder = tmp_path_factory.mktemp("trained")
    root = f"--trainer.default_root_dir={folder}"
    assert main(["fit", *SMALL_QUICKSTART, "--trainer.max_steps=4", root]) == 0
    return folder / "checkpoints" / "quickstart"


@pytest.fixture(scope="session")
def runs() -> Iterator[Runs]:
    """The process that forks short runs; its start takes seconds."""
    with Runs() as process:
        yield process


@pytest.fixture
def gpt2(command: Command, tmp_path: Path) -> Any:
    """A random GPT-2 with 1,024 positions in the folder ``gpt2`` of the working directory."""
    from random_gpt2 import random_gpt2

    return random_gpt2(tmp_path / "gpt2", n_positions=1024)


@pytest.fixture(scope="session")
def plan_benchmark() -> ModuleType:
    """benchmarks/plan.py, which makes the tables of the docs."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec = importlib.util.spec_from_file_location("plan_benchmark", ROOT / "benchmarks/plan.py")
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="session")
def verdict() -> Path:
    """The Verdict: in ../shared/data, in the user's cache, or downloaded into it."""
    shared = ROOT.parent / "shared" / "data" / corpus.VERDICT
    if shared.exists():
        return shared
    with suppress(ValueError, OSError):
        corpus.read_corpus("verdict")
        return cache_folder() / corpus.VERDICT
    pytest.skip(NO_VERDICT)


@pytest.fixture
def verdict_in_cache(
    verdict: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir()
    shutil.copy(verdict, tmp_path / "cache" / corpus.VERDICT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = [r for r in terminalreporter.getreports("skipped") if NO_VERDICT in str(r.longrepr)]
    if skipped:
        tests = "1 test was" if len(skipped) == 1 else f"{len(skipped)} tests were"
        terminalreporter.write_line(f"{tests} not run: {NO_VERDICT}", yellow=True)


def pytest_collection_finish() -> None:
    """Exempt the imported modules from garbage collection, which passes over them again and again."""
    gc.collect()
    gc.freeze()
