"""HTML page of ``report sizes``: the figure, all numbers, and the samples side by side."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gpt_lightning.data.unicode import printable
from gpt_lightning.evals.task_names import METRICS, TaskName
from gpt_lightning.reports.comparison_results import ModelMeasurement
from gpt_lightning.reports.page import html_page, image, legend
from gpt_lightning.table import html_table

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure

# the page's explanation of each metric; {n} is the number of samples
LEGEND = {
    "train loss, val loss": "mean −ln p of the right token on both splits of the text, in nats per token; lower is better",
    "train perpl., val perpl.": "e to the power of the loss",
    "distinct-1": "number of different tokens over the number of tokens, in all {n} samples; higher is more varied",
    "distinct-2": "the same for pairs of neighboring tokens",
    "seq-rep-4": "share of the groups of four tokens that occur earlier in the same sample, as a mean over the samples; "
    "0 = nothing is repeated",
    "tokens/s": "new tokens per second of one text, from the median time of a token",
    "first token": "time to read the prompt and give the first token",
}
TASK_LEGEND: dict[TaskName, str] = {
    "hellaswag": "share of the contexts whose right ending is the most likely one of four; a guess is right in a quarter. "
    "acc_norm compares the log-likelihoods per character. ± is the standard error",
    "lambada": "acc is the share of the texts whose last word is right; perplexity is that of the last words",
    "wikitext": "perplexity per word and per byte of the text, and its logarithm to the base 2",
}

_STYLE = (
    "table{font-size:87%;font-variant-numeric:tabular-nums}td{overflow-wrap:anywhere}"
    ".wide{overflow-x:auto}.wide td,.wide th{white-space:nowrap}"
    ".samples{width:100%;table-layout:fixed}.samples td{font-size:115%}"
)


def sizes_page(
    measurements: Sequence[ModelMeasurement], caption: str, figure: "Figure | None"
) -> str:
    """The page; without a figure if no model was measured."""
    models = [model for model in measurements if model.skipped is None]
    texts_of = {model.source: model.as_text() for model in measurements}
    numbers = [
        {"": metric, **{source: text[metric] for source, text in texts_of.items()}}
        for metric in measurements[0].as_text()
        if metric != "model" and any(text[metric] for text in texts_of.values())
    ]
    number_of_samples = len(models[0].samples) if models else 0
    used = {row[""] for row in numbers}
    meanings = {
        name: meaning.format(n=number_of_samples)
        for name, meaning in LEGEND.items()
        if name.split(", ")[0] in used
    }
    meanings |= {
        task: TASK_LEGEND[task] for task in METRICS if any(task in m.tasks for m in models)
    }
    skipped = "".join(
        f"<p>{html.escape(printable(f'{m.source}: skipped: {m.skipped}'))}</p>"
        for m in measurements
        if m.skipped
    )
    samples = zip(*(model.samples for model in models), strict=True)
    rows = [
        {model.source: text for model, text in zip(models, texts, strict=True)} for texts in samples
    ]
    shown = html_table(rows).replace("<table>", "<table class='samples'>", 1) if rows else ""
    return html_page(
        "models of different sizes",
        caption,
        (image(figure, "bars of loss, memory and speed") if figure else "")
        + f"<h2>Models</h2><div class='wide'>{html_table(numbers)}</div>{skipped}{legend(meanings)}"
        + (f"<h2>Samples</h2>{shown}" if shown else ""),
        _STYLE,
    )
