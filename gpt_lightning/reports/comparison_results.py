"""What exercise 5.6 shows of each model: a row of the table, JSON, CSV, bars."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from gpt_lightning.evals.task_names import METRICS, TaskName
from gpt_lightning.reports.plotting import add_caption, grouped_bars

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure


@dataclass(frozen=True)
class ModelMeasurement:
    """The measurements of one model. Losses are in nats per token.

    Attributes:
        skipped: Why the model was not measured. ``None``: it was.
        seconds_to_first_token: The time to read the prompt.
        peak_memory_bytes: The peak resident memory of the process, with Python and torch (about 0.3 GB). On a
            GPU: the peak that torch allocated there.
        distinct_1, distinct_2, seq_rep_4: Of the samples' new tokens, see :mod:`gpt_lightning.reports.text_metrics`.
        tasks: Result of each task, by its name; ``None`` if it was not measured.
    """

    source: str
    file_bytes: int
    parameters: int
    skipped: str | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    train_perplexity: float | None = None
    val_perplexity: float | None = None
    seconds_to_load: float | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    distinct_1: float | None = None
    distinct_2: float | None = None
    seq_rep_4: float | None = None
    tasks: dict[TaskName, dict[str, Any] | None] = field(default_factory=dict)
    samples: tuple[str, ...] = ()

    def as_text(self) -> dict[str, str]:
        def formatted(value: float | None, spec: str) -> str:
            return "" if value is None else format(value, spec)

        milliseconds = self.seconds_to_first_token and 1e3 * self.seconds_to_first_token
        return {
            "model": self.source,
            "parameters": f"{self.parameters / 1e6:,.1f} M",
            "file": f"{self.file_bytes / 1e6:,.0f} MB",
            "train loss": formatted(self.train_loss, ".6f"),
            "val loss": formatted(self.val_loss, ".6f"),
            "train perpl.": formatted(self.train_perplexity, ",.2f"),
            "val perpl.": formatted(self.val_perplexity, ",.2f"),
            **{
                f"{task} {metric}": _with_stderr(result, metric)
                for task, result in self.tasks.items()
                for metric in METRICS[task]
            },
            "distinct-1": formatted(self.distinct_1, ".3f"),
            "distinct-2": formatted(self.distinct_2, ".3f"),
            "seq-rep-4": formatted(self.seq_rep_4, ".3f"),
            "tokens/s": formatted(self.tokens_per_second, ",.1f"),
            "first token": "" if milliseconds is None else f"{milliseconds:,.1f} ms",
            "peak memory": formatted(
                self.peak_memory_bytes and self.peak_memory_bytes / 1e9, ",.2f"
            ) + (" GB" if self.peak_memory_bytes else ""),
        }  # fmt: skip


def _with_stderr(result: Mapping[str, Any] | None, metric: str) -> str:
    """A number of a task, an accuracy with its standard error; empty if it was not measured."""
    if result is None:
        return ""
    stderr = result.get(f"{metric}_stderr")
    return f"{result[metric]:,.3f}" + ("" if stderr is None else f" ± {stderr:.3f}")


def as_dict(measurements: Sequence[ModelMeasurement]) -> dict[str, list[dict[str, object]]]:
    """The report as JSON."""
    return {"models": [asdict(model) for model in measurements]}


def as_rows(measurements: Sequence[ModelMeasurement]) -> list[dict[str, object]]:
    """The report as rows of a CSV file, with a column for each number of a task."""

    def numbers(model: ModelMeasurement) -> dict[str, object]:
        return {f"{task}_{key}": v for task, r in model.tasks.items() for key, v in (r or {}).items()}  # fmt: skip

    columns = {key: None for model in measurements for key in numbers(model)}
    rows = []
    for model in measurements:
        row = {**asdict(model), **columns, **numbers(model), "samples": " | ".join(model.samples)}
        del row["tasks"]
        rows.append(row)
    return rows


def comparison_figure(measurements: Sequence[ModelMeasurement], caption: str = "") -> "Figure":
    """Bars of loss, memory, speed and time to the first token of the measured models."""
    from gpt_lightning.figure import Figure

    models = [model for model in measurements if model.skipped is None]
    width = max(5.0, 1.1 * len(models) + 1.5)
    figure = Figure(figsize=(2 * width, 8), layout="constrained")
    (loss, memory), (speed, first_token) = figure.subplots(2, 2)
    names = short_names([model.source for model in models])
    grouped_bars(loss, names, "Loss (nats per token)", {
        "training": [model.train_loss for model in models],
        "validation": [model.val_loss for model in models],
    })  # fmt: skip
    grouped_bars(memory, names, "Peak memory, and file (GB)", {
        "peak memory": [(model.peak_memory_bytes or 0) / 1e9 for model in models],
        "file": [model.file_bytes / 1e9 for model in models],
    })  # fmt: skip
    grouped_bars(speed, names, "Tokens per second (median)",
          {"": [model.tokens_per_second for model in models]})  # fmt: skip
    grouped_bars(first_token, names, "Time to the first token (ms, median)",
          {"": [1e3 * (model.seconds_to_first_token or 0.0) for model in models]})  # fmt: skip
    add_caption(figure, caption)
    return figure


def short_names(sources: Sequence[str]) -> list[str]:
    """The shortest end of each path that differs from the ends of the other paths."""
    paths = [source.rstrip("/").split("/") for source in sources]
    names = []
    for path in paths:
        others = [other for other in paths if other != path]
        parts = 1
        while parts < len(path) and any(other[-parts:] == path[-parts:] for other in others):
            parts += 1
        names.append("/".join(path[-parts:]))
    return names
