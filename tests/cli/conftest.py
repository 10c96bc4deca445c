"""Fixtures of the tests of cli."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import QUICKSTART, SMALL, Command, CommandResult


@pytest.fixture
def refused_fit(command: Command, tmp_path: Path) -> Iterator[Command]:
    """``fit`` on a small setting; whatever it was refused for, it left no run behind."""

    def run(*arguments: str) -> CommandResult:
        return command("fit", QUICKSTART, *SMALL, "--trainer.max_steps=1", *arguments)

    yield run
    assert not (tmp_path / "checkpoints").exists()
