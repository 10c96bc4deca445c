"""``report``: the chapter's exercises about a model's texts, each a report in a module of its own."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.generate import DType, load, resolve_device
from gpt_lightning.cli.suggestions import suggest
from gpt_lightning.cli.text_options import TextList

if TYPE_CHECKING:
    from gpt_lightning.model.gpt import GPTModel

logger = logging.getLogger(__name__)

# report → (module, what it shows)
REPORTS = {
    "sampling": ("report_sampling", "5.1: next-token frequencies under temperature"),
    "sweep": ("report_sweep", "5.2, 5.3: temperature × top_k, what is deterministic"),
    "sizes": ("report_sizes", "5.6: models of different sizes side by side"),
}


def run(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, REPORTS))
        print("usage: gpt_lightning report REPORT [options]\n\nreports:")
        for name, (_, what) in REPORTS.items():
            print(f"  {name:<{width}}  {what}")
        print("\n'gpt_lightning report REPORT --help' lists a report's options.")
        return
    name, *rest = arguments
    if name not in REPORTS:
        raise ValueError(f"{name}: is no report; {suggest(name, REPORTS)}")
    import_module(f"gpt_lightning.cli.{REPORTS[name][0]}").run(rest)


def report_parser(
    name: str, description: str | None, *, sources: Literal["+"] | None = None
) -> ArgumentParser:
    """What all reports have. ``sources="+"``: --from takes several."""
    parser = ArgumentParser(
        prog=f"gpt_lightning report {name}", description=description, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help="These settings from a YAML file.")
    source = "SOURCE: a run, a checkpoint, GPT-2's files or name."
    if sources:
        add("--from", action=TextList, nargs=sources, metavar="SOURCE", help=source)
    else:
        add("--from", type=str | None, help=source)
    add("--n_heads", type=int | None, help="Attention heads, which the book's .pth does not tell.")
    add("--prompt", type=str, help="The text whose continuation is looked at.")
    add("--seed", type=int, default=123, help="What the draws depend on.")
    add("--device", type=str | None, help="cpu, cuda, cuda:1, …; none: the GPU if there is one.")
    add("--dtype", type=DType | None, help="Of the weights; none: as they are stored.")
    add("--out", type=str | None, help="A folder for figures and tables.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser


SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    """What is to be called after each of ``total``: a bar on a terminal, else a plain line at intervals."""
    from rich.console import Console
    from rich.progress import Progress

    done, last_line = 0, time.monotonic()

    def advance() -> None:
        nonlocal done, last_line
        done += 1
        bar.advance(task)
        if bar.disable and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            logger.info(f"{done} of {total} {what}")

    console = Console(stderr=True)
    with Progress(
        console=console, disable=not console.is_terminal or not logger.isEnabledFor(logging.INFO)
    ) as bar:
        task = bar.add_task(what, total=total)
        yield advance


def load_model_of(settings: Namespace) -> "GPTModel":
    """The model that a report's --from, --device, --dtype and --n_heads name."""
    return load(settings["from"], resolve_device(settings.device), settings.dtype, settings.n_heads)
