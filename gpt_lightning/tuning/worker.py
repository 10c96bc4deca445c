"""Work of one process on a study: each trial is a child process ``fit``, whose evaluations decide about pruning."""

import csv
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from gpt_lightning.tuning.space import Params
from gpt_lightning.tuning.study import ClaimedTrial, TuneStudy

logger = logging.getLogger(__name__)

SETTINGS_FILE = "fit.yaml"  # settings of all trials, in the study's folder
LOG_FILE = "fit.log"  # output of a trial's processes, in its folder
COMMAND = (sys.executable, "-m", "gpt_lightning")
POLL_SECONDS = 0.5
MAX_ERROR_CHARACTERS = 300
DEFAULT_MAX_EPOCHS = 1000  # Lightning's, if nothing else ends a run


def work(
    study: TuneStudy, limit: int, on_finished: Callable[[], None], *, prunes: bool = True
) -> None:
    """Run trials until ``limit`` trials of the study are finished, by this or other processes.

    Args:
        on_finished: Called after each trial of this process, and while others are waited for.
    """
    is_waiting = False
    while True:
        with study.claimed(limit, prunes=prunes) as trial:
            if trial is not None:
                is_waiting = False
                _run(study, trial)
                on_finished()
                continue
        if not study.held_by_others:
            break
        if not is_waiting:
            is_waiting = True
            logger.info(f"waiting for {study.held_by_others} trials of other processes")
        on_finished()
        time.sleep(4 * POLL_SECONDS)
    if study.elsewhere:
        numbers = ", ".join(map(str, study.elsewhere))
        logger.warning(
            f"trial {numbers}: started in another folder or on another machine; the same command there resumes it"
        )


def fit_arguments(
    study_folder: Path, params: Params, run: str, allow_import: Sequence[str] = ()
) -> list[str]:
    """Arguments of ``fit`` that train a model with the settings of a trial."""
    return [
        f"--config={(study_folder / SETTINGS_FILE).as_posix()}",
        *(f"--allow_import={package}" for package in allow_import),
        *(f"--{name}={as_argument(value)}" for name, value in params.items()),
        f"--run={run}",
    ]


def as_argument(value: Any) -> str:
    """A value of a setting as the command line has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _run(study: TuneStudy, trial: ClaimedTrial) -> None:
    """Train a trial to its end, or until it is pruned; save its state and value in the study.

    An error of the child process is the trial's; any other exception stops the child process, which saves its
    checkpoint, and leaves the trial to be resumed.
    """
    name = f"trial {trial.number}"
    trial.stop_orphan()
    trial.folder.mkdir(parents=True, exist_ok=True)
    run = f"{study.folder.name}/{trial.folder.name}"
    arguments = fit_arguments(study.folder, trial.params, run, study.config.allow_import)
    settings = ", ".join(f"{setting} {as_argument(v)}" for setting, v in trial.params.items())
    logger.info(f"{name}: {settings}")
    evaluations = Evaluations(trial.folder)
    is_pruned = False
    with (trial.folder / LOG_FILE).open("ab") as log:
        start = log.tell()
        with _child(["fit", *arguments, "--ckpt_path=auto"], trial.threads, log, log) as child:
            trial.record_process(child.pid)
            while _wait(child) is None:
                if not is_pruned and _report_new(trial, evaluations):
                    is_pruned = True
                    _stop(child)
        _report_new(trial, evaluations)
        if child.returncode == 0:
            loss, error = _validate(arguments, trial.threads, log)
        else:
            loss, error = math.nan, _error_of(child.returncode, trial.folder / LOG_FILE, start)
    if is_pruned and child.returncode != 0:
        trial.prune()
        logger.info(f"{name}: pruned")
    elif error is not None:
        trial.fail(error)
        logger.warning(f"{name}: failed ({error})")
    else:
        trial.complete(loss)
        logger.info(f"{name}: val_loss {loss:.4f}")


def _report_new(trial: ClaimedTrial, evaluations: "Evaluations") -> bool:
    """Report the new evaluations; returns whether the trial is to be pruned."""
    is_bad = False
    for percent, loss in evaluations.new():
        if percent not in trial.reported:
            is_bad |= trial.report(percent, loss)
    return is_bad


def _validate(
    arguments: list[str], threads: int | None, log: IO[bytes]
) -> tuple[float, str | None]:
    """The loss over all tokens of the validation split, and the error if there is none."""
    verb = ["validate", *arguments, "--ckpt_path=last", "--val_only", "--json"]
    start = log.seek(0, os.SEEK_END)
    with _child(verb, threads, subprocess.PIPE, log) as child:
        assert child.stdout is not None
        output = child.stdout.read()
        child.wait()
    if child.returncode != 0:
        return math.nan, _error_of(child.returncode, Path(log.name), start)
    loss = float(json.loads(output)["val_loss"])
    return loss, None if math.isfinite(loss) else f"val_loss: {loss} is not a finite number"


@contextmanager
def _child(
    arguments: Sequence[str], threads: int | None, stdout: Any, stderr: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A command of this package as a child process, which is stopped if the block raises an exception."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        # a Ctrl-C in the terminal reaches this process only, which stops the child once
        process_group=None if os.name == "nt" else 0,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )
    try:
        yield child
    finally:
        if child.poll() is None:
            _stop(child)
        if child.stdout is not None:
            child.stdout.close()


def _wait(child: subprocess.Popen[bytes]) -> int | None:
    try:
        return child.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Stop ``fit`` by a signal, and wait until its checkpoint is saved. A second Ctrl-C kills it."""
    child.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))
    try:
        child.wait()
    except BaseException:
        child.kill()
        child.wait()
        raise


def _error_of(code: int, log: Path, start: int) -> str:
    """Why a child process failed, from what it wrote after the position ``start``; one line."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"ended by {name}" + (", perhaps out of memory" if name == "SIGKILL" else "")
    text = log.read_bytes()[start:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    prefix = "gpt_lightning: error: "
    errors = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
    line = (errors or lines or [f"exit code {code}"])[-1]
    return line[:MAX_ERROR_CHARACTERS]


class Evaluations:
    """Validation losses in the ``metrics.csv`` of a run, at each tenth of it.

    Trials of different lengths and batch sizes are compared at the same part of their runs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[int] = set()
        self._size = -1
        self._limits: dict[str, float] | None = None

    def new(self) -> Iterator[tuple[int, float]]:
        """Percent of the run (10, 20, …, 90) and loss of each evaluation that was not returned before."""
        path = self._folder / "metrics.csv"
        if not path.is_file() or path.stat().st_size == self._size:
            return
        self._size = path.stat().st_size
        if self._limits is None:
            self._limits = _limits_of(self._folder / "config.yaml")
        text = path.read_text(encoding="utf-8", errors="replace")
        for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
            try:
                share = _share_of_run(row, self._limits)
                loss = float(row["val_loss"])
            except (KeyError, TypeError, ValueError):  # a row of training, or half a row
                continue
            percent = int(10 * share) * 10
            if 0 < percent < 100 and percent not in self._seen and math.isfinite(loss):
                self._seen.add(percent)
                yield percent, loss


def _limits_of(config: Path) -> dict[str, float]:
    """Column of ``metrics.csv`` → its value at the end of the run, for each limit that the settings have."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    trainer = settings["trainer"]
    given = {
        "seen_epochs": trainer.get("max_epochs"),
        "step": trainer.get("max_steps"),
        "tokens_seen": settings.get("max_tokens"),
    }
    limits = {column: limit for column, limit in given.items() if limit not in (None, -1)}
    return limits or {"seen_epochs": DEFAULT_MAX_EPOCHS}


def _share_of_run(row: Mapping[str, str], limits: Mapping[str, float]) -> float:
    """Share of the run that is done: the limit that is reached first ends it."""
    return max(float(row[column]) / limit for column, limit in limits.items())
