"""What a run shows of itself: a bar on a terminal, else lines."""

import re
from functools import partial

import pytest
from conftest import Command
from rich.console import Console

from gpt_lightning.training import progress_bar

STEPS = 6


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(progress_bar, "Console", partial(Console, force_terminal=True, width=120))


def shown(err: str) -> list[int]:
    """The steps that the bar or the lines told, in order."""
    return [int(step) for step in re.findall(rf"(\d+)/{STEPS}\b", err)]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("seconds", [0.1, 1000.0])
def test_a_terminal_has_a_bar_that_ends_whole(
    fit: Command, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """However seldom it is looked at."""
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_UPDATES", seconds)
    done = fit(f"--trainer.max_steps={STEPS}", "--evaluation.eval_freq=1")
    assert "training" in done.err
    assert "━" in done.err
    assert re.search(r"val_loss \d+\.\d{3}", done.err)
    assert not re.search(r"^step \d+", done.err, re.MULTILINE)
    assert shown(done.err) == sorted(shown(done.err))
    assert shown(done.err)[-1] == STEPS
    if seconds == 1000.0:
        assert not {2, 3, 4, 5} & set(shown(done.err))
    assert "━" not in done.out


@pytest.mark.usefixtures("terminal")
def test_a_resumed_run_begins_where_it_was(fit: Command) -> None:
    fit("--trainer.max_steps=4")
    done = fit(f"--trainer.max_steps={STEPS}", "--ckpt_path=last")
    assert shown(done.err)[0] == 4
    assert shown(done.err)[-1] == STEPS


def test_without_a_terminal_lines_come(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0)
    done = fit(f"--trainer.max_steps={STEPS}")
    lines = re.findall(
        rf"^step (\d)/{STEPS}, \d+\.\d\d s a step, eta \d+ s$", done.err, re.MULTILINE
    )
    assert lines == ["1", "2", "3", "4", "5", "6"]
    assert "\x1b" not in done.err
    assert "━" not in done.err


@pytest.mark.usefixtures("terminal")
def test_a_dumb_terminal_has_lines_too(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0)
    done = fit(f"--trainer.max_steps={STEPS}")
    assert shown(done.err) == [1, 2, 3, 4, 5, 6]
    assert "━" not in done.err


def test_lines_come_at_intervals(fit: Command) -> None:
    assert shown(fit(f"--trainer.max_steps={STEPS}").err) == []


@pytest.mark.usefixtures("terminal")
def test_no_bar_where_none_is_wanted(fit: Command) -> None:
    done = fit(f"--trainer.max_steps={STEPS}", "--trainer.enable_progress_bar=false")
    assert "━" not in done.err
    assert shown(done.err) == []
