"""Figures of a study."""

import warnings
from pathlib import Path

import numpy as np
import pytest

from gpt_lightning.tuning import figures
from gpt_lightning.tuning.space import Space, read_space
from gpt_lightning.tuning.study import TrialResult

SPACE = {
    "model.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "a": [10, 2, 5],
    "b": [None, "x", [1]],
}


@pytest.fixture
def space() -> Space:
    return read_space(SPACE, lambda name: True)


@pytest.fixture
def trials(tmp_path: Path) -> list[TrialResult]:
    """Eight complete trials, one that failed and one that is running."""
    found = []
    for number, lr in enumerate(np.geomspace(1e-4, 1e-2, 8)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = "".join(f"{step},{step},{5 - step + number}\n" for step in range(3))
        (folder / "metrics.csv").write_text(f"step,tokens_seen,val_loss\n{rows}")
        params = {
            "a": [10, 2, 5][number % 3],
            "b": [None, "x", [1]][number % 3],
            "model.lr": float(lr),
        }
        found.append(TrialResult(number, "COMPLETE", 3.0 + number, params, folder))
    failed = TrialResult(8, "FAIL", None, found[0].params, tmp_path / "8", error="no")
    return [*found, failed, TrialResult(9, "RUNNING", None, {}, tmp_path / "9")]


def test_parallel_coordinates_have_a_line_for_each_complete_trial(
    space: Space, trials: list[TrialResult]
) -> None:
    figure = figures.parallel_figure(space, trials)
    figure.canvas.draw()
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.lines if len(line.get_xdata()) == 4}
    assert sum(len(line.get_xdata()) == 4 for line in axes.lines) == 8
    best = lines["best: trial 0, loss 3.0000"]
    # the axes are a (its numbers in order: 2, 5, 10), b, the logarithm of model.lr, the loss
    assert list(best.get_ydata()) == [1.0, 0.0, 0.0, 0.0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [
        "a",
        "b",
        "lr",
        "validation loss",
    ]


def test_losses_are_those_of_the_best_runs(trials: list[TrialResult]) -> None:
    (axes,) = figures.losses_figure(trials).axes
    assert [line.get_label() for line in axes.lines] == [
        f"trial {n} ({3 + n}.0000 at the end)" for n in range(6)
    ]
    assert list(axes.lines[1].get_ydata()) == [6.0, 5.0, 4.0]


def test_losses_of_runs_on_another_machine_are_left_out(trials: list[TrialResult]) -> None:
    for trial in trials[:7]:
        (trial.folder / "metrics.csv").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.losses_figure(trials).canvas.draw()


def test_importance_has_the_largest_bar_on_top() -> None:
    (axes,) = figures.importance_figure({"a": 0.2, "model.lr": 0.8}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "model.lr"]
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.8]
