"""``verify-resume``: proves on the user's machine that a killed run loses nothing."""

import argparse
import json
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from gpt_lightning.cli.errors import explain
from gpt_lightning.cli.logs import OPTIONS_OF_EVERY_COMMAND

if TYPE_CHECKING:
    from gpt_lightning.training.verify_resume import Shortened

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """Train N + M updates without a stop, and again with SIGKILLs from N on and resumes; compare the two.

    Takes all settings of fit (--config, --data.text, --trainer.devices 2, …) and trains as they say, in a
    temporary folder. The run ends in its own way, by epochs, steps or tokens, but sooner. One kill is at an
    epoch's end; a long epoch is cut short for it. Weights, optimizer, counters and the windows of every update
    must be the same bits; exit code 1 names the first difference.
    """
    own, fit_arguments = _own_arguments(arguments)
    if "--print_config" in fit_arguments:
        from gpt_lightning.cli.fit import fit

        return fit(fit_arguments)
    if own.kills is None:
        own.kills = min(3, max(1, own.more_steps))
    for name in ("steps", "more_steps", "kills"):
        if getattr(own, name) < 1:
            raise ValueError(f"{name}: {getattr(own, name)} is too small; give 1 or more")
    if own.kills > own.more_steps:
        raise ValueError(
            f"kills: {own.kills} are more than the {own.more_steps} updates they come in; give fewer, or "
            "more --more_steps"
        )
    from gpt_lightning.cli.console import writable_folder
    from gpt_lightning.training.verify_resume import verify_resume

    def say(what: str) -> None:
        logger.info(f"verify-resume: {what}")

    with _terminated_by_exit(), tempfile.TemporaryDirectory(prefix="verify-resume-") as scratch:
        folder = writable_folder(own.out) if own.out else Path(scratch)
        if any(folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty; give another folder")
        plan, said = _shortened(fit_arguments, own.steps, own.more_steps, own.kills)
        say(said)
        compared = verify_resume(fit_arguments, folder.resolve(), plan, say)
    exact = not any(part.difference for part in compared)
    if own.json:
        parts = [asdict(part) for part in compared]
        print(json.dumps({"exact": exact, "steps": own.steps, "more_steps": own.more_steps,
                          "kills": plan.kills, "epoch_steps": plan.epoch_steps, "compared": parts}))  # fmt: skip
    else:
        print(f"{'':<10} {'without a stop':<18} {'killed and resumed':<18}")
        for part in compared:
            verdict = "DIFFERENT" if part.difference else "the same bits"
            print(f"{part.part:<10} {part.straight[:16]}   {part.resumed[:16]}   {verdict}")
    for part in compared:
        if part.difference:
            logger.error(f"{part.part}: {part.difference}; resume is not exact here")
            break
    return 0 if exact else 1


def _shortened(
    fit_arguments: list[str], steps: int, more_steps: int, kills: int
) -> tuple["Shortened", str]:
    """The run as ``fit`` would make it, with lengths cut short; and a line that says so."""
    from gpt_lightning.cli.fit import setup_data_early
    from gpt_lightning.cli.training_cli import TrainingCLI
    from gpt_lightning.training.verify_resume import Limit, shorten

    cli = TrainingCLI("fit", fit_arguments, run.__doc__)
    if cli.config.ckpt_path:
        raise ValueError("ckpt_path: verify-resume trains runs of its own; leave it out")
    setup_data_early(cli)
    data, trainer = cli.datamodule, cli.trainer
    epoch = data.epoch_shape()
    by_trainer = epoch.steps_of_run(trainer.max_steps, trainer.max_epochs)
    by_tokens = epoch.steps_for(cli.config.max_tokens) if cli.config.max_tokens else None
    ends_by: Limit = "max_steps" if by_trainer == trainer.max_steps else "max_epochs"
    if by_tokens is not None and (by_trainer is None or by_tokens < by_trainer):
        ends_by = "max_tokens"
    unit = epoch.accumulate if data.has_global_batch else 1
    plan = shorten(epoch, ends_by, steps, more_steps, kills, limit_unit=unit)
    said = f"{plan.steps} updates, ended by {ends_by}; {plan.epoch_steps} an epoch"
    if plan.epoch_steps < epoch.steps:
        said += f" (of {epoch.steps}, cut short so that a kill is at an epoch's end)"
    return plan, said


def _own_arguments(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """What is for this command, and what is for ``fit``."""
    parser = _parser()
    try:
        own, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), parser)) from error
    for option in parser._option_string_actions:
        for word in rest:
            name = word.partition("=")[0]
            if name.startswith("--") and option.startswith(name):
                raise ValueError(f"{name[2:]}: is not a setting; did you mean {option[2:]}?")
    return own, rest


@contextmanager
def _terminated_by_exit() -> Iterator[None]:
    """So that SIGTERM too ends what is under way, and cleans up."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    # a plain parser, for it leaves what it does not know to fit
    parser = argparse.ArgumentParser(
        prog="gpt_lightning verify-resume",
        description=run.__doc__,
        epilog=OPTIONS_OF_EVERY_COMMAND,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=10,
        help="Updates before the first kill (N); default: %(default)s.",
    )
    add("--more_steps", type=int, default=10, help="Updates after it (M); default: %(default)s.")
    add("--kills", type=int, help="Kills, each followed by a resume; default: 3, at most M.")
    add("--out", help="An empty folder to keep both runs in; default: a temporary one.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
