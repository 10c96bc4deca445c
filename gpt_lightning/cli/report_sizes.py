"""``report sizes``: exercise 5.6, a comparison of models of different sizes."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.console import output_folder, print_table, progress, write_csv
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.report import report_parser
from gpt_lightning.data.unicode import printable
from gpt_lightning.evals.task_names import GivenTasks, named_tasks


def run(arguments: list[str]) -> None:
    """Exercise 5.6: compare GPT-2's sizes, or any models, on the same prompt, seed and text.

    The report shows parameters, file size, losses on both splits of --text, results of --tasks, speed, peak memory, and
    --num_samples continuations side by side, with how varied they are. A model that does not fit into memory is skipped,
    with the reason. With --out, the command also writes a figure (PNG), a page (HTML, readable offline), CSV and JSON.
    """
    settings = parse(_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give models with --from SOURCE SOURCE …")
    if not settings.prompt:
        raise ValueError("prompt: is empty; give some text with --prompt")
    for name in ("num_samples", "max_new_tokens", "context_length", "batch_size"):
        if settings[name] < 1:
            raise ValueError(f"{name}: {settings[name]} is too small; give 1 or more")
    if twice := [name for name, count in Counter(settings["from"]).items() if count > 1]:
        raise ValueError(f"from: {twice[0]} is given more than once; give each model once")
    if settings.task_limit is not None and settings.task_limit < 1:
        raise ValueError(f"task_limit: {settings.task_limit} is too small; give 1 or more")
    named_tasks(settings.tasks, "tasks")
    if not 0.0 < settings.train_ratio < 1.0:
        raise ValueError(
            f"train_ratio: {settings.train_ratio} leaves a split empty; give 0.9, for example"
        )
    with output_folder(settings.out) if settings.out else nullcontext() as out:
        _report(settings, out)


def _report(settings: Namespace, out: Path | None) -> None:
    """Measure the models, write the report to ``out`` and print it."""
    from gpt_lightning.cli.generate import resolve_device
    from gpt_lightning.generation.sampling import SamplingParams
    from gpt_lightning.reports.comparison_results import as_dict, as_rows, comparison_figure
    from gpt_lightning.reports.model_comparison import ComparisonTask, measure_all
    from gpt_lightning.reports.sizes_page import sizes_page

    task = ComparisonTask(
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
        tasks=named_tasks(settings.tasks, "tasks"),
        task_limit=settings.task_limit,
    )
    with progress("models", len(settings["from"])) as advance:
        measurements = measure_all(settings["from"], task, advance)
    caption = (
        f"{shorten(repr(task.prompt), 80)}, temperature {task.sampling.temperature:g}, top_k {task.sampling.top_k or 'all'}, "
        f"seed {task.seed}, {task.device}, {task.dtype or 'weights as stored'}"
    )
    if task.text:
        caption += f"; losses on {task.text}, windows of {task.context_length}"
    if task.tasks:
        limit = f"the first {task.task_limit} examples" if task.task_limit else "all examples"
        caption += f"; {', '.join(task.tasks)} on {limit}"
    caption = printable(caption)
    answer = {**as_dict(measurements), "settings": asdict(task)}
    if out is not None:
        write_csv(out / "sizes.csv", as_rows(measurements))
        (out / "sizes.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        figure = None
        if any(model.skipped is None for model in measurements):
            figure = comparison_figure(measurements, caption)
            figure.savefig(out / "sizes.png", dpi=150)
        page = sizes_page(measurements, caption, figure)
        (out / "sizes.html").write_text(page, encoding="utf-8")
    if settings.json:
        print(json.dumps(answer))
        return
    print_table(caption, [model.as_text() for model in measurements])
    for model in measurements:
        if model.skipped:
            print(printable(f"{model.source}: skipped: {model.skipped}"))
    measured = [model for model in measurements if model.skipped is None]
    if measured:
        samples = zip(*(model.samples for model in measured), strict=True)
        print_table(
            "the same prompt, seed and settings",
            [
                {
                    model.source: " ".join(text.split())
                    for model, text in zip(measured, texts, strict=True)
                }
                for texts in samples
            ],
            texts=[model.source for model in measured],
            lines=True,
        )


def _parser() -> ArgumentParser:
    parser = report_parser("sizes", run.__doc__, sources="+")
    add = parser.add_argument
    add(
        "--text",
        type=str | None,
        help="Text for the losses: verdict, sample, a file or a folder; null = no losses.",
    )
    add(
        "--tasks",
        type=GivenTasks | None,
        help="Tasks that judge the models: hellaswag, lambada, wikitext; one, a list such as [hellaswag, lambada], or a "
        "mapping with files such as {hellaswag: FILE}. Without a file, the one of the command download. null = none.",
    )
    add(
        "--task_limit",
        type=int | None,
        default=200,
        help="First examples of each task that are used; of wikitext, pages. null = all.",
    )
    add("--train_ratio", type=float, default=0.9, help="Share of the text in the training split.")
    add("--context_length", type=int, default=256, help="Tokens in a window of the text.")
    add(
        "--batch_size",
        type=int,
        default=2,
        help="Windows per forward pass; the losses do not depend on it.",
    )
    add(
        "--temperature",
        type=float,
        default=1.5,
        help="0 = greedy; 1 = the model's distribution; > 1 flattens it.",
    )
    add(
        "--top_k",
        type=int | None,
        default=50,
        help="Sample from the k most likely tokens; null = all.",
    )
    add(
        "--top_p",
        type=float | None,
        help="Sample from the fewest likely tokens with a total probability of p, 0 < p <= 1; null = all.",
    )
    add("--num_samples", type=int, default=3, help="Continuations of each model.")
    add("--max_new_tokens", type=int, default=50, help="Maximum number of new tokens of a text.")
    add("--max_memory", type=float | None, help="GB that a model may need; null = the free memory.")
    return parser
