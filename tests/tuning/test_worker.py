"""Trials as child processes: what each end means, resume after a kill, several processes. The children are fakes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import fake_tune
from fake_tune import FOLDER, SPACE, fake_study, work
from gpt_lightning.tuning import worker
from gpt_lightning.tuning.study import TuneStudy
from helpers import ENVIRONMENT

SLOW_SPACE: dict[str, Any] = {**SPACE, "fake.seconds": [0.1]}


def states(study: TuneStudy) -> list[str]:
    return [trial.state for trial in study.results()]


def starts(number: int) -> list[str]:
    """First step of each start of a trial's run."""
    lines = (FOLDER / f"trial-{number:04d}" / "starts").read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines]


def start_tune(**settings: Any) -> subprocess.Popen[str]:
    """``fake_tune.py`` in another process."""
    return subprocess.Popen(
        [sys.executable, fake_tune.__file__, json.dumps(settings)],
        env=ENVIRONMENT, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def work_and_interrupt(study: TuneStudy, limit: int) -> None:
    """Ctrl-C when the first trial has a checkpoint."""

    def interrupt() -> None:
        wait_until((FOLDER / "trial-0000" / "last.ckpt").exists)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        work(study, limit)
    thread.join()


def test_value_is_the_loss_at_the_end() -> None:
    study = fake_study()
    work(study, 4)
    trials = study.results()
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert len({trial.params["model.lr"] for trial in trials}) == 4
    for trial in trials:
        assert trial.state == "COMPLETE"
        assert trial.value == (trial.params["model.lr"] - 0.5) ** 2 + 1
        assert trial.folder == FOLDER / f"trial-{trial.number:04d}"
        assert (trial.folder / "fit.log").exists()


def test_same_command_again_adds_no_trial() -> None:
    work(fake_study(), 2)
    before = fake_study().results()
    work(fake_study(), 2)
    assert fake_study().results() == before
    work(fake_study(), 3)
    assert len(fake_study().results()) == 3
    assert fake_study().results()[:2] == before


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ("error", "train/loss: is not finite; give less"),
        ("crash", "MemoryError: out of memory on the device"),
        ("killed", "ended by SIGKILL, perhaps out of memory"),
        ("nan", "val_loss: nan is not a finite number"),
    ],
)
def test_failed_trial_is_recorded_and_the_study_continues(end: str, error: str) -> None:
    study = fake_study({"model.lr": [0.5], "fake.end": [end, "done"]})
    work(study, 2)
    by_end = {trial.params["fake.end"]: trial for trial in study.results()}
    assert (by_end[end].state, by_end[end].value, by_end[end].error) == ("FAIL", None, error)
    assert (by_end["done"].state, by_end["done"].value) == ("COMPLETE", 1.0)


def test_command_that_cannot_start_is_the_error_of_the_trial(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = fake_study()
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, str(tmp_path / "nothing.py")))
    work(study, 1)
    (trial,) = study.results()
    assert trial.state == "FAIL"
    assert "nothing.py" in str(trial.error)


@pytest.mark.slow
def test_trial_above_the_median_is_pruned_and_its_process_stopped() -> None:
    """The trial with the rate 9 is worse from its first report on; if it is one of the first five, it is complete."""
    space = {"model.lr": [0.5, 0.49, 0.48, 0.47, 0.46, 9.0, 9.1], "fake.seconds": [0.06]}
    study = fake_study(space, sampler="grid")
    work(study, 7, prunes=True)
    bad = [trial for trial in study.results() if trial.params["model.lr"] >= 9.0]
    late = [trial for trial in bad if trial.number >= 5]
    assert late, "choose another seed"
    for trial in late:
        assert (trial.state, trial.value) == ("PRUNED", None)
        done = int((trial.folder / "last.ckpt").read_text(encoding="utf-8"))
        assert 2 < done < 10  # stopped by SIGTERM, with a checkpoint
    assert states(study).count("COMPLETE") == 7 - len(late)


def test_without_pruning_all_trials_are_complete() -> None:
    study = fake_study({"model.lr": [0.5, 0.49, 0.48, 0.47, 0.46, 9.0, 9.1]}, sampler="grid")
    work(study, 7)
    assert states(study) == ["COMPLETE"] * 7


def test_interrupted_trial_is_resumed_from_its_checkpoint() -> None:
    study = fake_study(SLOW_SPACE)
    before = set(psutil.Process().children())
    work_and_interrupt(study, 1)
    assert states(study) == ["RUNNING"]
    assert not {*psutil.Process().children()} - before
    work(fake_study(SLOW_SPACE), 1)
    assert states(study) == ["COMPLETE"]
    assert len(starts(0)) == 2
    assert 0 < int(starts(0)[1]) < 10


def test_killed_process_is_replaced_and_its_child_stopped() -> None:
    """The child of a killed tune still runs; two would train the same run."""
    tune = start_tune(space=SLOW_SPACE, limit=1)
    wait_until((FOLDER / "trial-0000" / "last.ckpt").exists)
    (child,) = psutil.Process(tune.pid).children()
    tune.kill()
    tune.communicate()
    assert child.is_running()
    study = fake_study(SLOW_SPACE)
    assert states(study) == ["RUNNING"]
    work(study, 1)
    assert not child.is_running()
    assert states(study) == ["COMPLETE"]
    assert int(starts(0)[1]) > 0


def finish_in_two_processes(url: str | None, sampler: str, space: dict[str, Any]) -> TuneStudy:
    """12 trials in two processes that start at the same time; one is killed and not started again."""
    settings = {"space": space, "url": url, "sampler": sampler, "limit": 12}
    killed, other = start_tune(**settings), start_tune(**settings)
    wait_until(lambda: len(list(FOLDER.glob("trial-*"))) >= 4)
    killed.kill()
    killed.communicate()
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    return fake_study(space, url, sampler)  # type: ignore[arg-type]


def assert_12_different(study: TuneStudy) -> None:
    trials = study.results()
    assert [trial.number for trial in trials] == [*range(12)]
    assert {trial.state for trial in trials} == {"COMPLETE"}
    assert len({trial.folder for trial in trials}) == 12
    assert len({str(trial.params) for trial in trials}) == 12
    assert sorted(path.name for path in FOLDER.glob("trial-*")) == [
        f"trial-{number:04d}" for number in range(12)
    ]


GRID_OF_12 = {"model.lr": [0.1, 0.2, 0.3, 0.4], "fake.seconds": [0.04, 0.05, 0.06]}


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_two_processes_share_a_study_on_sqlite_and_one_is_killed(sampler: str) -> None:
    assert_12_different(finish_in_two_processes(None, sampler, GRID_OF_12))


@pytest.mark.slow
def test_two_processes_share_a_study_on_postgresql_and_one_is_killed(postgresql: str) -> None:
    assert_12_different(finish_in_two_processes(postgresql, "tpe", GRID_OF_12))


def test_trial_of_another_machine_is_left_to_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The study of one database in two folders that do not see each other."""
    other = tmp_path / "other"
    other.mkdir()
    study = fake_study(SLOW_SPACE, f"sqlite:///{tmp_path / 'shared.db'}")
    work_and_interrupt(study, 2)
    os.chdir(other)
    work(fake_study(SLOW_SPACE, f"sqlite:///{tmp_path / 'shared.db'}"), 2)
    assert states(study) == ["RUNNING", "COMPLETE"]
    assert "trial 0: started in another folder or on another machine" in caplog.text
    os.chdir(tmp_path)
    work(study, 2)
    assert states(study) == ["COMPLETE", "COMPLETE"]
    assert len(starts(0)) == 2


@pytest.mark.slow
def test_processes_on_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    study = fake_study(SLOW_SPACE)
    with study.claimed(3) as alone:
        assert alone is not None
        assert alone.threads is None  # as many as without tune
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        alone.record_process(child.pid)
        with study.claimed(3) as second:
            assert second is not None
            assert second.threads == 4
            with study.claimed(3) as none_left:
                assert none_left is not None
                monkeypatch.setenv("OMP_NUM_THREADS", "3")
    work(study, 4)
    assert child.poll() is not None  # it was stopped
    assert [trial.threads for trial in study.results()] == [None, 4, 4, 3]


def test_lock_of_a_study_is_held_while_a_trial_runs() -> None:
    study, other = fake_study(), fake_study()
    with study.claimed(1) as trial:
        assert trial is not None
        with other.claimed(1) as nothing:
            assert nothing is None
        assert other.held_by_others == 1
    with other.claimed(1) as left:
        assert left is not None
        assert left.number == trial.number
        assert left.params == trial.params
