"""``report sampling``: exercise 5.1 as tables and a figure."""

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.console import output_folder, print_table, without, write_csv
from gpt_lightning.cli.parsing import parse
from gpt_lightning.cli.report import load_model_of, report_parser
from gpt_lightning.data.unicode import printable

if TYPE_CHECKING:
    from torch import Tensor

    from gpt_lightning.generation.sampling import SamplingParams


def run(arguments: list[str]) -> None:
    """Exercise 5.1: exact and sampled frequencies of next tokens.

    By default, the tokens are the book's vocabulary of nine tokens. With --from SOURCE and --prompt, they are
    the most likely next tokens of a model.
    """
    settings = parse(_parser(), arguments)
    with output_folder(settings.out) if settings.out else nullcontext() as out:
        _report(settings, out)


def _report(settings: Namespace, out: Path | None) -> None:
    """Draw the samples, write the report to ``out`` and print it."""
    from gpt_lightning.reports import sampling

    tokens, logits, row_ids = _distribution(settings)
    combinations = _combinations(settings, sampling.BOOK_TEMPERATURES)
    rows, distributions = sampling.frequencies(
        logits, tokens, combinations, settings.num_samples, settings.seed, row_ids
    )
    timing_temperature = max(s.temperature for s in combinations) or 1.0
    timing_samples = min(settings.num_samples, 1000)  # the loop is slow
    timings = sampling.compare_estimators(logits, timing_temperature, timing_samples, settings.seed)
    answer: dict[str, Any] = sampling.as_dict(rows, distributions, timings)
    answer["token"] = [asdict(row) for row in rows if row.token == settings.token]
    answer["settings"] = {
        key: settings[key] for key in ("from", "prompt", "num_samples", "seed")
    } | {"methods_num_samples": timing_samples, "methods_temperature": timing_temperature}
    caption = f"{settings.num_samples:,} samples per setting, seed {settings.seed}"
    if settings["from"]:
        caption += printable(f", {settings['from']} after {shorten(repr(settings.prompt), 80)}")
    if out is not None:
        write_csv(out / "sampling.csv", answer["rows"])
        (out / "sampling.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        figure = sampling.sampling_figure(rows, settings.num_samples, caption)
        figure.savefig(out / "sampling.png", dpi=150)
    if settings.json:
        print(json.dumps(answer))
        return
    unused = [name for name in ("top_k", "top_p") if not settings[name]]
    print_table(caption, [without(row.as_text(), unused) for row in rows], texts=["token"])
    print_table("distributions", [distribution.as_text() for distribution in distributions])
    print_table(
        f"three methods, {timing_samples} samples at temperature {timing_temperature:g}",
        [timing.as_text() for timing in timings],
        texts=["method"],
    )
    for row in rows:
        if row.token == settings.token:
            print(
                f"{printable(row.token)} at temperature {row.temperature:g}: {row.probability:.2%} "
                f"exactly, {row.count} of {settings.num_samples} samples"
            )


def _distribution(settings: Namespace) -> tuple[list[str], "Tensor", list[int] | None]:
    """The tokens' names, their logits ``(V,)``, and the ids that get a row (``None``: all)."""
    import torch

    from gpt_lightning.reports.sampling import BOOK_LOGITS, BOOK_TOKENS

    if settings["from"]:
        if settings.tokens or settings.logits:
            raise ValueError(
                "from: the model gives the tokens and logits; leave out --tokens and --logits"
            )
        if not settings.prompt:
            raise ValueError("prompt: is empty; give some text with --prompt")
        if settings.show < 1:
            raise ValueError(f"show: {settings.show} is too small; give 1 or more")
        return _model_distribution(settings)
    for name in ("prompt", "device", "dtype"):
        if settings[name] is not None:
            raise ValueError(f"{name}: needs a model; give one with --from SOURCE")
    logits = list(BOOK_LOGITS) if settings.logits is None else settings.logits
    tokens = settings.tokens
    if tokens is None:
        is_book = settings.logits is None
        tokens = list(BOOK_TOKENS) if is_book else [str(i) for i in range(len(logits))]
    if settings.token is not None and settings.token not in tokens:
        raise ValueError(f"token: {settings.token} is not a token; give one of {', '.join(tokens)}")
    return tokens, torch.tensor(logits), None


def _model_distribution(settings: Namespace) -> tuple[list[str], "Tensor", list[int]]:
    import torch

    from gpt_lightning.data.tokenizer import decode, encode_prompt

    model = load_model_of(settings)
    ids = encode_prompt(settings.prompt)[-model.config.context_length :]
    with torch.inference_mode():
        idx = torch.tensor([ids], device=model.tok_emb.weight.device)
        logits = model(idx)[0, -1].float().cpu().clone()
    if not torch.isfinite(logits).all():
        raise ValueError(f"from: {settings['from']} gives NaN or inf; its weights are damaged")
    row_ids = logits.topk(min(settings.show, len(logits))).indices.tolist()
    if settings.token is not None:
        token_ids = encode_prompt(settings.token)
        if len(token_ids) != 1:
            raise ValueError(f"token: {settings.token!r} is {len(token_ids)} tokens; give one")
        row_ids = list(dict.fromkeys([*row_ids, *token_ids]))
        settings.token = repr(settings.token)
    return [repr(decode([i])) for i in range(len(logits))], logits, row_ids


def _combinations(settings: Namespace, default: Sequence[float]) -> list["SamplingParams"]:
    from gpt_lightning.reports.sweep import grid

    return grid(
        default if settings.temperatures is None else settings.temperatures,
        [None] if settings.top_k is None else [k or None for k in settings.top_k],
        [None] if settings.top_p is None else settings.top_p,
    )


def _parser() -> ArgumentParser:
    parser = report_parser("sampling", run.__doc__)
    add = parser.add_argument
    add("--tokens", type=list[str] | None, help="Names of the tokens; null = the book's nine.")
    add("--logits", type=list[float] | None, help="Logits of the tokens; null = the book's.")
    add(
        "--temperatures",
        type=list[float] | None,
        help="List of temperatures; 0 = greedy; null = [1, 0.1, 5], the book's.",
    )
    add(
        "--top_k",
        type=list[int] | None,
        help="List of top-k values, such as [1, 5]; 0 or null = all tokens.",
    )
    add(
        "--top_p",
        type=list[float] | None,
        help="List of top-p values; null = all tokens. Every temperature is combined with every top-k and top-p.",
    )
    add("--num_samples", type=int, default=1000, help="Samples for each setting.")
    add("--token", type=str, help="A token to print separately, such as pizza.")
    add("--show", type=int, default=10, help="With --from: number of most likely tokens.")
    return parser
