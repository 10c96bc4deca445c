"""Figures of a study: importance of the settings, parallel coordinates, losses of the best runs."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt_lightning.palette import INK, SEQUENTIAL, SERIES
from gpt_lightning.tuning.space import Choices, Domain, Space
from gpt_lightning.tuning.study import TrialResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_TICKS = 8  # choices with a label on one axis


def importance_figure(importances: dict[str, float]) -> "Figure":
    """Bars of what :meth:`TuneStudy.importances` returns."""
    from matplotlib.figure import Figure

    names = sorted(importances, key=lambda name: importances[name])
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(names)), dpi=150, layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [importances[name] for name in names], color=SERIES[0])
    axes.bar_label(bars, [f"{importances[name]:.2f}" for name in names], padding=3)
    axes.set_xlim(0, 1.1 * max(importances.values()))
    axes.set_xlabel("Importance for the validation loss (PED-ANOVA)")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def parallel_figure(space: Space, trials: Sequence[TrialResult]) -> "Figure":
    """One line for each complete trial, across an axis for each setting and one for the loss; the best on top."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    complete = sorted(
        (trial for trial in trials if trial.value is not None), key=lambda trial: -_loss(trial)
    )
    losses = [_loss(trial) for trial in complete]
    low, high = min(losses), max(losses)
    names = list(space.domains)
    figure = Figure(figsize=(max(6, 1.7 * (len(names) + 1)), 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = colormaps[SEQUENTIAL]
    for trial in complete:
        heights = [_height(space.domains[name], trial.params[name]) for name in names]
        share = (_loss(trial) - low) / (high - low) if high > low else 0.0
        is_best = trial is complete[-1]
        axes.plot(
            range(len(names) + 1),
            [*heights, share],
            color=SERIES[5] if is_best else colors(0.9 * share),
            linewidth=2.5 if is_best else 1,
            alpha=1 if is_best else 0.7,
            label=f"best: trial {trial.number}, loss {_loss(trial):.4f}" if is_best else None,
        )
    for position, name in enumerate(names):
        _draw_axis(axes, position, _ticks(space.domains[name]))
    _draw_axis(axes, len(names), [(0.0, f"{low:.3f}"), (1.0, f"{high:.3f}")])
    labels = [name.rpartition(".")[2] for name in names]
    axes.set_xticks(range(len(names) + 1), [*labels, "validation loss"], rotation=20, ha="right")
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(names) + 0.5)
    axes.spines[:].set_visible(False)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return figure


def losses_figure(trials: Sequence[TrialResult]) -> "Figure":
    """Validation losses of the evaluations of the best runs, over tokens seen."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    complete = sorted((trial for trial in trials if trial.value is not None), key=_loss)
    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for trial, color in zip(complete, SERIES, strict=False):
        rows = _evaluations(trial.folder / "metrics.csv")
        marker = "o" if len(rows) == 1 else ""  # a line of one point is not visible
        label = f"trial {trial.number} ({_loss(trial):.4f} at the end)"
        tokens, losses = [row[0] for row in rows], [row[1] for row in rows]
        axes.plot(tokens, losses, color=color, marker=marker, label=label)
    axes.set_xlabel("Tokens seen")
    axes.set_ylabel("Validation loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlim(left=0)
    axes.legend()
    return figure


def _loss(trial: TrialResult) -> float:
    assert trial.value is not None
    return trial.value


def _evaluations(path: Path) -> list[tuple[float, float]]:
    """Tokens seen and validation loss of each evaluation; empty if the run is on another machine."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val_loss")]
    return [(float(row["tokens_seen"]), float(row["val_loss"])) for row in rows]


def _height(domain: Domain, value: Any) -> float:
    """Position of a value on its axis, from 0 to 1."""
    if isinstance(domain, Choices):
        texts = [repr(each) for each in _in_order(domain)]  # as values, 1 and true are equal
        return texts.index(repr(value)) / max(1, len(texts) - 1)
    if domain.high == domain.low:
        return 0.0
    if domain.log:
        return math.log(value / domain.low) / math.log(domain.high / domain.low)
    return float((value - domain.low) / (domain.high - domain.low))


def _in_order(choices: Choices) -> list[Any]:
    """Numbers by their size, other values as in the file."""
    are_numbers = all(isinstance(value, int | float) for value in choices.values)
    return sorted(choices.values) if are_numbers else list(choices.values)


def _ticks(domain: Domain) -> list[tuple[float, str]]:
    """Positions and labels on an axis."""
    if isinstance(domain, Choices):
        step = -(-domain.size // MAX_TICKS)
        return [(_height(domain, each), _shorten(each)) for each in _in_order(domain)[::step]]
    return [(0.0, f"{domain.low:g}"), (1.0, f"{domain.high:g}")]


def _shorten(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 14 else f"{text[:13]}…"


def _draw_axis(axes: "Axes", position: int, ticks: list[tuple[float, str]]) -> None:
    axes.axvline(position, color=INK, linewidth=0.8, zorder=0)
    for height, label in ticks:
        axes.annotate(
            label, (position, height), (4, 3), textcoords="offset points", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
            parse_math=False,
        )  # fmt: skip
