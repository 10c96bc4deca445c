"""Options of ``fit``, ``validate`` and ``plan``: the fields of ``RunConfig``, and those only the command line has."""

from lightning.pytorch.cli import LightningArgumentParser

from gpt_lightning.cli.text_options import TextList
from gpt_lightning.training.config import RunConfig


def add_run_settings(parser: LightningArgumentParser) -> None:
    """Add the settings of a run, except those of the model, the data and the trainer."""
    parser.add_class_arguments(RunConfig, skip={"model", "data", "trainer"})


def add_settings(parser: LightningArgumentParser, verb: str) -> None:
    """Add the options that only the command ``verb`` has, and link settings that belong together."""
    parser.add_argument(
        "--allow_import",
        action=TextList,
        metavar="PACKAGE",
        help="A package whose classes a YAML file may name, besides gpt_lightning, lightning and torch; "
        "repeatable.",
    )
    if verb == "validate":
        parser.add_argument(
            "--json", action="store_true", help="Print one JSON object and nothing else."
        )
    for target in ("model.seed", "data.seed"):
        parser.link_arguments("seed_everything", target)
    for target in ("model.rng", "data.rng"):
        parser.link_arguments("rng", target)
