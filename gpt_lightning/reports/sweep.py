"""Exercises 5.2 and 5.3: metrics of texts on a grid of temperature × top-k (or top-p)."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.generation.engine import NO_TOKEN, generate_simple, stream_ids
from gpt_lightning.generation.sampling import SamplingParams, entropy, make_generator, probabilities
from gpt_lightning.model.gpt import GPTModel
from gpt_lightning.palette import SEQUENTIAL, ink_on
from gpt_lightning.reports.plotting import add_caption
from gpt_lightning.reports.text_metrics import distinct_n
from gpt_lightning.table import Table, value_or_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gpt_lightning.figure import Figure


@dataclass(frozen=True)
class GridCell:
    """One setting and the metrics of its texts.

    Attributes:
        distinct_1: Number of different tokens over the number of new tokens, in all texts of the cell.
        distinct_2: The same for pairs of neighboring tokens.
        repetition_rate: Share of the new tokens that also occur among the 16 tokens before them.
        mean_log_probability: Of the new tokens under the model at temperature 1, in nats per token.
        next_token_entropy: Of the prompt's next token under this setting, in nats.
        identical_share: Share of the most frequent text; 1 means that the setting is deterministic.
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

    @property
    def is_greedy(self) -> bool:
        """Whether the setting leaves only one token to choose from."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def identical(self) -> str:
        """The number of identical texts: ``all 8``, ``3 of 8``, ``none``."""
        same = round(self.identical_share * len(self.texts))
        if same == len(self.texts):
            return f"all {same}"
        return "none" if same == 1 else f"{same} of {len(self.texts)}"

    def as_text(self) -> dict[str, str]:
        return {
            "temperature": f"{self.temperature:g}",
            "top_k": value_or_all(self.top_k),
            "top_p": value_or_all(self.top_p),
            "distinct-1": f"{self.distinct_1:.3f}",
            "distinct-2": f"{self.distinct_2:.3f}",
            "repetition": f"{self.repetition_rate:.3f}",
            "log-prob.": f"{self.mean_log_probability:.2f}",
            "entropy": f"{self.next_token_entropy:.3f}",
            "identical": self.identical,
        }


@dataclass(frozen=True)
class PlainLoopComparison:
    """Exercise 5.3: the texts of the greedy settings compared with :func:`generate_simple`.

    Attributes:
        text: Of the plain loop, up to ``<|endoftext|>``.
        settings: Number of greedy settings: temperature 0 or top_k 1.
        equal: Number of greedy settings that only have this text.
    """

    text: str
    settings: int
    equal: int

    def __str__(self) -> str:
        if not self.settings:
            return "is not compared: no setting is greedy (temperature 0 or top_k 1)"
        condition = "temperature 0 or top_k 1"
        if self.equal < self.settings:
            differing = self.settings - self.equal
            return f"gives another text than {differing} of {self.settings} greedy settings ({condition})"
        greedy = (
            f"all {self.settings} greedy settings" if self.settings > 1 else "the greedy setting"
        )
        return f"gives the same text as {greedy} ({condition})"


HEAT_MAP_METRICS = {
    "distinct_2": "distinct-2",
    "repetition_rate": "repetition",
    "mean_log_probability": "log-probability (nats)",
    "identical_share": "identical texts",
}


def grid(
    temperatures: Sequence[float],
    top_ks: Sequence[int | None] = (None,),
    top_ps: Sequence[float | None] = (None,),
) -> list[SamplingParams]:
    """All combinations, in the order of temperature, top_k, top_p; ``ValueError`` if a list is empty."""
    for name, values in [("temperatures", temperatures), ("top_k", top_ks), ("top_p", top_ps)]:
        if not values:
            raise ValueError(f"{name}: is an empty list; give at least one")
    return [
        SamplingParams(temperature, top_k, top_p)
        for temperature in temperatures
        for top_k in top_ks
        for top_p in top_ps
    ]


def sweep(
    model: GPTModel,
    prompt_ids: list[int],
    settings: Sequence[SamplingParams],
    *,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    tokenizer: Tokenizer = GPT2,
    on_cell: Callable[[], None] | None = None,
) -> Table[GridCell]:
    """Continue the prompt ``num_samples`` times under each setting, with the same seed in each cell.

    The model is put into eval mode.

    Args:
        on_cell: Called after each cell.
    """
    if num_samples < 2:
        raise ValueError(
            f"num_samples: {num_samples} is too small to compare texts; give 2 or more"
        )
    for sampling in settings:
        sampling.check_vocabulary(model.config.vocab_size)
    model.eval()
    cells: Table[GridCell] = Table()
    for sampling in settings:
        cells.append(
            _cell(model, prompt_ids, sampling, num_samples, max_new_tokens, seed, tokenizer)
        )
        if on_cell is not None:
            on_cell()
    return cells


def _cell(
    model: GPTModel,
    prompt_ids: list[int],
    sampling: SamplingParams,
    num_samples: int,
    max_new_tokens: int,
    seed: int,
    tokenizer: Tokenizer,
) -> GridCell:
    device = model.tok_emb.weight.device
    steps = list(
        stream_ids(
            model,
            [prompt_ids],
            max_new_tokens,
            sampling,
            num_samples=num_samples,
            eos_id=tokenizer.end_of_text_id,
            generator=make_generator(seed, device),
        )
    )
    padded = torch.stack(steps, dim=1).tolist() if steps else [[] for _ in range(num_samples)]
    rows = [[token for token in row if token != NO_TOKEN] for row in padded]
    is_repeated = [row[i] in row[max(0, i - 16) : i] for row in rows for i in range(len(row))]
    max_count = max(rows.count(row) for row in rows)
    return GridCell(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        distinct_1=distinct_n(rows, 1),
        distinct_2=distinct_n(rows, 2),
        repetition_rate=_share(sum(is_repeated), len(is_repeated)),
        mean_log_probability=mean_log_probability(model, prompt_ids, rows),
        next_token_entropy=_next_token_entropy(model, prompt_ids, sampling),
        identical_share=max_count / len(rows),
        deterministic=max_count == len(rows),
        texts=[tokenizer.decode(prompt_ids + row) for row in rows],
    )


@torch.inference_mode()
def compare_with_plain_loop(
    model: GPTModel,
    prompt_ids: list[int],
    cells: Sequence[GridCell],
    max_new_tokens: int,
    tokenizer: Tokenizer = GPT2,
) -> PlainLoopComparison:
    """Exercise 5.3: compare the greedy settings with the plain loop, which has no cache and no sampling."""
    model.eval()
    idx = torch.tensor([prompt_ids], device=_device(model))
    new = generate_simple(model, idx, max_new_tokens)[0, len(prompt_ids) :].tolist()
    if tokenizer.end_of_text_id in new:
        new = new[: new.index(tokenizer.end_of_text_id)]
    text = tokenizer.decode(prompt_ids + new)
    greedy = [cell for cell in cells if cell.is_greedy]
    return PlainLoopComparison(text, len(greedy), sum(set(cell.texts) == {text} for cell in greedy))


def _share(count: int, total: int) -> float:
    return count / total if total else 0.0


@torch.inference_mode()
def _next_token_entropy(model: GPTModel, prompt_ids: list[int], sampling: SamplingParams) -> float:
    idx = torch.tensor([prompt_ids[-model.config.context_length :]], device=_device(model))
    return float(entropy(probabilities(model(idx)[:, -1].float(), sampling))[0])


@torch.inference_mode()
def mean_log_probability(
    model: GPTModel, prompt_ids: list[int], rows: Sequence[Sequence[int]]
) -> float:
    """Mean log-probability in nats of the new tokens, which are ``rows``, under the model at temperature 1.

    Each text is read in one forward pass: all of it, or the last window if it is longer than the context.
    """
    total, count = 0.0, 0
    for row in {tuple(row): None for row in rows}:
        copies = sum(tuple(other) == row for other in rows)
        ids = (prompt_ids + list(row))[-(model.config.context_length + 1) :]
        n_new = min(len(row), len(ids) - 1)
        if not n_new:
            continue
        idx = torch.tensor([ids], device=_device(model))
        log_p = model(idx[:, :-1]).float().log_softmax(dim=-1)
        token_log_p = log_p.gather(2, idx[:, 1:, None])[0, -n_new:, 0]
        total += copies * float(token_log_p.sum())
        count += copies * n_new
    return total / count if count else 0.0


def _device(model: GPTModel) -> torch.device:
    return model.tok_emb.weight.device


def grid_axes(
    cells: Sequence[GridCell],
) -> Iterator[tuple[float | None, list[float], list[int | None]]]:
    """One table for each top_p of the grid: the top_p, the temperatures (rows) and the top_k (columns)."""
    for top_p in dict.fromkeys(cell.top_p for cell in cells):
        table = [cell for cell in cells if cell.top_p == top_p]
        yield (
            top_p,
            list(dict.fromkeys(cell.temperature for cell in table)),
            list(dict.fromkeys(cell.top_k for cell in table)),
        )


def group_by_texts(cells: Sequence[GridCell]) -> list[list[GridCell]]:
    """Groups of cells with exactly the same texts, in the order of their first cell."""
    groups: dict[tuple[str, ...], list[GridCell]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell.texts), []).append(cell)
    return list(groups.values())


def heat_maps(cells: Sequence[GridCell], caption: str = "") -> "Figure":
    """A heat map of each of ``HEAT_MAP_METRICS`` over temperature (rows) × top_k (columns), with numbers.

    There are two maps in a row, so that they can be read on a page. The maps of the next top_p are below.
    """
    from gpt_lightning.figure import Figure

    tables = list(grid_axes(cells))
    max_columns = max(len(top_ks) for _, _, top_ks in tables)
    max_rows = max(len(temperatures) for _, temperatures, _ in tables)
    width, height = max(5.0, 0.8 * max_columns + 1), max(2.8, 0.42 * max_rows + 1.2)
    map_rows = len(HEAT_MAP_METRICS) // 2 * len(tables)
    figure = Figure(figsize=(2 * width, height * map_rows + 0.4), layout="constrained")
    panels = iter(figure.subplots(map_rows, 2, squeeze=False).flat)
    by_setting = {(c.temperature, c.top_k, c.top_p): c for c in cells}
    for top_p, temperatures, top_ks in tables:
        for field, title in HEAT_MAP_METRICS.items():
            table = [[by_setting[t, k, top_p] for k in top_ks] for t in temperatures]
            axes = next(panels)
            _heat_map(axes, field, table, cells)
            axes.set_title(title if top_p is None else f"{title}, top_p {top_p:g}", fontsize=13)
            axes.set_xticks(range(len(top_ks)), [value_or_all(k) for k in top_ks])
            axes.set_yticks(range(len(temperatures)), [f"{t:g}" for t in temperatures])
            axes.set_xlabel("top_k", fontsize=11)
            axes.set_ylabel("temperature", fontsize=11)
    add_caption(figure, caption)
    return figure


def _heat_map(
    axes: "Axes", field: str, table: Sequence[Sequence[GridCell]], cells: Sequence[GridCell]
) -> None:
    """Draw one map. Its color scale covers all cells, so that the maps of a metric can be compared."""
    all_values = [float(getattr(cell, field)) for cell in cells]
    values = [[float(getattr(cell, field)) for cell in row] for row in table]
    image = axes.imshow(values, cmap=SEQUENTIAL, aspect="auto")
    image.set_clim(*((0, 1) if field == "identical_share" else (min(all_values), max(all_values))))
    colors = image.to_rgba(torch.tensor(values).numpy())
    for i, row in enumerate(table):
        for j, cell in enumerate(row):
            text = cell.identical if field == "identical_share" else f"{values[i][j]:.2f}"
            axes.text(
                j, i, text, ha="center", va="center", fontsize=10,
                color=ink_on(*colors[i, j, :3]),
            )  # fmt: skip
    axes.set_xticks([x - 0.5 for x in range(1, len(table[0]))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(table))], minor=True)
    axes.grid(which="minor", color="#ffffff", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def setting_name(cell: GridCell) -> str:
    name = f"temperature {cell.temperature:g}, top_k {value_or_all(cell.top_k)}"
    return name if cell.top_p is None else f"{name}, top_p {cell.top_p:g}"


def as_dict(cells: Sequence[GridCell]) -> dict[str, list[dict[str, object]]]:
    """The report as JSON."""
    return {"cells": [asdict(cell) for cell in cells]}
