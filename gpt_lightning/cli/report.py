"""``report``: the exercises about generated texts; chooses the report and defines the options they share."""

from importlib import import_module
from typing import TYPE_CHECKING, Literal

from jsonargparse import ArgumentParser, Namespace

from gpt_lightning.cli.generate import (
    DEVICE_HELP,
    DTYPE_HELP,
    N_HEADS_HELP,
    SEED_HELP,
    SOURCE_HELP,
    DType,
    load_for_inference,
    resolve_device,
)
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND
from gpt_lightning.cli.options import CONFIG_HELP
from gpt_lightning.cli.text_options import TextList
from gpt_lightning.suggestions import suggest

if TYPE_CHECKING:
    from gpt_lightning.data.tokenizer import Tokenizer
    from gpt_lightning.model.gpt import GPTModel

# report → (module, description)
REPORTS = {
    "sampling": ("report_sampling", "exercise 5.1: next-token frequencies under temperature"),
    "sweep": (
        "report_sweep",
        "exercises 5.2, 5.3: temperature × top_k, deterministic settings",
    ),
    "sizes": ("report_sizes", "exercise 5.6: models of different sizes side by side"),
    "speed": (
        "report_speed",
        "training speed: the book's model, then one improvement after the other",
    ),
}


def run(arguments: list[str]) -> int | None:
    """Run the report that the first argument names; return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, REPORTS))
        print("usage: gpt_lightning report REPORT [options]\n\nreports:")
        for name, (_, description) in REPORTS.items():
            print(f"  {name:<{width}}  {description}")
        print("\n'gpt_lightning report REPORT --help' lists a report's options.")
        print(OPTIONS_OF_EVERY_COMMAND)
        return 0
    name, *rest = arguments
    if name not in REPORTS:
        raise ValueError(f"{name}: is not a report; {suggest(name, REPORTS)}")
    code: int | None = import_module(f"gpt_lightning.cli.{REPORTS[name][0]}").run(rest)
    return code


def report_parser(
    name: str, description: str | None, *, sources: Literal["+"] | None = None
) -> ArgumentParser:
    """A parser with the options of all reports.

    Args:
        sources: "+": ``--from`` takes several sources.
    """
    parser = ArgumentParser(
        prog=f"gpt_lightning report {name}", description=description, exit_on_error=False
    )
    add = parser.add_argument
    add("--config", action="config", help=CONFIG_HELP)
    if sources:
        add(
            "--from",
            action=TextList,
            nargs=sources,
            metavar="SOURCE",
            help=f"The models. {SOURCE_HELP}",
        )
    else:
        add("--from", type=str | None, metavar="SOURCE", help=f"The model. {SOURCE_HELP}")
    add("--n_heads", type=int | None, help=N_HEADS_HELP)
    add("--prompt", type=str, help="The text to continue.")
    add("--seed", type=int, default=123, help=SEED_HELP)
    add("--device", type=str | None, help=DEVICE_HELP)
    add("--dtype", type=DType | None, help=DTYPE_HELP)
    add("--out", type=str | None, metavar="FOLDER", help="Also write figures, CSV and JSON there.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser


def load_model_of(settings: Namespace) -> tuple["GPTModel", "Tokenizer"]:
    """The model and the tokenizer of a report's --from, --device, --dtype and --n_heads."""
    return load_for_inference(
        settings["from"], resolve_device(settings.device), settings.dtype, settings.n_heads
    )
