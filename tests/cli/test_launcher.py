"""Ranks and ports that launchers leave in the environment."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from gpt_lightning.cli.launcher import remove_stale_ranks
from helpers import SMALL_QUICKSTART, Command, assert_refused, python
from runs import (
    RUN,
)


@pytest.mark.parametrize(
    "name",
    [
        "RANK",
        pytest.param("LOCAL_RANK", marks=pytest.mark.slow),
        pytest.param("SLURM_PROCID", marks=pytest.mark.slow),
    ],
)
def test_leftover_rank_is_ignored(tmp_path: Path, name: str) -> None:
    """Events and samples are written, and a finished run is not overwritten.

    In a new process, because Lightning reads its rank when it is imported.
    """
    twice = f"""
import os, sys
from gpt_lightning.cli.main import main
for _ in range(2):
    os.environ[{name!r}] = "1"
    print(main(sys.argv[1:]))
"""
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {name: "1"}
    fit = ("fit", *SMALL_QUICKSTART, "--trainer.max_steps=2")
    result = python("-c", twice, *fit, cwd=tmp_path, env=environment)
    *shown, code, again = result.stdout.splitlines()
    assert (code, again) == ("0", "2"), result.stderr
    assert len(shown) == 2  # losses and a sample
    assert list((tmp_path / RUN).glob("events.*"))
    assert "holds a run already" in result.stderr.splitlines()[-1]


def test_rank_of_a_launcher_with_one_device_is_refused(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(variable, value)
    # Lightning has read its rank, when it was imported
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    result = command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=2")
    assert_refused(result, "this process number 1 of several")
    assert not (tmp_path / "checkpoints").exists()


def test_ranks_set_by_a_launcher_are_kept_and_stale_ones_removed() -> None:
    for launcher in (
        {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"},
        {"JSM_NAMESPACE_RANK": "1", "JSM_NAMESPACE_SIZE": "2"},
    ):
        environment = dict(launcher)
        remove_stale_ranks(environment)
        assert environment == launcher
    for stale in ("RANK", "LOCAL_RANK", "SLURM_PROCID"):
        environment = {stale: "1", "HOME": "/"}
        remove_stale_ranks(environment)
        assert environment == {"HOME": "/"}


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as listening:
        listening.bind(("", 0))
        listening.listen()
        yield listening.getsockname()[1]


def running_below(folder: Path) -> list[psutil.Process]:
    """Processes whose working directory is ``folder``."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
def test_port_in_use_is_not_taken(tmp_path: Path, used_port: int) -> None:
    environment = os.environ | {"MASTER_PORT": str(used_port), "MASTER_ADDR": "192.0.2.1"}
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, "--trainer.max_steps=2",
                  "--trainer.devices=2", cwd=tmp_path, env=environment)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert not running_below(tmp_path)


@pytest.mark.slow
def test_port_of_a_launcher_in_use_is_reported_in_one_line(tmp_path: Path, used_port: int) -> None:
    environment = os.environ | {
        "MASTER_PORT": str(used_port), "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0",
        "LOCAL_RANK": "0", "WORLD_SIZE": "2",
    }  # fmt: skip
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, "--trainer.max_steps=2",
                  "--trainer.devices=2", cwd=tmp_path, env=environment)  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("gpt_lightning: error: MASTER_PORT: ")
    assert "Traceback" not in result.stderr
    assert not running_below(tmp_path)
