"""``report sizes``: exercise 5.6, models of different sizes side by side."""

import json
from dataclasses import asdict
from textwrap import shorten
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from gpt_lightning.cli.console import print_table, writable_folder, write_csv
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.report import progress, report_parser
from gpt_lightning.data.unicode import printable

if TYPE_CHECKING:
    from gpt_lightning.reports.model_comparison import ModelMeasurement


def run(arguments: list[str]) -> None:
    """Exercise 5.6: GPT-2's sizes, or any models, on the same prompt, seed and text.

    Each is measured in a process of its own: parameters, file, losses on both splits of --text, speed,
    memory, and --num_samples continuations side by side. One that does not fit in memory is left out,
    with the reason. With --out also a figure (PNG), CSV and JSON.
    """
    settings = parse(_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give models with --from SOURCE SOURCE …")
    if not settings.prompt:
        raise ValueError("prompt: is empty; give some text with --prompt")
    for name in ("num_samples", "max_new_tokens", "context_length", "batch_size"):
        if settings[name] < 1:
            raise ValueError(f"{name}: {settings[name]} is too small; give 1 or more")
    if not 0.0 < settings.train_ratio < 1.0:
        raise ValueError(f"train_ratio: {settings.train_ratio} leaves a split empty; give e.g. 0.9")

    from gpt_lightning.cli.generate import resolve_device
    from gpt_lightning.generation.sampling import SamplingParams
    from gpt_lightning.reports import model_comparison as report

    out = writable_folder(settings.out) if settings.out else None
    task = report.ComparisonTask(
        prompt=settings.prompt,
        sampling=SamplingParams(settings.temperature, settings.top_k, settings.top_p),
        num_samples=settings.num_samples,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        text=settings.text,
        train_ratio=settings.train_ratio,
        context_length=settings.context_length,
        batch_size=settings.batch_size,
        device=resolve_device(settings.device),
        dtype=settings.dtype,
        n_heads=settings.n_heads,
        max_memory=None if settings.max_memory is None else int(settings.max_memory * 1e9),
    )
    with progress("models", len(settings["from"])) as advance:
        measured = report.measure_all(settings["from"], task, advance)
    caption = (
        f"{shorten(repr(task.prompt), 80)}, temperature {task.sampling.temperature:g}, top_k {task.sampling.top_k or 'all'}, "
        f"seed {task.seed}, {task.device}, {task.dtype or 'weights as stored'}"
    )
    if task.text:
        caption += f"; losses on {task.text}, windows of {task.context_length}"
    caption = printable(caption)
    answer = {**report.as_dict(measured), "settings": asdict(task)}
    if out is not None:
        write_csv(
            out / "sizes.csv",
            [{**asdict(model), "samples": " | ".join(model.samples)} for model in measured],
        )
        (out / "sizes.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        if any(model.skipped is None for model in measured):
            report.comparison_figure(measured, caption).savefig(out / "sizes.png", dpi=150)
    if settings.json:
        print(json.dumps(answer))
        return
    print_table(caption, [_row(model) for model in measured])
    for model in measured:
        if model.skipped:
            print(printable(f"{model.source}: skipped: {model.skipped}"))
    whole = [model for model in measured if model.skipped is None]
    if whole:
        trials = zip(*(model.samples for model in whole), strict=True)
        print_table(
            "the same prompt, seed and settings",
            [
                {
                    model.source: " ".join(text.split())
                    for model, text in zip(whole, trial, strict=True)
                }
                for trial in trials
            ],
            texts=[model.source for model in whole],
            lines=True,
        )


def _row(model: "ModelMeasurement") -> dict[str, str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    milliseconds = model.seconds_to_first_token and 1e3 * model.seconds_to_first_token
    return {
        "model": model.source,
        "parameters": f"{model.parameters / 1e6:,.1f} M",
        "file": f"{model.file_bytes / 1e6:,.0f} MB",
        "train loss": shown(model.train_loss, ".6f"),
        "val loss": shown(model.val_loss, ".6f"),
        "train perpl.": shown(model.train_perplexity, ",.2f"),
        "val perpl.": shown(model.val_perplexity, ",.2f"),
        "tokens/s": shown(model.tokens_per_second, ",.1f"),
        "first token": "" if milliseconds is None else f"{milliseconds:,.1f} ms",
        "peak memory": shown(
            model.peak_memory_bytes and model.peak_memory_bytes / 1e9, ",.2f"
        ) + (" GB" if model.peak_memory_bytes else ""),
    }  # fmt: skip


def _parser() -> ArgumentParser:
    parser = report_parser("sizes", run.__doc__, sources="+")
    add = parser.add_argument
    add("--text", type=str | None, help="verdict, sample, a file or a folder; none: no losses.")
    add("--train_ratio", type=float, default=0.9, help="Share of the text that is for training.")
    add("--context_length", type=int, default=256, help="Tokens in a window of the text.")
    add(
        "--batch_size",
        type=int,
        default=2,
        help="Windows at a time; the losses do not depend on it.",
    )
    add("--temperature", type=float, default=1.5, help="0 takes the likeliest token.")
    add("--top_k", type=int | None, default=50, help="Draw among the k likeliest; null: among all.")
    add("--top_p", type=float | None, help="Draw among the likeliest that reach this probability.")
    add("--num_samples", type=int, default=3, help="Texts of each model.")
    add("--max_new_tokens", type=int, default=50, help="Tokens a text.")
    add("--max_memory", type=float | None, help="GB that a model may take; none: what is free.")
    return parser
