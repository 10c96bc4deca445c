"""``report sweep``: exercises 5.2 and 5.3 as a table, heat maps and an HTML page with all texts."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.console import (
    output_folder,
    print_table,
    print_texts,
    progress,
    without,
    write_csv,
)
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.report import load_model_of, report_parser
from gpt_lightning.data.unicode import printable
from gpt_lightning.table import value_or_all

if TYPE_CHECKING:
    from gpt_lightning.reports.sweep import GridCell


def run(arguments: list[str]) -> None:
    """Exercises 5.2 and 5.3: metrics of generated texts for each temperature × top_k, and one text of each.

    A setting whose texts are all identical is deterministic. With --out, the command also writes heat maps (PNG),
    a page with all texts (HTML, readable offline), CSV and JSON.
    """
    settings = parse(_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    if not settings.prompt:
        raise ValueError("prompt: is empty; give some text with --prompt")
    with output_folder(settings.out) if settings.out else nullcontext() as out:
        _report(settings, out)


def _report(settings: Namespace, out: Path | None) -> None:
    """Generate the texts, write the report to ``out`` and print it."""
    from gpt_lightning.reports import sweep as report
    from gpt_lightning.reports.sweep_page import sweep_page

    combinations = report.grid(
        settings.temperatures,
        [k or None for k in settings.top_k],
        [None] if settings.top_p is None else settings.top_p,
    )
    model, tokenizer = load_model_of(settings)
    prompt_ids = tokenizer.encode_prompt(settings.prompt)
    with progress("cells", len(combinations)) as advance:
        cells = report.sweep(
            model,
            prompt_ids,
            combinations,
            num_samples=settings.num_samples,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            tokenizer=tokenizer,
            on_cell=advance,
        )
    loop = report.compare_with_plain_loop(
        model, prompt_ids, cells, settings.max_new_tokens, tokenizer
    )
    used_settings = {
        key: settings[key] for key in ("from", "prompt", "num_samples", "max_new_tokens", "seed")
    }
    answer = {**report.as_dict(cells), "generate_simple": asdict(loop), "settings": used_settings}
    # the prompt is last and shortened, so that all settings are visible
    others = (f"{key} {value}" for key, value in used_settings.items() if key != "prompt")
    caption = ", ".join(others)
    caption = printable(f"{caption}, prompt {shorten(repr(settings.prompt), 100)}")
    if out is not None:
        figure = report.heat_maps(cells, caption)
        figure.savefig(out / "sweep.png", dpi=150)
        page = sweep_page(cells, loop, caption, figure)
        (out / "sweep.html").write_text(page, encoding="utf-8")
        (out / "sweep.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        write_csv(
            out / "sweep.csv",
            [{**asdict(cell), "texts": " | ".join(cell.texts)} for cell in cells],
        )
    if settings.json:
        print(json.dumps(answer))
        return
    unused = [] if settings.top_p else ["top_p"]
    print_table(caption, [without(cell.as_text(), unused) for cell in cells])
    print_texts(
        "\none text of each setting",
        [(_setting_names(group), group[0].texts[0]) for group in report.group_by_texts(cells)],
    )
    deterministic = [cell for cell in cells if cell.deterministic]
    print(f"deterministic: {len(deterministic)} of {len(cells)} settings (all texts identical)")
    print(f"generate_simple, the plain greedy loop, {loop}")


def _setting_names(cells: Sequence["GridCell"]) -> str:
    """One name for several settings: ``temperature 0: top_k 1, 5; temperature 1: top_k 1``."""
    names = []
    for temperature, same_temperature in groupby(cells, lambda cell: cell.temperature):
        top_ps: dict[int | None, list[float | None]] = {}
        for cell in same_temperature:
            top_ps.setdefault(cell.top_k, []).append(cell.top_p)
        for same_top_ps, top_ks in groupby(top_ps, top_ps.__getitem__):
            name = f"temperature {temperature:g}: top_k {', '.join(map(value_or_all, top_ks))}"
            if same_top_ps != [None]:
                name += f" with top_p {', '.join(map(value_or_all, same_top_ps))}"
            names.append(name)
    return "; ".join(names)


def _parser() -> ArgumentParser:
    parser = report_parser("sweep", run.__doc__)
    add = parser.add_argument
    add(
        "--temperatures",
        type=list[float],
        default=[0.0, 0.5, 1.0, 1.5],
        help="Rows of the grid; 0 = greedy.",
    )
    add(
        "--top_k",
        type=list[int],
        default=[1, 5, 25, 0],
        help="Columns of the grid; 0 = all tokens.",
    )
    add(
        "--top_p",
        type=list[float] | None,
        help="List of top-p values, with one grid for each; null = one grid of all tokens.",
    )
    add("--num_samples", type=int, default=8, help="Texts of each cell, 2 or more.")
    add("--max_new_tokens", type=int, default=40, help="Maximum number of new tokens of a text.")
    return parser
