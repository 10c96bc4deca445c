"""``evaluate``: HellaSwag, LAMBADA and WikiText."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

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

if TYPE_CHECKING:
    from gpt_lightning.data.tokenizer import Tokenizer
    from gpt_lightning.evals.last_word import LastWordResult
    from gpt_lightning.evals.likelihood import Likelihood, Request
    from gpt_lightning.evals.multiple_choice import ChoiceResult
    from gpt_lightning.evals.perplexity import PerplexityResult

    Result = ChoiceResult | LastWordResult | PerplexityResult
    Judge = Callable[[list[list[Likelihood]]], Result]

Task = Literal["hellaswag", "lambada", "wikitext"]


def run(arguments: list[str]) -> None:
    """Judge a model by HellaSwag or other multiple choice, by LAMBADA, or by WikiText.

    The numbers are defined as in lm-evaluation-harness.
    """
    settings = parse(_parser(), arguments)
    _check(settings)

    from gpt_lightning.evals.likelihood import is_cropped, log_likelihoods

    examples = _read_examples(settings.task, settings.file)[: settings.limit]
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
    requests, judge = _requests(settings.task, examples, tokenizer, context_length, stride)
    with progress_to("texts", sum(len(request.continuations) for request in requests)) as show:
        answers = log_likelihoods(model, requests, settings.batch_size, lambda done: show(done, ""))
    cropped = sum(is_cropped(request, context_length) for request in requests)
    result = {"task": settings.task, **asdict(judge(answers))}
    if settings.task != "wikitext":
        result["cropped"] = cropped
    if settings.json:
        used = {"file": settings.file, "limit": settings.limit, "batch_size": settings.batch_size}
        if settings.task == "wikitext":
            used["stride"] = stride
        used |= {"from": settings["from"], "device": device, "dtype": settings.dtype}
        print(json.dumps({**result, "settings": used}))
    else:
        print_table(f"{settings['from']} on {settings.file}", [_row(result)])


def _check(settings: Namespace) -> None:
    """Refuse missing and contradicting settings."""
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    if settings.task is None:
        raise ValueError("task: is missing; give --task hellaswag, lambada or wikitext")
    if not settings.file:
        raise ValueError(f"file: is missing; give the file of {settings.task} with --file FILE")
    for name in ("limit", "stride", "batch_size"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name}: {settings[name]} is too small; give 1 or more")
    if settings.stride is not None and settings.task != "wikitext":
        raise ValueError(f"stride: has no meaning for {settings.task}; leave it out")


def _read_examples(task: Task, file: str) -> Any:
    """The examples of a task's file."""
    from gpt_lightning.evals.task_files import read_choices, read_last_words, read_pages

    return {"hellaswag": read_choices, "lambada": read_last_words, "wikitext": read_pages}[task](
        file
    )


def _requests(
    task: Task, examples: Any, tokenizer: "Tokenizer", context_length: int, stride: int
) -> tuple[list["Request"], "Judge"]:
    """What the model must score, and the function that makes a result of the scores."""
    from gpt_lightning.evals.last_word import last_word_requests, last_word_result
    from gpt_lightning.evals.multiple_choice import choice_requests, choice_result
    from gpt_lightning.evals.perplexity import page_requests, perplexity_result

    if task == "hellaswag":
        return choice_requests(tokenizer, examples), partial(choice_result, examples)
    if task == "lambada":
        return last_word_requests(tokenizer, examples), last_word_result
    requests = page_requests(tokenizer, examples, context_length, stride)
    return requests, partial(perplexity_result, examples)


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
        type=Task | None,
        help="hellaswag = multiple choice, also in other files of this form; lambada = the last word of a text; "
        "wikitext = perplexity of a text.",
    )
    add(
        "--file",
        type=str | None,
        help="The task's file, which may be compressed (.bz2, .gz). hellaswag and lambada: JSON lines; hellaswag: also "
        "six lines per example; wikitext: text.",
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
