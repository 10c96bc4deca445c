"""Progress: a bar on a terminal, else lines."""

import builtins
import re
import sys
from functools import partial
from types import ModuleType

import pytest
from rich.console import Console

from gpt_lightning.training import progress_bar
from helpers import (
    Command,
)

STEPS = 6


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(progress_bar, "Console", partial(Console, force_terminal=True, width=120))


def shown(err: str) -> list[int]:
    """Steps that the bar or the lines show, in order."""
    return [int(step) for step in re.findall(rf"(\d+)/{STEPS}\b", err)]


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("seconds", [0.1, 1000.0])
def test_bar_on_a_terminal_ends_complete(
    fit: Command, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The bar may be updated often or never."""
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_REDRAWS", seconds)
    result = fit(f"--trainer.max_steps={STEPS}", "--evaluation.eval_freq=1")
    assert "training" in result.err
    assert "━" in result.err
    assert re.search(r"val_loss \d+\.\d{3}", result.err)
    assert not re.search(r"^step \d+", result.err, re.MULTILINE)
    assert shown(result.err) == sorted(shown(result.err))
    assert shown(result.err)[-1] == STEPS
    if seconds == 1000.0:
        assert not {2, 3, 4, 5} & set(shown(result.err))
    assert "━" not in result.out


@pytest.mark.usefixtures("terminal")
def test_bar_of_a_resumed_run_starts_at_its_step(fit: Command) -> None:
    fit("--trainer.max_steps=4")
    result = fit(f"--trainer.max_steps={STEPS}", "--ckpt_path=last")
    assert shown(result.err)[0] == 4
    assert shown(result.err)[-1] == STEPS


class Shown:
    """Stand-in for what ``IPython.display.display`` returns; it keeps the HTML of each drawing."""

    html: list[str]

    def update(self, html: str) -> None:
        self.html.append(html)


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Shown:
    shown = Shown()

    def display(html: str, *, display_id: bool) -> Shown:
        assert display_id  # else it could not be updated
        shown.html = [html]
        return shown

    module = ModuleType("IPython.display")
    vars(module).update(display=display, HTML=str)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: kernel, raising=False)
    return shown


@pytest.mark.parametrize("seconds", [0, 1000])
def test_bar_in_a_notebook(
    fit: Command, notebook: Shown, monkeypatch: pytest.MonkeyPatch, seconds: int
) -> None:
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_NOTEBOOK_REDRAWS", seconds)
    result = fit(f"--trainer.max_steps={STEPS}", "--evaluation.eval_freq=1")
    steps = [number for html in notebook.html for number in shown(re.sub("<.*?>", "", html))]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, STEPS)
    assert len({*steps}) == (STEPS + 1 if seconds == 0 else 3)  # of 1000 s: 0, 1 and the end
    assert re.search(r"val_loss \d+\.\d{3}", notebook.html[-1])
    assert "\x1b" not in "".join(notebook.html)
    assert "━" not in result.out + result.err


def test_lines_without_a_terminal(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0)
    result = fit(f"--trainer.max_steps={STEPS}")
    lines = re.findall(
        rf"^step (\d)/{STEPS}, \d+\.\d\d s a step, eta \d+ s$", result.err, re.MULTILINE
    )
    assert lines == ["1", "2", "3", "4", "5", "6"]
    assert "\x1b" not in result.err
    assert "━" not in result.err


@pytest.mark.usefixtures("terminal")
def test_lines_on_a_dumb_terminal(fit: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(progress_bar, "SECONDS_BETWEEN_LINES", 0)
    result = fit(f"--trainer.max_steps={STEPS}")
    assert shown(result.err) == [1, 2, 3, 4, 5, 6]
    assert "━" not in result.err


def test_lines_are_printed_at_intervals(fit: Command) -> None:
    assert shown(fit(f"--trainer.max_steps={STEPS}").err) == []


@pytest.mark.usefixtures("terminal")
def test_progress_bar_can_be_disabled(fit: Command) -> None:
    result = fit(f"--trainer.max_steps={STEPS}", "--trainer.enable_progress_bar=false")
    assert "━" not in result.err
    assert shown(result.err) == []
