"""Fixtures of the tests of cli."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import SMALL_QUICKSTART, Command, CommandResult


@pytest.fixture
def refused_fit(command: Command, tmp_path: Path) -> Iterator[Command]:
    """``fit`` with small settings, which must not leave a run."""

    def run(*arguments: str) -> CommandResult:
        return command("fit", *SMALL_QUICKSTART, "--trainer.max_steps=1", *arguments)

    yield run
    assert not (tmp_path / "checkpoints").exists()
