"""Study in a database: its trials, which process works on which, and what each of them gave.

A trial is first a ticket: a trial of Optuna in the state WAITING, whose number is unique in the database. A process
takes the trial's lock file, and then changes WAITING to RUNNING. It holds the lock while it works on the trial. A trial
that is RUNNING and whose lock is free was left by a process that ended, so it is resumed. Tickets of numbers that no
process asks for stay WAITING and are not shown.
"""

import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import psutil
from filelock import Timeout
from optuna.pruners import BasePruner, MedianPruner, NopPruner
from optuna.trial import FrozenTrial, Trial, TrialState

from gpt_lightning.storage.lock import lock_file
from gpt_lightning.tuning.proposal import Sampler, as_text, propose
from gpt_lightning.tuning.space import Params, Space, read_space
from gpt_lightning.tuning.storage import StudyStorage

logger = logging.getLogger(__name__)

_RECORD = "gpt_lightning"  # attribute of the study: its StudyConfig
# attributes of a trial
_PROPOSAL = "proposal"  # JSON of its settings
_PROCESS = "process"  # its child process: host, number, start time
_THREADS = "threads"  # OMP_NUM_THREADS of that process; null if it is not set
_ERROR = "error"

MAX_DRAWS = 10  # of settings that another process chose at the same time
SECONDS_TO_PROPOSE = 60.0  # from the claim of a trial to its settings; then its process has ended
# pruning compares the losses at each tenth of a run, after so many complete trials and percents of the run
PRUNE_AFTER_TRIALS = 5
PRUNE_AFTER_PERCENT = 20


@dataclass(frozen=True)
class StudyConfig:
    """What all trials of a study have in common; the database records it.

    Attributes:
        space: Values of the settings that are searched.
        settings: The other settings of ``fit`` that the user gives.
        sampler: How the settings of the next trial are chosen.
        seed: Seed of the sampler.
        allow_import: Packages whose classes the settings may name.
    """

    space: Space
    settings: Mapping[str, Any]
    sampler: Sampler
    seed: int
    allow_import: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        plain = {**vars(self), "space": self.space.to_json()}
        return dict(json.loads(json.dumps(plain)))  # as the database returns it

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "StudyConfig":
        space = read_space(record["space"], takes_int=lambda name: True)
        return cls(**{**record, "space": space})


@dataclass(frozen=True)
class TrialResult:
    """Trial as ``tune --show`` prints it.

    Attributes:
        state: ``RUNNING``, ``COMPLETE``, ``PRUNED`` or ``FAIL``.
        value: Validation loss; ``None`` unless the trial is complete.
        params: Setting → value; empty until they are chosen.
        folder: Folder of its run.
        error: Why it failed, in one line.
        threads: ``OMP_NUM_THREADS`` of its process; ``None``: it was not set.
    """

    number: int
    state: str
    value: float | None
    params: Params
    folder: Path
    error: str | None = None
    threads: int | None = None


class TuneStudy:
    """Study in a database, and its folder on this machine.

    Attributes:
        folder: ``checkpoints/STUDY``.
        held_by_others: Trials that other processes worked on when :meth:`claimed` last looked.
        elsewhere: Numbers of the trials that were started in another folder, for example on another machine.
    """

    def __init__(self, storage: StudyStorage, folder: Path, config: StudyConfig) -> None:
        self.folder = folder
        self.config = config
        self.held_by_others = 0
        self.elsewhere: list[int] = []
        self._database = storage
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._storage = storage.connect()

    @classmethod
    def load(cls, storage: StudyStorage, folder: Path) -> "TuneStudy":
        """Open a study that was saved before.

        Raises:
            ValueError: There is none, or the database cannot be used; the message is one line.
        """
        recorded = _recorded(storage, folder.name)
        if recorded is None:
            raise ValueError(
                f"study: {storage.shown} has no study {folder.name}; give --study NAME, or start one with --trials N"
            )
        return cls(storage, folder, StudyConfig.from_json(recorded))

    @classmethod
    def create_or_continue(
        cls, storage: StudyStorage, folder: Path, config: StudyConfig
    ) -> "TuneStudy":
        """Open a study; it is created if it is missing.

        Raises:
            ValueError: The study has another space or other settings, its folder holds something else, or the
                database cannot be used; the message is one line, and nothing was written.
        """
        recorded = _recorded(storage, folder.name)
        obstacle = None if recorded else _other_content(folder)
        if obstacle is not None:  # or a process that has just started the study has made a trial
            recorded = _recorded(storage, folder.name)
            if recorded is None:
                raise ValueError(obstacle)
        if recorded is not None:
            _check_same(folder.name, recorded, config.to_json())
        folder.mkdir(parents=True, exist_ok=True)
        study = cls(storage, folder, config)
        with storage.errors():
            saved = optuna.create_study(
                storage=study._storage, study_name=folder.name, load_if_exists=True
            )
            recorded = saved.user_attrs.get(_RECORD)
            if recorded is None:
                saved.set_user_attr(_RECORD, config.to_json())
            else:
                _check_same(folder.name, recorded, config.to_json())
        return study

    def folder_of(self, number: int) -> Path:
        """Folder of a trial's run."""
        return self.folder / f"trial-{number:04d}"

    def results(self) -> list[TrialResult]:
        """All trials that were started, by their numbers."""
        return [
            TrialResult(
                number=trial.number,
                state=trial.state.name,
                value=trial.value if trial.state == TrialState.COMPLETE else None,
                params=json.loads(trial.user_attrs.get(_PROPOSAL, "{}")),
                folder=self.folder_of(trial.number),
                error=trial.user_attrs.get(_ERROR),
                threads=trial.user_attrs.get(_THREADS),
            )
            for trial in self._trials()
            if trial.state != TrialState.WAITING
        ]

    def importances(self) -> dict[str, float]:
        """Share of each setting in the differences of the losses (PED-ANOVA); empty with less than two losses."""
        complete = [trial for trial in self._trials() if trial.state == TrialState.COMPLETE]
        if len({trial.value for trial in complete}) < 2:
            return {}
        study = optuna.create_study()  # without attributes and failed trials
        study.add_trials(complete)
        return optuna.importance.get_param_importances(study)

    @contextmanager
    def claimed(self, limit: int, *, prunes: bool = True) -> Iterator["ClaimedTrial | None"]:
        """A trial for this process until the end of the block: one that was left, or the next one.

        Args:
            limit: Number of trials of the whole study.
            prunes: Whether :meth:`ClaimedTrial.report` may ask to stop the trial.

        Yields:
            ``None`` if all are finished, or other processes work on them.
        """
        pruner = (
            MedianPruner(PRUNE_AFTER_TRIALS, n_warmup_steps=PRUNE_AFTER_PERCENT)
            if prunes
            else NopPruner()
        )
        with ExitStack() as lock:
            trial_id = self._claim(limit, lock)
            yield None if trial_id is None else ClaimedTrial(self, trial_id, pruner)

    def _claim(self, limit: int, lock: ExitStack) -> int | None:
        """The id of the claimed trial, whose lock is then in ``lock``."""
        while True:
            trials = self._trials()
            self.held_by_others, self.elsewhere = 0, []
            for trial in trials[:limit]:
                if trial.state.is_finished():
                    continue
                with ExitStack() as attempt:
                    try:
                        attempt.enter_context(lock_file(self._lock_of(trial.number)))
                    except Timeout:
                        self.held_by_others += 1
                        continue
                    trial_id = self._id_of(trial.number)
                    if self._take(trial_id):
                        lock.push(attempt.pop_all())
                        return trial_id
            if len(trials) >= limit:
                return None
            self._study().add_trial(optuna.create_trial(state=TrialState.WAITING))

    def _take(self, trial_id: int) -> bool:
        """Whether a trial, whose lock is held, now belongs to this process."""
        trial = self._storage.get_trial(trial_id)
        folder = self.folder_of(trial.number)
        if trial.state == TrialState.WAITING:
            if folder.exists():
                raise ValueError(_trial_exists(folder))
            return self._storage.set_trial_state_values(trial_id, TrialState.RUNNING)
        if trial.state != TrialState.RUNNING:
            return False
        if not self._was_left_here(trial):
            self.elsewhere.append(trial.number)
            return False
        return True

    def _was_left_here(self, trial: FrozenTrial) -> bool:
        """Whether a running trial without a process belongs to this folder, and not to that of another machine."""
        database = self._database.file
        if database is not None and database.parent.resolve() == self.folder.resolve():
            return True
        if self.folder_of(trial.number).exists():
            return True
        assert trial.datetime_start is not None
        is_old = datetime.now() - trial.datetime_start > timedelta(seconds=SECONDS_TO_PROPOSE)
        return is_old and _PROPOSAL not in trial.user_attrs

    def _lock_of(self, number: int) -> Path:
        # beside SQLite's file, of which the system lets two processes change the same trial
        folder = self.folder if self._database.file is None else self._database.file.parent
        return folder / f".{self.folder.name}-{number}.lock"

    def _trials(self) -> list[FrozenTrial]:
        return self._study().get_trials(deepcopy=False)

    def _study(self, pruner: BasePruner | None = None) -> optuna.Study:
        return optuna.load_study(study_name=self.folder.name, storage=self._storage, pruner=pruner)

    def _id_of(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(self.folder.name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)


class ClaimedTrial:
    """Trial that this process works on.

    Attributes:
        params: Its settings.
        threads: ``OMP_NUM_THREADS`` for its process; ``None``: not set.
    """

    def __init__(self, study: TuneStudy, trial_id: int, pruner: BasePruner) -> None:
        self._study = study
        self._storage = study._storage
        self._id = trial_id
        self._optuna_study = study._study(pruner)
        trial = self._storage.get_trial(trial_id)
        self.number = trial.number
        self.folder = study.folder_of(trial.number)
        self.params = self._chosen_params(trial)
        if _THREADS not in trial.user_attrs:  # a resumed trial keeps them, and so its bits
            self._set(_THREADS, self._threads())
        self.threads: int | None = self._storage.get_trial_user_attrs(trial_id)[_THREADS]
        self._trial = Trial(self._optuna_study, trial_id)
        self.reported = set(trial.intermediate_values)

    def report(self, percent: int, val_loss: float) -> bool:
        """Save the loss at a percentage of the run; returns whether the trial is to be pruned."""
        self.reported.add(percent)
        self._trial.report(val_loss, percent)
        return self._trial.should_prune()

    def complete(self, val_loss: float) -> None:
        self._optuna_study.tell(self.number, val_loss)

    def prune(self) -> None:
        self._optuna_study.tell(self.number, state=TrialState.PRUNED)

    def fail(self, error: str) -> None:
        self._set(_ERROR, error)
        self._optuna_study.tell(self.number, state=TrialState.FAIL)

    def record_process(self, pid: int) -> None:
        """Save which child process trains the trial, so that another ``tune`` can stop it if this one is killed."""
        with suppress(psutil.NoSuchProcess):  # it has ended at once
            started = psutil.Process(pid).create_time()
            self._set(_PROCESS, {"host": socket.gethostname(), "pid": pid, "started": started})

    def stop_orphan(self) -> None:
        """Stop the child process of a ``tune`` that was killed, and wait until its checkpoint is saved."""
        child = _running_child(self._storage.get_trial_user_attrs(self._id).get(_PROCESS))
        if child is not None:
            logger.info(f"trial {self.number}: stopping process {child.pid}, whose tune was killed")
            with suppress(psutil.NoSuchProcess):
                child.terminate()
                child.wait()

    def _chosen_params(self, trial: FrozenTrial) -> Params:
        """The settings of the trial, which are chosen and saved if they are missing.

        Two processes may choose the same settings at the same time. Each saves its choice before it reads those of
        the others, so at least one of them sees the other's, and chooses again.
        """
        config, space = self._study.config, self._study.config.space
        proposal = trial.user_attrs.get(_PROPOSAL, "")
        if not trial.params:
            others, draw = self._others(), 0
            while not proposal or proposal in _proposals(others):
                key = (config.seed, self.number, draw)
                tried = _proposals(others)
                proposal = as_text(propose(space, config.sampler, key, tried, others))
                self._set(_PROPOSAL, proposal)
                others, draw = self._others(), draw + 1
                if draw == MAX_DRAWS:
                    break
        params: Params = json.loads(proposal)
        distributions = space.distributions()
        for name, value in space.to_optuna(params).items():
            if name not in trial.params:
                domain = distributions[name]
                internal = domain.to_internal_repr(value)
                self._storage.set_trial_param(self._id, name, internal, domain)
        return params

    def _others(self) -> list[FrozenTrial]:
        return [trial for trial in self._study._trials() if trial.number != self.number]

    def _threads(self) -> int | None:
        """``OMP_NUM_THREADS`` of the environment, or this process's share of the CPU if others train too."""
        if "OMP_NUM_THREADS" in os.environ:
            with suppress(ValueError):
                return int(os.environ["OMP_NUM_THREADS"])
        others = sum(
            _running_child(trial.user_attrs.get(_PROCESS)) is not None
            for trial in self._others()
            if trial.state == TrialState.RUNNING
        )
        return max(1, (psutil.cpu_count() or 1) // (others + 1)) if others else None

    def _set(self, attribute: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._id, attribute, value)


def _proposals(trials: list[FrozenTrial]) -> set[str]:
    return {trial.user_attrs[_PROPOSAL] for trial in trials if _PROPOSAL in trial.user_attrs}


def _running_child(recorded: Mapping[str, Any] | None) -> psutil.Process | None:
    """The process of a trial, if it runs on this machine."""
    if recorded is None or recorded["host"] != socket.gethostname():
        return None
    try:
        process = psutil.Process(recorded["pid"])
        same = abs(process.create_time() - recorded["started"]) < 1.0
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.Error:
        return None


def _recorded(storage: StudyStorage, name: str) -> dict[str, Any] | None:
    """The record of a study; ``None`` if there is no such study, or it is just being created. Nothing is written."""
    if not storage.has_tables():
        return None
    with storage.errors():
        try:
            study = optuna.load_study(study_name=name, storage=storage.connect())
        except KeyError:
            return None
        recorded: dict[str, Any] | None = study.user_attrs.get(_RECORD)
        if recorded is None and study.get_trials(deepcopy=False):
            raise ValueError(
                f"study: {name} was made by another program; give another --study NAME"
            )
        return recorded


def _other_content(folder: Path) -> str | None:
    """An error line if a folder has a run, or trials of a study that is in another database."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if "config.yaml" in names:
        return f"study: {folder} is the folder of a run; give another --study NAME"
    if trials := [name for name in names if name.startswith("trial-")]:
        return _trial_exists(folder / trials[0])
    return None


def _trial_exists(folder: Path) -> str:
    return f"study: {folder} is there already, from another study; move it, or give another --study NAME"


def _check_same(name: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse a study whose trials had another space, other settings or another sampler."""
    titles = {
        "sampler": "another sampler",
        "space": "another space",
        "settings": "other settings",
        "allow_import": "another --allow_import",
        "seed": "another seed",
    }
    for part, title in titles.items():
        if recorded[part] != given[part]:
            first = _first_difference(recorded[part], given[part])
            raise ValueError(
                f"study: {name} has {title}: {first}; give that, or another --study NAME"
            )


def _first_difference(recorded: Any, given: Any, path: str = "") -> str:
    """``model.lr is 0.001 there and 0.002 here``, for the first key that differs."""
    if isinstance(recorded, dict) and isinstance(given, dict):
        for key in [*recorded, *(key for key in given if key not in recorded)]:
            before, now = recorded.get(key), given.get(key)
            if before != now:
                return _first_difference(before, now, f"{path}.{key}" if path else key)
    return f"{path} is {json.dumps(recorded)} there and {json.dumps(given)} here".lstrip()
