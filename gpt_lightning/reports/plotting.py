"""Helpers for the reports' figures: captions, text that the font can draw, grouped bars."""

import math
import textwrap
from functools import cache
from typing import TYPE_CHECKING

from gpt_lightning.palette import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gpt_lightning.figure import Figure


def add_caption(figure: "Figure", caption: str) -> None:
    """Write the settings of a report under its figure, wrapped to the width; an empty caption takes no space."""
    if not caption:
        return
    characters = int(13 * figure.get_figwidth())  # of 9 points
    text = textwrap.fill(escape_undrawable(caption), characters)
    figure.supxlabel(text, fontsize=9, parse_math=False)


def escape_undrawable(text: str) -> str:
    """The text with escapes for characters that matplotlib's font lacks. It would draw boxes, with a warning."""
    drawable = _font_characters()
    return "".join(
        c if ord(c) in drawable and c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


@cache
def _font_characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def grouped_bars(
    axes: "Axes", names: list[str], title: str, series: dict[str, list[float | None]]
) -> None:
    """Draw a group of bars for each name, one bar for each series, with its number above it."""
    axes.set_title(title, fontsize=12, pad=26 if len(series) > 1 else 8)
    if all(value is None for values in series.values() for value in values):
        axes.set_axis_off()
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, fontsize=10)
        return
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        offset = (i - (len(series) - 1) / 2) * width
        positions = [group + offset for group in range(len(names))]
        heights = [value or 0.0 for value in values]
        bars = axes.bar(positions, heights, 0.94 * width, color=SERIES[i], label=label)
        labels = ["–" if value is None else format_number(value) for value in values]
        axes.bar_label(bars, labels, padding=2, fontsize=9)
    axes.set_xticks(
        range(len(names)), [escape_undrawable(name) for name in names], fontsize=10, rotation=20,
        ha="right", rotation_mode="anchor", parse_math=False,
    )  # fmt: skip
    axes.margins(y=0.12)
    axes.set_xlim(-0.7, len(names) - 0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:,.10g}")
    if len(series) > 1:  # between the bars and the title
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=10, frameon=False
        )


def format_number(value: float) -> str:
    """At least three digits, never an exponent: ``1,020``, ``17.9``, ``0.585``, ``0.0042``."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def format_percent(share: float) -> str:
    """``57 %``, ``4.3 %``, ``0.01 %``, ``<0.01 %`` below that; ``0`` only for exactly 0."""
    if share == 0.0:
        return "0"
    if share < 0.0001:
        return "<0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"
