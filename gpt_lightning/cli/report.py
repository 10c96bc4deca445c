"""``report sampling`` and ``report sweep``: exercises 5.1, 5.2 and 5.3 as tables, figures and pages."""

import base64
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.generate import DType, load, usable_device
from gpt_lightning.cli.parsing import parse, suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from gpt_lightning.generation.sampling import Sampling


def run(arguments: list[str]) -> None:
    reports = {"sampling": _sampling, "sweep": _sweep}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: gpt_lightning report {sampling,sweep} [options]; each has --help")
        return
    if arguments[0] not in reports:
        raise ValueError(f"{arguments[0]}: is no report; {suggest(arguments[0], reports)}")
    reports[arguments[0]](arguments[1:])


def _sampling(arguments: list[str]) -> None:
    """Exercise 5.1: how often each next token comes, exactly and in draws.

    Without --from it is the book's vocabulary of nine tokens; with --from SOURCE and --prompt the model's
    next-token distribution, its likeliest tokens by name.
    """
    settings = parse(_sampling_parser(), arguments)

    from gpt_lightning.reports import sampling as report

    tokens, logits, shown = _distribution(settings)
    combinations = _combinations(settings, report.BOOK_TEMPERATURES)
    rows, distributions = report.frequencies(
        logits, tokens, combinations, settings.num_samples, settings.seed, shown
    )
    compared_at = max(s.temperature for s in combinations) or 1.0
    compared_draws = min(settings.num_samples, 1000)  # the loop is slow
    methods = report.compare_methods(logits, compared_at, compared_draws, settings.seed)
    answer: dict[str, Any] = report.as_dict(rows, distributions, methods)
    answer["token"] = [asdict(row) for row in rows if row.token == settings.token]
    answer["settings"] = {
        key: settings[key] for key in ("from", "prompt", "num_samples", "seed")
    } | {"methods_num_samples": compared_draws, "methods_temperature": compared_at}
    caption = f"{settings.num_samples:,} draws a setting, seed {settings.seed}"
    if settings["from"]:
        caption += f", {settings['from']} after {settings.prompt!r}"
    if settings.out:
        out = _folder(settings.out)
        _write_csv(out / "sampling.csv", answer["rows"])
        (out / "sampling.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        figure = report.sampling_figure(rows, settings.num_samples, caption)
        figure.savefig(out / "sampling.png", dpi=150)
    if settings.json:
        print(json.dumps(answer))
        return
    _print_table(
        caption,
        [
            {
                "temperature": f"{row.temperature:g}",
                **({"top_k": _all(row.top_k)} if settings.top_k else {}),
                **({"top_p": _all(row.top_p)} if settings.top_p else {}),
                "token": row.token,
                "probability": f"{row.probability:.4%}",
                "expected": f"{row.expected:.1f}",
                "count": f"{row.count}",
                "99 % of runs": f"{row.low} – {row.high}",
                "z": f"{row.z:+.2f}",
            }
            for row in rows
        ],
    )
    _print_table(
        "distributions",
        [
            {
                "temperature": f"{d.temperature:g}",
                "top_k": _all(d.top_k),
                "top_p": _all(d.top_p),
                "entropy (nats)": f"{d.entropy:.4f}",
                "effective vocabulary": f"{d.effective_vocabulary:.2f}",
                "tokens left": f"{d.tokens_left}",
            }
            for d in distributions
        ],
    )
    _print_table(
        f"three ways to know it, {compared_draws} draws at temperature {compared_at:g}",
        [
            {
                "method": m.name,
                "time": f"{m.seconds * 1e3:.3f} ms",
                "largest error of a probability": f"{m.largest_error:.4f}",
            }
            for m in methods
        ],
    )
    for row in rows:
        if row.token == settings.token:
            print(
                f"{row.token} at temperature {row.temperature:g}: {row.probability:.2%} exactly, "
                f"{row.count} of {settings.num_samples} drawn"
            )


def _sweep(arguments: list[str]) -> None:
    """Exercises 5.2 and 5.3: texts under each temperature × top_k, measured, and one to read of each.

    Which settings are deterministic is seen from the texts. With --out also heat maps (PNG), one page
    with all texts (HTML, needs no network), CSV and JSON.
    """
    settings = parse(_sweep_parser(), arguments)
    if not settings["from"]:
        raise ValueError("from: is missing; give the model with --from SOURCE")
    if not settings.prompt:
        raise ValueError("prompt: is empty; give some text with --prompt")

    from rich.console import Console
    from rich.progress import Progress

    from gpt_lightning.data.tokenizer import encode_prompt
    from gpt_lightning.reports import sweep as report

    cells_to_do = report.grid(
        settings.temperatures,
        [k or None for k in settings.top_k],
        [None] if settings.top_p is None else settings.top_p,
    )
    out = _folder(settings.out) if settings.out else None
    model = load(settings["from"], usable_device(settings.device), settings.dtype)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cells", total=len(cells_to_do))
        cells = report.sweep(
            model,
            encode_prompt(settings.prompt),
            cells_to_do,
            num_samples=settings.num_samples,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            on_cell=lambda: progress.advance(task),
        )
    used = {
        key: settings[key] for key in ("from", "prompt", "num_samples", "max_new_tokens", "seed")
    }
    answer = {**report.as_dict(cells), "settings": used}
    caption = ", ".join(f"{key} {value}" for key, value in used.items())
    if out is not None:
        figure = report.heat_maps(cells, caption)
        figure.savefig(out / "sweep.png", dpi=150)
        page = report.html_page(cells, caption, _base64_png(figure))
        (out / "sweep.html").write_text(page, encoding="utf-8")
        (out / "sweep.json").write_text(json.dumps(answer, indent=1), encoding="utf-8")
        _write_csv(
            out / "sweep.csv",
            [{**asdict(cell), "texts": " | ".join(cell.texts)} for cell in cells],
        )
    if settings.json:
        print(json.dumps(answer))
        return
    _print_table(
        caption,
        [
            {
                "temperature": f"{cell.temperature:g}",
                "top_k": _all(cell.top_k),
                **({"top_p": _all(cell.top_p)} if settings.top_p else {}),
                "distinct-1": f"{cell.distinct_1:.3f}",
                "distinct-2": f"{cell.distinct_2:.3f}",
                "repetition": f"{cell.repetition_rate:.3f}",
                "log-prob.": f"{cell.mean_log_probability:.3f}",
                "entropy": f"{cell.next_token_entropy:.3f}",
                "identical": f"{cell.identical_share:.2f}",
                "one text": " ".join(cell.texts[0].split()),
            }
            for cell in cells
        ],
    )
    deterministic = [cell for cell in cells if cell.deterministic]
    print(f"deterministic: {len(deterministic)} of {len(cells)} settings (all texts identical)")


def _distribution(settings: Namespace) -> tuple[list[str], "Tensor", list[int] | None]:
    """Tokens' names, logits ``(V,)``, and which of them get a row (none: all)."""
    import torch

    from gpt_lightning.reports.sampling import BOOK_LOGITS, BOOK_TOKENS

    if settings["from"]:
        if settings.tokens or settings.logits:
            raise ValueError("from: --tokens and --logits are the model's; leave them out")
        if not settings.prompt:
            raise ValueError("prompt: is empty; give some text with --prompt")
        if settings.show < 1:
            raise ValueError(f"show: {settings.show} is too small; give 1 or more")
        return _model_distribution(settings)
    for name in ("prompt", "device", "dtype"):
        if settings[name] is not None:
            raise ValueError(f"{name}: is for a model; give one with --from SOURCE")
    logits = list(BOOK_LOGITS) if settings.logits is None else settings.logits
    tokens = settings.tokens
    if tokens is None:
        own = settings.logits is not None
        tokens = [str(i) for i in range(len(logits))] if own else list(BOOK_TOKENS)
    if settings.token is not None and settings.token not in tokens:
        raise ValueError(f"token: {settings.token} is none of {', '.join(tokens)}")
    return tokens, torch.tensor(logits), None


def _model_distribution(settings: Namespace) -> tuple[list[str], "Tensor", list[int]]:
    import torch

    from gpt_lightning.data.tokenizer import decode, encode_prompt

    model = load(settings["from"], usable_device(settings.device), settings.dtype)
    ids = encode_prompt(settings.prompt)[-model.config.context_length :]
    with torch.inference_mode():
        idx = torch.tensor([ids], device=model.tok_emb.weight.device)
        logits = model(idx)[0, -1].float().cpu().clone()
    shown = logits.topk(min(settings.show, len(logits))).indices.tolist()
    if settings.token is not None:
        token_ids = encode_prompt(settings.token)
        if len(token_ids) != 1:
            raise ValueError(f"token: {settings.token!r} is {len(token_ids)} tokens; give one")
        shown = list(dict.fromkeys([*shown, *token_ids]))
        settings.token = repr(settings.token)
    return [repr(decode([i])) for i in range(len(logits))], logits, shown


def _combinations(settings: Namespace, default: Sequence[float]) -> list["Sampling"]:
    from gpt_lightning.reports.sweep import grid

    return grid(
        default if settings.temperatures is None else settings.temperatures,
        [None] if settings.top_k is None else settings.top_k,
        [None] if settings.top_p is None else settings.top_p,
    )


def _sampling_parser() -> ArgumentParser:
    parser = _parser("sampling", _sampling.__doc__)
    add = parser.add_argument
    add("--tokens", type=list[str] | None, help="Names of the tokens; default: the book's nine.")
    add("--logits", type=list[float] | None, help="Their logits; default: the book's.")
    add("--temperatures", type=list[float] | None, help="Default: [1, 0.1, 5], the book's.")
    add(
        "--top_k", type=list[int] | None, help="A list of top-k settings, combined with the others."
    )
    add("--top_p", type=list[float] | None, help="A list of top-p settings, combined too.")
    add("--num_samples", type=int, default=1000, help="Draws a setting.")
    add("--token", type=str | None, help="A token to single out, such as pizza.")
    add("--show", type=int, default=10, help="With --from: how many of the likeliest tokens.")
    return parser


def _sweep_parser() -> ArgumentParser:
    parser = _parser("sweep", _sweep.__doc__)
    add = parser.add_argument
    add("--temperatures", type=list[float], default=[0.0, 0.5, 1.0, 1.5], help="Rows of the grid.")
    add("--top_k", type=list[int], default=[1, 5, 25, 0], help="Its columns; 0: all tokens.")
    add("--top_p", type=list[float] | None, help="A grid for each of these.")
    add("--num_samples", type=int, default=8, help="Texts a cell.")
    add("--max_new_tokens", type=int, default=40, help="Tokens a text.")
    return parser


def _parser(name: str, description: str | None) -> ArgumentParser:
    parser = ArgumentParser(
        prog=f"gpt_lightning report {name}", description=description, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help="These settings from a YAML file.")
    add("--from", type=str | None, help="SOURCE: a checkpoint, or a run's folder.")
    add("--prompt", type=str | None, help="The text whose continuation is looked at.")
    add("--seed", type=int, default=123, help="What the draws depend on.")
    add("--device", type=str | None, help="cpu, cuda, cuda:1, …; none: the GPU if there is one.")
    add("--dtype", type=DType | None, help="Of the weights; none: as they are stored.")
    add("--out", type=str | None, help="A folder for figures and tables.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser


def _folder(name: str) -> Path:
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"out: {name} cannot be written ({error.strerror}); give another") from error
    return folder


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _base64_png(figure: "Figure") -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _all(value: object) -> str:
    return "all" if value is None else f"{value}"


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print(title)
    table = Table(box=box.SIMPLE_HEAD)
    for name in rows[0]:
        text = name in ("token", "one text", "method")
        table.add_column(name, justify="left" if text else "right", no_wrap=not text)
    for row in rows:
        table.add_row(*(Text(value) for value in row.values()))  # a user's text is no markup
    console = Console()
    Console(width=console.width if console.is_terminal else 160).print(table)
