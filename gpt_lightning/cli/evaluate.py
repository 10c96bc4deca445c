"""``evaluate``: HellaSwag, LAMBADA and WikiText."""

import json
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.console import Row, print_table, progress_to
from gpt_lightning.cli.generate import (
    DEVICE_HELP,
    DTYPE_HELP,
    N_HEADS_HELP,
    SOURCE_HELP,
    DType,
    load_for_inference,
    resolve_device,
)
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.parsing import parse
from gpt_lightning.evals.task_names import TaskName


def run(arguments: list[str]) -> None:
    """Judge a model by HellaSwag or other multiple choice, by LAMBADA, or by WikiText.

    The numbers are defined as in lm-evaluation-harness.
    """
    settings = parse(_parser(), arguments)
    _check(settings)

    from gpt_lightning.evals.task_downloads import find_task_file
    from gpt_lightning.evals.tasks import make_task, read_examples

    file = settings.file or find_task_file(settings.task, "--file FILE")
    examples = read_examples(settings.task, file, settings.limit)
    device = resolve_device(settings.device)
    model, tokenizer = load_for_inference(
        settings["from"], device, settings.dtype, settings.n_heads
    )
    context_length = model.config.context_length
    stride = settings.stride or context_length
    if stride > context_length:
        raise ValueError(
            f"stride: {stride} is more than the model's context of {context_length}; give less"
        )
    task = make_task(settings.task, examples, tokenizer, context_length, stride)
    with progress_to("texts", task.texts) as show:
        result = task.evaluate(model, settings.batch_size, lambda done: show(done, ""))
    if settings.json:
        used = {"file": file, "limit": settings.limit, "batch_size": settings.batch_size}
        if settings.task == "wikitext":
            used["stride"] = stride
        used |= {"from": settings["from"], "device": device, "dtype": settings.dtype}
        print(json.dumps({**result, "settings": used}))
    else:
        print_table(f"{settings['from']} on {file}", [_row(result)])


def _check(settings: Namespace) -> None:
    """Refuse missing and contradicting settings."""
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    if settings.task is None:
        raise ValueError("task: is missing; give --task hellaswag, lambada or wikitext")
    for name in ("limit", "stride", "batch_size"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name}: {settings[name]} is too small; give 1 or more")
    if settings.stride is not None and settings.task != "wikitext":
        raise ValueError(f"stride: has no meaning for {settings.task}; leave it out")


def _row(result: dict[str, Any]) -> Row:
    """The result as text, each accuracy with its standard error."""
    row = {}
    for name, value in result.items():
        if name.endswith("_stderr"):
            continue
        stderr = result.get(f"{name}_stderr")
        shown = f"{value:,.4f}" if isinstance(value, float) else f"{value}"
        row[name] = shown if stderr is None else f"{shown} ± {stderr:.4f}"
    return row


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="gpt_lightning evaluate", description=run.__doc__, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    add("--from", type=str | None, metavar="SOURCE", help=f"The model. {SOURCE_HELP}")
    add("--n_heads", type=int | None, help=N_HEADS_HELP)
    add(
        "--task",
        type=TaskName | None,
        help="hellaswag = multiple choice, also in other files of this form; lambada = the last word of a text; "
        "wikitext = perplexity of a text.",
    )
    add(
        "--file",
        type=str | None,
        help="The task's file, which may be compressed (.bz2, .gz). hellaswag and lambada: JSON lines; hellaswag: also "
        "six lines per example; wikitext: text. null = the file of 'download hellaswag', 'download lambada' or "
        "'download wikitext-2'.",
    )
    add("--limit", type=int | None, help="Only the first N examples (wikitext: pages); null = all.")
    add(
        "--stride",
        type=int | None,
        help="wikitext: new tokens per window. Fewer than the context give each token a longer context, and take "
        "longer. null = the context: windows do not overlap.",
    )
    add(
        "--batch_size",
        type=int,
        default=32,
        help="Texts that are computed together: endings, last words or windows. The result is the same up to rounding.",
    )
    add("--device", type=str | None, help=DEVICE_HELP)
    add("--dtype", type=DType | None, help=DTYPE_HELP)
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
