"""Exercises 5.2 and 5.3: a grid of temperature × top-k (or top-p), several texts a cell, measured.

R is the number of texts of a cell, T the tokens of one.
"""

import html
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from gpt_lightning.data.tokenizer import END_OF_TEXT_ID, decode
from gpt_lightning.generation.generate import NO_TOKEN, stream_ids
from gpt_lightning.generation.sampling import Sampling, entropy, probabilities, seeded
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.reports.sampling import in_any_font

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """One setting and what its texts are like.

    Attributes:
        distinct_1: Share of the new tokens that are different ones, over all texts of the cell.
        distinct_2: The same of pairs of tokens.
        repetition_rate: Share of the tokens that stood among the 16 before them in their text.
        mean_log_probability: Of the new tokens under the model itself, at temperature 1, nats a token.
        next_token_entropy: Of the prompt's next token under this setting, in nats.
        identical_share: Of the texts, how many are the most frequent one; 1 is deterministic.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    distinct_1: float
    distinct_2: float
    repetition_rate: float
    mean_log_probability: float
    next_token_entropy: float
    identical_share: float
    deterministic: bool
    texts: list[str]


FIGURES = {
    "distinct_2": "Different pairs of tokens (share)",
    "repetition_rate": "Tokens that repeat one of the 16 before (share)",
    "mean_log_probability": "Log-probability under the model (nats a token)",
    "identical_share": "Identical texts (share; 1 = deterministic)",
}


def grid(
    temperatures: Sequence[float], top_ks: Sequence[int | None], top_ps: Sequence[float | None]
) -> list[Sampling]:
    """All combinations, temperature outermost; ``ValueError`` where a list is empty."""
    for name, values in [("temperatures", temperatures), ("top_k", top_ks), ("top_p", top_ps)]:
        if not values:
            raise ValueError(f"{name}: is an empty list; give at least one")
    return [
        Sampling(temperature, top_k, top_p)
        for temperature in temperatures
        for top_k in top_ks
        for top_p in top_ps
    ]


def sweep(
    model: GPTModel,
    prompt_ids: list[int],
    settings: Sequence[Sampling],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    on_cell: Callable[[], None] | None = None,
) -> list[Cell]:
    """Continue the prompt ``num_samples`` times under each setting; the seed is the same in each cell.

    ``on_cell`` is called after each. The model is put into eval mode.
    """
    if num_samples < 2:
        raise ValueError(f"num_samples: {num_samples} cannot be compared; give 2 or more")
    for sampling in settings:
        sampling.check_vocabulary(model.config.vocab_size)
    model.eval()
    cells = []
    for sampling in settings:
        cells.append(_cell(model, prompt_ids, sampling, num_samples, max_new_tokens, seed))
        if on_cell is not None:
            on_cell()
    return cells


def _cell(
    model: GPTModel,
    prompt_ids: list[int],
    sampling: Sampling,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
) -> Cell:
    device = model.tok_emb.weight.device
    steps = list(
        stream_ids(
            model,
            [prompt_ids],
            max_new_tokens,
            sampling,
            num_samples=num_samples,
            eos_id=END_OF_TEXT_ID,
            generator=seeded(seed, device),
        )
    )
    table = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(num_samples)]
    rows = [[token for token in row if token != NO_TOKEN] for row in table]
    unigrams = [token for row in rows for token in row]
    bigrams = [pair for row in rows for pair in pairwise(row)]
    repeated = [row[i] in row[max(0, i - 16) : i] for row in rows for i in range(len(row))]
    frequent = max(rows.count(row) for row in rows)
    return Cell(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        distinct_1=_share(len(set(unigrams)), len(unigrams)),
        distinct_2=_share(len(set(bigrams)), len(bigrams)),
        repetition_rate=_share(sum(repeated), len(repeated)),
        mean_log_probability=mean_log_probability(model, prompt_ids, rows),
        next_token_entropy=_next_token_entropy(model, prompt_ids, sampling),
        identical_share=frequent / len(rows),
        deterministic=frequent == len(rows),
        texts=[decode(prompt_ids + row) for row in rows],
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


@torch.inference_mode()
def _next_token_entropy(model: GPTModel, prompt_ids: list[int], sampling: Sampling) -> float:
    idx = torch.tensor([prompt_ids[-model.config.context_length :]], device=_device(model))
    return float(entropy(probabilities(model(idx)[:, -1].float(), sampling))[0])


@torch.inference_mode()
def mean_log_probability(
    model: GPTModel, prompt_ids: list[int], rows: Sequence[Sequence[int]]
) -> float:
    """Mean log-probability of the rows' tokens after the prompt, nats a token, under the model itself.

    Each text is read in one pass where it fits the context, else its last window; only new tokens count.
    """
    total, count = 0.0, 0
    for row in {tuple(row): None for row in rows}:
        times = sum(tuple(other) == row for other in rows)
        ids = (prompt_ids + list(row))[-(model.config.context_length + 1) :]
        new = min(len(row), len(ids) - 1)
        if not new:
            continue
        idx = torch.tensor([ids], device=_device(model))
        log_p = model(idx[:, :-1]).float().log_softmax(dim=-1)
        taken = log_p.gather(2, idx[:, 1:, None])[0, -new:, 0]
        total += times * float(taken.sum())
        count += times * new
    return total / count if count else 0.0


def _device(model: GPTModel) -> torch.device:
    return model.tok_emb.weight.device


def tables(cells: Sequence[Cell]) -> Iterator[tuple[float | None, list[float], list[int | None]]]:
    """For each top_p of the grid: it, the temperatures (rows) and the top_k (columns)."""
    for top_p in dict.fromkeys(cell.top_p for cell in cells):
        own = [cell for cell in cells if cell.top_p == top_p]
        yield (
            top_p,
            list(dict.fromkeys(cell.temperature for cell in own)),
            list(dict.fromkeys(cell.top_k for cell in own)),
        )


def heat_maps(cells: Sequence[Cell], caption: str) -> "Figure":
    """Each of ``FIGURES`` over temperature (down) × top_k (across), the values written in the cells."""
    from matplotlib.figure import Figure

    parts = list(tables(cells))
    columns = max(len(top_ks) for _, _, top_ks in parts)
    lines = max(len(temperatures) for _, temperatures, _ in parts)
    width, height = max(4.2, 0.55 * columns + 1), max(3.4, 0.3 * lines + 1)
    figure = Figure(figsize=(width * len(FIGURES), height * len(parts)), layout="constrained")
    grid_of_axes = figure.subplots(len(parts), len(FIGURES), squeeze=False)
    by_setting = {(c.temperature, c.top_k, c.top_p): c for c in cells}
    for line, (top_p, temperatures, top_ks) in enumerate(parts):
        for axes, (field, title) in zip(grid_of_axes[line], FIGURES.items(), strict=True):
            values = [
                [float(getattr(by_setting[t, k, top_p], field)) for k in top_ks]
                for t in temperatures
            ]
            image = axes.imshow(values, cmap="Greys", aspect="auto")
            low, high = image.get_clim()
            for i, value_row in enumerate(values):
                for j, value in enumerate(value_row):
                    dark = high > low and (value - low) / (high - low) > 0.5
                    axes.text(
                        j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                        color="1" if dark else "0",
                    )  # fmt: skip
            axes.set_title(title, fontsize=8)
            axes.set_xticks(range(len(top_ks)), ["all" if k is None else str(k) for k in top_ks])
            axes.set_yticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
            axes.set_xlabel("top_k" if top_p is None else f"top_k (top_p {top_p:g})")
            axes.set_ylabel("temperature")
    figure.supxlabel(in_any_font(caption), fontsize=8, parse_math=False)
    return figure


def html_page(cells: Sequence[Cell], caption: str, figure_png: str) -> str:
    """A page that needs nothing but itself: the figure (base64 PNG), the grid, every text."""
    parts = []
    by_setting = {(c.temperature, c.top_k, c.top_p): c for c in cells}
    for top_p, temperatures, top_ks in tables(cells):
        if top_p is not None:
            parts.append(f"<h2>top_p {top_p:g}</h2>")
        head = "".join(f"<th>top_k {'all' if k is None else k}</th>" for k in top_ks)
        parts.append(f"<table><thead><tr><th></th>{head}</tr></thead><tbody>")
        for temperature in temperatures:
            row = "".join(_html_cell(by_setting[temperature, k, top_p]) for k in top_ks)
            parts.append(f"<tr><th>temperature {temperature:g}</th>{row}</tr>")
        parts.append("</tbody></table>")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<title>temperature × top_k</title><style>"
        "body{font:15px/1.45 system-ui,sans-serif;margin:2em;color:#111;background:#fff}"
        "table{border-collapse:collapse}th,td{border:1px solid #999;padding:.5em;"
        "vertical-align:top;text-align:left;min-width:14em;max-width:26em}"
        "img{max-width:100%}dl{display:grid;grid-template-columns:auto auto;gap:0 .6em;margin:0;"
        "font-size:85%}dd{margin:0;text-align:right}p{white-space:pre-wrap;margin:.4em 0}"
        "summary{cursor:pointer}</style></head><body>"
        f"<h1>temperature × top_k</h1><p>{html.escape(caption)}</p>"
        f"<img alt='heat maps' src='data:image/png;base64,{figure_png}'>"
        f"{''.join(parts)}</body></html>"
    )


def _html_cell(cell: Cell) -> str:
    figures = {
        "distinct-1": f"{cell.distinct_1:.3f}",
        "distinct-2": f"{cell.distinct_2:.3f}",
        "repetition": f"{cell.repetition_rate:.3f}",
        "log-probability": f"{cell.mean_log_probability:.3f}",
        "next-token entropy": f"{cell.next_token_entropy:.3f}",
        "identical": f"{cell.identical_share:.2f}" + (" (deterministic)" * cell.deterministic),
    }
    entries = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in figures.items())
    first, *others = (f"<p>{html.escape(text)}</p>" for text in cell.texts)
    return (
        f"<td><dl>{entries}</dl>{first}"
        f"<details><summary>{len(others)} more</summary>{''.join(others)}</details></td>"
    )


def as_dict(cells: Sequence[Cell]) -> dict[str, list[dict[str, object]]]:
    return {"cells": [asdict(cell) for cell in cells]}
