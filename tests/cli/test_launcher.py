"""Ranks and ports that launchers leave in the environment."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gpt_lightning.cli.launcher import remove_stale_ranks
from helpers import SMALL_QUICKSTART, python
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
    """Events and samples are written, and a finished run is not overwritten."""
    fit = ("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, "--trainer.max_steps=2")
    environment = {k: v for k, v in os.environ.items() if k != "WORLD_SIZE"} | {name: "1"}
    result = python(*fit, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2  # losses and a sample
    assert list((tmp_path / RUN).glob("events.*"))
    again = python(*fit, cwd=tmp_path, env=environment)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr


def test_rank_of_a_launcher_with_one_device_is_refused(tmp_path: Path) -> None:
    environment = os.environ | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
    result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, "--trainer.max_steps=2",
                  cwd=tmp_path, env=environment)  # fmt: skip
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "this process number 1 of several" in result.stderr
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
