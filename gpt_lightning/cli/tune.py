"""Command ``tune``: searches for the settings of ``fit`` with the lowest validation loss."""

import argparse
import json
import logging
import os
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from gpt_lightning.cli.config_files import find_space
from gpt_lightning.cli.console import print_table, progress_to
from gpt_lightning.cli.text_options import values_of
from gpt_lightning.cli.wrapped_fit import parser_beside_fit, split_arguments, terminated_by_exit
from gpt_lightning.data.unicode import decode_text, printable
from gpt_lightning.storage.atomic import write_text
from gpt_lightning.suggestions import nearest_setting, suggest

if TYPE_CHECKING:
    from gpt_lightning.cli.training_cli import TrainingCLI
    from gpt_lightning.tuning.space import Space
    from gpt_lightning.tuning.storage import StudyStorage
    from gpt_lightning.tuning.study import TrialResult, TuneStudy

logger = logging.getLogger(__name__)

# settings that cannot be in a space → why
_NOT_IN_SPACE = {
    "run": "tune names the runs itself",
    "ckpt_path": "tune resumes the runs itself",
    "allow_import": "works on the command line only",
    "trainer.default_root_dir": "is the same for all trials",
}
PRUNERS = ("median", "none")


def run(arguments: list[str]) -> int:
    """Search for the settings of fit with the lowest validation loss. Each trial is a run of fit in its own folder.

    Accepts all settings of fit (--config, --data.text, …; --help-all lists them), which hold for all trials. SPACE.yaml
    maps other settings to a list of values, or to {low: A, high: B, log: true, step: C}. A trial's value is the loss over
    the whole validation split at its end. The same command continues a study that was stopped, and several processes
    may work on one study.
    """
    options, fit_arguments = split_arguments(_parser(), arguments)
    if {"--print_config", "--help-all"} & {*fit_arguments}:
        from gpt_lightning.cli.fit import fit

        return fit(fit_arguments)
    _check_options(options, fit_arguments)
    from gpt_lightning.cli.training_cli import TrainingCLI

    cli = TrainingCLI("fit", fit_arguments, run.__doc__)
    folder = _study_folder(options, cli)
    storage = _storage(options.storage, folder)
    if options.show:
        from gpt_lightning.tuning.study import TuneStudy

        with storage.errors():
            study = TuneStudy.load(storage, folder)
            trials = study.results()
            figures = _draw(study, trials)
        _print(study, trials, as_json=options.json, all_trials=True)
        for figure in figures:
            logger.info(f"{figure}: written")
        return 0
    with storage.errors():
        study, limit = _open(options, cli, storage, folder)
        _work(study, limit, prunes=options.pruner == "median")
        trials = study.results()
    _print(study, trials, as_json=options.json, all_trials=False)
    return 0 if any(trial.value is not None for trial in trials) else 1


def _check_options(options: argparse.Namespace, fit_arguments: list[str]) -> None:
    from gpt_lightning.tuning import SAMPLERS

    if values_of("--run", fit_arguments):
        raise ValueError("run: tune names the runs itself; leave it out, or give --study NAME")
    for name, value, choices in [
        ("sampler", options.sampler, SAMPLERS),
        ("pruner", options.pruner, PRUNERS),
    ]:
        if value not in choices:
            raise ValueError(f"{name}: {value} is unknown; {suggest(value, choices)}")
    if options.study is None and options.space is None:
        missing = "study" if options.show else "space"
        raise ValueError(f"{missing}: is missing; give --{missing} {missing.upper()}")
    if options.show:
        return
    if options.space is None:
        raise ValueError("space: is missing; give --space SPACE.yaml, or --show")
    if options.trials is None:
        raise ValueError("trials: is missing; give --trials N, or --show")
    if options.trials < 1:
        raise ValueError(f"trials: {options.trials} is too small; give 1 or more")


def _study_folder(options: argparse.Namespace, cli: "TrainingCLI") -> Path:
    """``checkpoints/STUDY`` where the runs of ``fit`` are, too."""
    from gpt_lightning.training.config import RunConfig

    name = options.study or Path(options.space).stem
    root = cli.config.trainer.default_root_dir
    try:
        folder = RunConfig(run=name, trainer={"default_root_dir": root}).folder
        RunConfig(run=f"{name}/trial")
    except ValueError as error:
        cause = str(error).removeprefix("run: ").replace(f"{name}/trial", name)
        raise ValueError(f"study: {cause}") from error
    return folder


def _storage(url: str | None, folder: Path) -> "StudyStorage":
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            f"tune: needs the package {error.name}; pip install 'gpt-lightning[tune]'"
        ) from error
    from gpt_lightning.tuning.storage import StudyStorage, sqlite_url

    return StudyStorage(url or sqlite_url(folder / "study.db"))


def _open(
    options: argparse.Namespace, cli: "TrainingCLI", storage: "StudyStorage", folder: Path
) -> tuple["TuneStudy", int]:
    """The study, and the number of its trials: not more than the space has combinations."""
    from gpt_lightning.tuning.study import StudyConfig, TuneStudy
    from gpt_lightning.tuning.worker import SETTINGS_FILE

    _check_config(cli)
    space = _read_space(options.space, cli)
    if options.sampler == "grid" and space.size is None:
        name = next(name for name, domain in space.domains.items() if domain.size is None)
        raise ValueError(f"space: {name}: has no grid; give a list or a step, or another --sampler")
    limit: int = options.trials
    if space.size is not None and limit > space.size:
        logger.info(f"{options.space}: {space.size:,} combinations, so there are no more trials")
        limit = space.size
    settings = cli.given_settings()
    settings.pop("run", None)
    config = StudyConfig(
        space=space,
        settings=settings,
        sampler=options.sampler,
        seed=cli.config.seed_everything,
        allow_import=cli.config.allow_import or [],
    )
    study = TuneStudy.create_or_continue(storage, folder, config)
    text = _yaml(settings)
    write_text(folder / SETTINGS_FILE, text, concurrent=True)
    size = "" if space.size is None else f" of {space.size:,}"
    logger.info(f"{folder}: {limit:,}{size} trials, sampler {options.sampler}, {storage.shown}")
    return study, limit


def _yaml(settings: dict[str, Any]) -> str:
    import yaml

    header = (
        "# Settings of all trials, written by tune. A trial adds its own on the command line.\n"
    )
    return header + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _check_config(cli: "TrainingCLI") -> None:
    """Refuse settings with which no trial could be resumed or measured."""
    trainer = cli.config.trainer
    if cli.config.ckpt_path is not None:
        raise ValueError("ckpt_path: tune resumes the runs itself; leave it out")
    if trainer.fast_dev_run:
        raise ValueError("trainer.fast_dev_run: a trial needs its checkpoint; leave it out")
    if trainer.enable_checkpointing is False:
        raise ValueError("trainer.enable_checkpointing: a trial needs its checkpoint; leave it out")


def _read_space(name: str, cli: "TrainingCLI") -> "Space":
    """The space in a YAML file, each value of which ``fit`` accepts.

    Raises:
        ValueError, OSError: It names no setting, or a value is not one of the setting's; the message is one line.
    """
    from gpt_lightning.cli.parsing import check_config_file, parse, setting_types
    from gpt_lightning.cli.yaml_input import load_checked
    from gpt_lightning.tuning.space import Choices, read_space
    from gpt_lightning.tuning.worker import as_argument

    path = find_space(name)
    check_config_file(path, "space")
    content = load_checked(decode_text(Path(os.path.expanduser(path)).read_bytes()), name)
    types = setting_types(cli.parser)
    for setting in content:
        if reason := _NOT_IN_SPACE.get(setting):
            raise ValueError(f"space: {setting}: {reason}; leave it out")
        if setting not in types:
            near = nearest_setting(str(setting), types)
            remedy = f"did you mean {near}?" if near else "see gpt_lightning fit --help-all"
            raise ValueError(f"space: {setting}: is not a setting; {remedy}")
    space = read_space(content, lambda setting: int in (types[setting], *get_args(types[setting])))
    for setting, domain in space.domains.items():
        ends = domain.values if isinstance(domain, Choices) else (domain.low, domain.high)
        for value in ends:
            try:
                parse(cli.parser, [*cli.arguments, f"--{setting}={as_argument(value)}"])
            except ValueError as error:
                raise ValueError(f"space: {error}") from error
    return space


def _work(study: "TuneStudy", limit: int, *, prunes: bool) -> None:
    from gpt_lightning.tuning.worker import work

    with terminated_by_exit(), progress_to("trials", limit) as show:

        def show_progress() -> None:
            trials = study.results()
            best = best_of(trials)
            text = (
                "" if best is None else f", best val_loss {best.value:.4f} of trial {best.number}"
            )
            show(sum(trial.state != "RUNNING" for trial in trials), text)

        show_progress()
        try:
            work(study, limit, show_progress, prunes=prunes)
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"{study.folder}: the same command continues it") from error


def best_of(trials: "list[TrialResult]") -> "TrialResult | None":
    """The complete trial with the lowest loss; of equal ones the first."""
    complete = [trial for trial in trials if trial.value is not None]
    return min(complete, key=lambda trial: trial.value or 0.0, default=None)


def _command(study: "TuneStudy", trial: "TrialResult") -> str:
    """The command line that trains a trial's model again, as a run of its own."""
    from gpt_lightning.tuning.worker import fit_arguments

    arguments = fit_arguments(
        study.folder, trial.params, f"{study.folder.name}-best", study.config.allow_import
    )
    words = ["python", "-m", "gpt_lightning", "fit", *arguments]
    if trial.threads is not None and os.environ.get("OMP_NUM_THREADS") != str(trial.threads):
        words = ["env", f"OMP_NUM_THREADS={trial.threads}", *words]
    return shlex.join(words)


def _print(
    study: "TuneStudy", trials: "list[TrialResult]", *, as_json: bool, all_trials: bool
) -> None:
    best = best_of(trials)
    command = None if best is None else _command(study, best)
    if as_json:
        rows = [{**asdict(trial), "folder": trial.folder.as_posix()} for trial in trials]
        chosen = next((row for row in rows if best and row["number"] == best.number), None)
        answer = {
            "study": study.folder.name,
            "trials": rows,
            "best": chosen and {**chosen, "command": command},
        }
        print(json.dumps(answer))
        return
    if all_trials and trials:
        with_errors = any(trial.error for trial in trials)
        rows_of_table = [_row(study, trial, with_errors) for trial in trials]
        print_table(f"study {study.folder.name}", rows_of_table, texts=["error"])
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state.lower()}" for state in dict.fromkeys(states))
    print(f"trials: {counts or 'none'}")
    if best is not None:
        print(f"best: trial {best.number}, val_loss {best.value:.6f}, {best.folder}")
        print(printable(f"train it again: {command}"))


def _row(study: "TuneStudy", trial: "TrialResult", with_errors: bool) -> dict[str, str]:
    values = {
        name: f"{value:.6g}" if isinstance(value, float) else str(value)
        for name in study.config.space.domains
        for value in [trial.params.get(name, "")]
    }
    loss = "" if trial.value is None else f"{trial.value:.4f}"
    row = {"trial": str(trial.number), "state": trial.state.lower(), "val_loss": loss, **values}
    return {**row, "error": trial.error or ""} if with_errors else row


def _draw(study: "TuneStudy", trials: "list[TrialResult]") -> list[Path]:
    """Draw the figures into the study's folder; those for which there are not enough trials are left out."""
    from gpt_lightning.tuning import figures

    if best_of(trials) is None:
        return []
    drawn = {
        "parallel.png": figures.parallel_figure(study.config.space, trials),
        "losses.png": figures.losses_figure(trials),
    }
    if importances := study.importances():
        drawn["importance.png"] = figures.importance_figure(importances)
    study.folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(study.folder / name)
    return [study.folder / name for name in drawn]


def _parser() -> argparse.ArgumentParser:
    parser = parser_beside_fit("tune", run.__doc__)
    add = parser.add_argument
    add("--space", metavar="SPACE.yaml", help="YAML file with the values of each setting.")
    add(
        "--trials",
        type=int,
        help="Number of trials of the whole study, with those that are finished.",
    )
    add(
        "--study",
        help="Name of the study, whose folder is checkpoints/STUDY; default: that of the space file.",
    )
    add(
        "--sampler",
        default="tpe",
        help="tpe = learn from the trials so far; random; grid = combinations of lists and steps, in random order; "
        "default: %(default)s.",
    )
    add(
        "--pruner",
        default="median",
        help="median = stop a trial whose loss is above the median of the others at the same part of the run; none; "
        "default: %(default)s.",
    )
    add(
        "--storage",
        metavar="URL",
        help="Database, such as postgresql://USER@HOST/NAME; default: checkpoints/STUDY/study.db.",
    )
    add(
        "--show",
        action="store_true",
        help="Print all trials and draw figures into the study's folder; nothing runs.",
    )
    add("--json", action="store_true", help="Print one JSON object and nothing else.")
    return parser
