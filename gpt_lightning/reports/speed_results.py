"""What the report on training speed shows: a row of the table, JSON, bars."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from gpt_lightning.palette import SERIES
from gpt_lightning.reports.plotting import add_caption, format_number

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure


@dataclass(frozen=True)
class SpeedRow:
    """The measurements of one row.

    Attributes:
        change: What it changes.
        reason: Why the row was not measured. ``None``: it was.
        is_kept: Whether the next rows have this change too: it made training faster.
        speedup: Tokens per second over the first row's.
        losses: Of the optimizer steps, in nats per token.
        loss_difference: Largest difference of a loss from the first row's on the same windows.
        is_equal: Whether it is within the tolerance of the number format.
        peak_memory_bytes: Of the process; on a GPU what torch allocated there.
    """

    name: str
    change: str
    reason: str | None = None
    is_kept: bool = False
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    speedup: float | None = None
    peak_memory_bytes: int | None = None
    losses: tuple[float, ...] = ()
    loss_difference: float | None = None
    is_equal: bool | None = None

    def as_text(self) -> dict[str, str]:
        if self.tokens_per_second is None or self.peak_memory_bytes is None:
            return {"row": self.name, "tokens/s": "", "x first": "", "memory": "", "loss differs by": "",
                    "note": f"not measured: {self.reason}"}  # fmt: skip
        note = self.change if self.is_kept else f"{self.change}; slower here, so left out below"
        if not self.is_equal:
            note += "; the loss DIFFERS"
        return {
            "row": self.name,
            "tokens/s": f"{self.tokens_per_second:,.0f}",
            "x first": f"{self.speedup:.2f}",
            "memory": f"{self.peak_memory_bytes / 1e9:,.2f} GB",
            "loss differs by": f"{self.loss_difference:.1e}",
            "note": note,
        }


def as_dict(rows: Sequence[SpeedRow]) -> dict[str, list[dict[str, object]]]:
    """The rows for JSON."""
    return {"rows": [asdict(row) for row in rows]}


def speed_figure(rows: Sequence[SpeedRow], caption: str = "") -> "Figure":
    """Bars of the tokens per second of the rows that were measured."""
    from gpt_lightning.figure import Figure

    measured = [row for row in rows if row.tokens_per_second is not None]
    figure = Figure(figsize=(9, 0.55 * len(measured) + 1.8), layout="constrained")
    axes = figure.add_subplot()
    rates = [row.tokens_per_second or 0.0 for row in measured]
    colors = [SERIES[0] if row.is_kept else "0.75" for row in measured]
    bars = axes.barh([row.name for row in measured], rates, color=colors)
    labels = [
        f"{format_number(rate)}  ({row.speedup:.2f} x)"
        for rate, row in zip(rates, measured, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_title(
        "tokens per second; gray: slower here, so the next rows do without it", fontsize=12
    )
    axes.spines[["top", "right"]].set_visible(False)
    add_caption(figure, caption)
    return figure
