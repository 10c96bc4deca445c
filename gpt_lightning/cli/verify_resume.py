"""Command ``verify-resume``: checks on the user's machine that a killed and resumed run loses nothing."""

import argparse
import json
import logging
import tempfile
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from gpt_lightning.cli.wrapped_fit import parser_beside_fit, split_arguments, terminated_by_exit

if TYPE_CHECKING:
    from gpt_lightning.training.verify_resume import ShortRun

logger = logging.getLogger(__name__)


def run(arguments: list[str]) -> int:
    """Check that resume is exact: train N + M optimizer steps without interruption, and again with kills and resumes.

    Accepts all settings of fit (--config, --data.text, --trainer.devices 2, …; --help-all lists them) and trains with
    them in a temporary folder. The run is shorter than with fit, but the same limit ends it: epochs, steps or tokens. The first SIGKILL
    comes after N steps, and one comes at the end of an epoch; a long epoch is shortened for it. Weights, optimizer,
    counters and the windows of every step must have the same bits. Otherwise the exit code is 1 and a message names
    the first difference.
    """
    options, fit_arguments = split_arguments(_parser(), arguments)
    if {"--print_config", "--help-all"} & {*fit_arguments}:
        from gpt_lightning.cli.fit import fit

        return fit(fit_arguments)
    if options.kills is None:
        options.kills = min(3, max(1, options.more_steps))
    for name in ("steps", "more_steps", "kills"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: {getattr(options, name)} is too small; give 1 or more")
    if options.kills > options.more_steps:
        raise ValueError(
            f"kills: {options.kills} do not fit into {options.more_steps} steps; give fewer kills, or "
            "a larger --more_steps"
        )
    from gpt_lightning.cli.console import output_folder
    from gpt_lightning.training.verify_resume import verify_resume

    def log_step(description: str) -> None:
        logger.info(f"verify-resume: {description}")

    with (
        terminated_by_exit(),
        # a killed process may hold a file for a moment longer on Windows, which is no failure of the check
        tempfile.TemporaryDirectory(prefix="verify-resume-", ignore_cleanup_errors=True) as scratch,
        output_folder(options.out or scratch) as folder,
    ):
        if any(folder.iterdir()):
            raise ValueError(f"out: {folder} is not empty; give another folder")
        plan, description = _plan_of_short_run(
            fit_arguments, options.steps, options.more_steps, options.kills
        )
        log_step(description)
        compared = verify_resume(fit_arguments, folder.resolve(), plan, log_step)
    exact = not any(part.difference for part in compared)
    if options.json:
        parts = [asdict(part) for part in compared]
        print(json.dumps({"exact": exact, "steps": options.steps, "more_steps": options.more_steps,
                          "kills": plan.kills, "epoch_steps": plan.epoch_steps, "compared": parts}))  # fmt: skip
    else:
        print(f"{'':<10} {'uninterrupted':<18} {'killed and resumed':<18}")
        for part in compared:
            verdict = "DIFFERENT" if part.difference else "same bits"
            print(f"{part.part:<10} {part.straight[:16]}   {part.resumed[:16]}   {verdict}")
    for part in compared:
        if part.difference:
            logger.error(f"{part.part}: {part.difference}; resume is not exact here")
            break
    return 0 if exact else 1


def _plan_of_short_run(
    fit_arguments: list[str], steps: int, more_steps: int, kills: int
) -> tuple["ShortRun", str]:
    """The plan of a short run for the settings of ``fit``, and a line that describes it."""
    from gpt_lightning.cli.training_cli import TrainingCLI
    from gpt_lightning.training.build import build_run
    from gpt_lightning.training.lightning_messages import quiet_lightning
    from gpt_lightning.training.run import setup_data_early
    from gpt_lightning.training.run_length import Progress, run_steps
    from gpt_lightning.training.verify_resume import Limit, plan_short_run, schedule_options

    cli = TrainingCLI("fit", fit_arguments, run.__doc__)
    if cli.config.ckpt_path:
        raise ValueError("ckpt_path: verify-resume trains new runs; leave it out")
    with quiet_lightning():
        built = build_run(cli.run_config())
    setup_data_early(built)
    data, trainer = built.datamodule, built.trainer
    epoch = data.epoch_shape()
    by_trainer = epoch.steps_of_run(trainer.max_steps, trainer.max_epochs)
    whole = run_steps(epoch, trainer, cli.config.max_tokens, Progress())
    ends_by: Limit = "max_steps" if by_trainer == trainer.max_steps else "max_epochs"
    if whole != by_trainer:
        ends_by = "max_tokens"
    unit = epoch.accumulate if data.has_global_batch else 1
    plan = plan_short_run(epoch, ends_by, steps, more_steps, kills, limit_unit=unit)
    built.module.schedule.check_clipping(whole)
    schedule = built.module.schedule.resolve(whole)
    plan = replace(plan, schedule=tuple(schedule_options(schedule, clip_from_step=steps)))
    description = f"{plan.steps} steps, ended by {ends_by}; {plan.epoch_steps} steps per epoch"
    if plan.epoch_steps < epoch.steps:
        description += f" (instead of {epoch.steps}, so that a kill is at the end of an epoch)"
    return plan, description


def _parser() -> argparse.ArgumentParser:
    parser = parser_beside_fit("verify-resume", run.__doc__)
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        default=10,
        help="Optimizer steps before the first kill (N); default: %(default)s.",
    )
    add(
        "--more_steps",
        type=int,
        default=10,
        help="Optimizer steps after the first kill (M); default: %(default)s.",
    )
    add(
        "--kills",
        type=int,
        help="Number of kills, each followed by a resume; default: 3, but not more than M.",
    )
    add("--out", help="An empty folder that keeps both runs; default: a temporary folder.")
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
