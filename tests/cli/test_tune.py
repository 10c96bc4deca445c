"""``tune``: the real command with real runs of ``fit``, and its errors."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from gpt_lightning.cli.config_files import configs_folder
from gpt_lightning.tuning.proposal import as_text, propose
from gpt_lightning.tuning.space import read_space
from helpers import (
    ENVIRONMENT,
    ROOT,
    SMALL,
    SMALL_QUICKSTART,
    Command,
    assert_refused,
    json_of,
)
from runs import BARE

# without dropout and samples; TensorBoard is on
TINY = (*SMALL_QUICKSTART, *BARE, "--trainer.logger=true", "--data.batch_size=4")
SPACE = "model.lr: {low: 0.001, high: 0.1, log: true}\ntrainer.max_steps: [6, 7]\n"
BOOK_SPACE = configs_folder() / "spaces" / "book-hparam-search.yaml"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    path = tmp_path / "toy.yaml"
    path.write_text(SPACE)
    return path


def run_alone(command: Command, line: str) -> float:
    """The validation loss of the run of a command line, measured by ``validate``."""
    words = shlex.split(line)
    first = words.index("python")  # after env OMP_NUM_THREADS=…
    assert words[first + 1 : first + 3] == ["-m", "gpt_lightning"]
    assert command(*words[first + 3 :]).code == 0
    (name,) = (word.removeprefix("--run=") for word in words if word.startswith("--run="))
    result = json_of(command("validate", f"--init_from=checkpoints/{name}", "--json",
                             "--trainer.accelerator=cpu"))  # fmt: skip
    return float(result["val_loss"])


def hparams_of(folder: Path) -> set[str]:
    """Names on TensorBoard's page of hyperparameters."""
    events = EventAccumulator(str(folder))
    events.Reload()
    content = events.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
    return set(metadata.parse_session_start_info_plugin_data(content).hparams)


@pytest.mark.slow
def test_best_trial_alone_has_its_loss(command: Command, space: Path, tmp_path: Path) -> None:
    result = command("tune", *TINY, f"--space={space}", "--trials=1", "--json")
    answer = json_of(result)
    (trial,) = answer["trials"]
    assert trial.keys() >= {"number", "state", "value", "params", "folder"}
    assert (trial["number"], trial["state"]) == (0, "COMPLETE")
    assert (answer["study"], trial["folder"]) == ("toy", "checkpoints/toy/trial-0000")
    assert trial["params"].keys() == {"model.lr", "trainer.max_steps"}
    assert "trial 0: model.lr " in result.err
    assert answer["best"].items() >= trial.items()
    config = yaml.safe_load((tmp_path / trial["folder"] / "config.yaml").read_text())
    assert config["model"]["lr"] == trial["params"]["model.lr"]
    assert config["trainer"]["max_steps"] == trial["params"]["trainer.max_steps"]
    assert config["run"] == "toy/trial-0000"
    assert {"lr", "data/batch_size", "trainer/max_steps"} <= hparams_of(tmp_path / trial["folder"])
    assert run_alone(command, answer["best"]["command"]) == pytest.approx(trial["value"], abs=1e-6)

    before = (tmp_path / trial["folder"] / "last.ckpt").read_bytes()
    again = command("tune", *TINY, f"--space={space}", "--trials=1")  # adds no trial
    assert again.code == 0
    assert f"best: trial 0, val_loss {trial['value']:.6f}, checkpoints/toy/trial-0000" in again.out
    assert answer["best"]["command"] in again.out
    assert (tmp_path / trial["folder"] / "last.ckpt").read_bytes() == before

    shown = command("tune", "--show", "--study=toy", "--json")
    assert json_of(shown) == answer
    shown = command("tune", "--show", f"--space={space}")
    assert "trials: 1 complete" in shown.out
    for name in ("parallel.png", "losses.png"):
        assert f"checkpoints/toy/{name}: written" in shown.err
        assert (tmp_path / "checkpoints" / "toy" / name).stat().st_size > 10_000

    space.write_text(SPACE.replace("0.1,", "0.2,"))
    assert_refused(
        command("tune", *TINY, f"--space={space}", "--trials=2"),
        "study: toy has another space: model.lr.high is 0.1 there and 0.2 here; give that, or",
    )
    space.write_text(SPACE)
    assert_refused(
        command("tune", *TINY, "--model.weight_decay=0.2", f"--space={space}", "--trials=2"),
        "study: toy has other settings: model.weight_decay is null there and 0.2 here",
    )
    assert_refused(
        command("fit", *TINY, "--run=toy/trial-0000"), "checkpoints/toy/trial-0000 holds a run"
    )


def test_book_grid_has_12960_settings() -> None:
    space = read_space(yaml.safe_load(BOOK_SPACE.read_text()), lambda name: True)
    assert space.size == 12_960
    tried = {as_text(propose(space, "grid", (123, n, 0), set(), [])) for n in range(12_960)}
    assert len(tried) == 12_960


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("modle.lr: [1]", "space: modle.lr: is not a setting; did you mean model.lr?"),
        ("lr: [1]", "space: lr: is not a setting; did you mean model.lr?"),
        ("model: [1]", "space: model: is not a setting"),
        ("run: [a, b]", "space: run: tune names the runs itself; leave it out"),
        ("ckpt_path: [last]", "space: ckpt_path: tune resumes the runs itself"),
        ("allow_import: [os]", "space: allow_import: works on the command line only"),
        ("trainer.default_root_dir: [a]", "space: trainer.default_root_dir: is the same for all"),
        ("model.lr: []", "space: model.lr: has no choices"),
        ("model.lr: [0.1, fast]", "space: model.lr: fast is not a number"),
        ("model.lr: {low: 0, high: 1, log: true}", "space: model.lr.low: 0.0 has no logarithm"),
        ("data.batch_size: {low: 1.5, high: 4}", "space: data.batch_size: 1.5 is not a whole"),
        ("trainer.precision: [bf17]", "space: trainer.precision: bf17 is unknown"),
        ("trainer.callbacks: [[{class_path: os.Popen}]]", "os.Popen: is not imported from a"),
        ("model.lr: [1]\nmodel: {lr: [2]}", "model.lr is given twice"),
        ("- model.lr", "holds no settings"),
        ("model.lr: [", "is not YAML"),
    ],
)
def test_space_is_refused(command: Command, tmp_path: Path, content: str, cause: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    assert_refused(command("tune", *TINY, f"--space={path}", "--trials=2"), cause)
    assert [each.name for each in tmp_path.iterdir()] == ["space.yaml"]


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--trials=0"], "trials: 0 is too small; give 1 or more"),
        (["--trials=some"], "trials: some is not a whole number"),
        ([], "trials: is missing; give --trials N"),
        (["--trials=2", "--sampler=gird"], "sampler: gird is unknown; did you mean grid?"),
        (["--trials=2", "--sampler=grid"], "space: model.lr: has no grid; give a list or a step"),
        (["--trials=2", "--pruner=off"], "pruner: off is unknown"),
        (["--trials=2", "--study=a/b"], "study: a/b is not a folder's name"),
        (["--trials=2", "--study=.."], "study: .. is not a folder's name"),
        (["--trials=2", "--run=mine"], "run: tune names the runs itself; leave it out"),
        (["--trials=2", "--ckpt_path=last"], "ckpt_path: tune resumes the runs itself"),
        (["--trials=2", "--trainer.fast_dev_run=true"], "trainer.fast_dev_run: a trial needs"),
        (["--trials=2", "--model.lrr=1"], "model.lrr: is not a setting; did you mean model.lr?"),
        (["--trials=2", "--storage=nowhere"], "storage: is not a URL of a database"),
        (["--trials=2", "--storage=postgresql://u:s3cret-word@127.0.0.1:9/db"],
         "storage: postgresql://127.0.0.1:9/db cannot be used"),
        (["--trials=2", "--space=nowhere.yaml"], "space: nowhere.yaml does not exist"),
        (["--show"], "has no study toy; give --study NAME"),
        (["--show", "--study=other"], "has no study other; give --study NAME"),
    ],
)  # fmt: skip
def test_option_is_refused(
    command: Command, tmp_path: Path, space: Path, arguments: list[str], cause: str
) -> None:
    result = command("tune", *TINY, f"--space={space}", *arguments)
    assert_refused(result, cause)
    assert "s3cret-word" not in result.err
    assert [each.name for each in tmp_path.iterdir()] == ["toy.yaml"]


def test_space_and_study_are_needed(command: Command) -> None:
    assert_refused(command("tune", *TINY, "--trials=2"), "space: is missing; give --space SPACE")
    assert_refused(command("tune", "--show"), "study: is missing; give --study STUDY")


def test_missing_package_is_named(
    command: Command, space: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert_refused(
        command("tune", *TINY, f"--space={space}", "--trials=2"),
        "tune: needs the package optuna; pip install 'gpt-lightning[tune]'",
    )


@pytest.mark.slow
def test_study_whose_trials_all_fail_exits_with_1(command: Command, tmp_path: Path) -> None:
    """A combination that fit refuses is the trial's error."""
    path = tmp_path / "space.yaml"
    path.write_text("model.config.n_heads: [3]")
    result = command("tune", *TINY, f"--space={path}", "--trials=5")
    assert result.code == 1
    assert "space.yaml: 1 combinations, so there are no more trials" in result.err
    error = "emb_dim: 4 is not divisible by n_heads 3; change one of them"
    assert f"gpt_lightning: trial 0: failed ({error})" in result.err
    (trial,) = json_of(command("tune", "--show", "--study=space", "--json"))["trials"]
    assert (trial["state"], trial["value"], trial["error"]) == ("FAIL", None, error)
    assert "trials: 1 fail" in result.out
    assert error in command("tune", "--show", "--study=space").out


def start_tune(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", "tune", *arguments],
        cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until(condition: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_study_resumes_the_trial_under_way(
    command: Command, tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    """The resumed trial ends with the loss of a run without a stop."""
    space = tmp_path / "toy.yaml"
    space.write_text("model.lr: [0.01]")
    arguments = (*TINY, f"--space={space}", "--trials=1", "--trainer.max_steps=300",
                 "--checkpoint.every_n_train_steps=20", "--evaluation.eval_freq=20")  # fmt: skip
    checkpoint = tmp_path / "checkpoints" / "toy" / "trial-0000" / "last.ckpt"
    process = start_tune(tmp_path, *arguments)
    wait_until(checkpoint.exists)
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    (trial,) = json_of(command("tune", "--show", "--study=toy", "--json"))["trials"]
    assert trial["state"] == "RUNNING"
    answer = json_of(command("tune", *arguments, "--json"))
    assert answer["best"]["state"] == "COMPLETE"
    assert re.search(r"step [1-9]\d* of 36 ", (checkpoint.parent / "fit.log").read_text())
    alone = run_alone(command, answer["best"]["command"])
    assert alone == pytest.approx(answer["best"]["value"], abs=1e-6)


@pytest.mark.parametrize("count", [pytest.param(6, marks=pytest.mark.slow), pytest.param(12, marks=pytest.mark.nightly)])  # fmt: skip
def test_trials_in_two_processes_of_which_one_is_killed(
    command: Command, tmp_path: Path, count: int
) -> None:
    space = tmp_path / "toy.yaml"
    space.write_text("model.lr: {low: 0.001, high: 0.1, log: true}\ndata.batch_size: [2, 4]\n")
    arguments = (*TINY, f"--space={space}", f"--trials={count}", "--trainer.max_steps=40",
                 "--evaluation.eval_freq=4")  # fmt: skip
    killed, other = start_tune(tmp_path, *arguments), start_tune(tmp_path, *arguments)
    folder = tmp_path / "checkpoints" / "toy"
    wait_until(lambda: len(list(folder.glob("trial-*/metrics.csv"))) >= 3)
    killed.kill()
    killed.communicate()
    _, errors = other.communicate(timeout=900)
    assert other.returncode == 0, errors
    answer = json_of(command("tune", "--show", "--study=toy", "--json"))
    trials = answer["trials"]
    assert [trial["number"] for trial in trials] == [*range(count)]
    assert {trial["state"] for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert len({trial["folder"] for trial in trials}) == count
    assert len({json.dumps(trial["params"]) for trial in trials}) == count
    assert sorted(path.name for path in folder.glob("trial-*")) == [
        os.path.basename(trial["folder"]) for trial in trials
    ]
    values = [trial["value"] for trial in trials if trial["state"] == "COMPLETE"]
    assert answer["best"]["value"] == min(values)
    assert run_alone(command, answer["best"]["command"]) == pytest.approx(min(values), abs=1e-6)
    for trial in trials:
        assert {"lr", "data/batch_size"} <= hparams_of(tmp_path / trial["folder"])


BOOK = (f"--config={ROOT}/configs/appendix-d.yaml", *SMALL, *BARE, "--data.train_ratio=0.9",
        "--data.stride=64", "--trials=20", "--sampler=grid")  # fmt: skip


@pytest.mark.parametrize("name", ["book-hparam-search", "configs/spaces/book-hparam-search.yaml"])
def test_fit_accepts_each_value_of_the_book_grid(
    command: Command, tmp_path: Path, name: str
) -> None:
    """Only the database is missing, which is looked for after the settings are checked."""
    storage = "--storage=postgresql://127.0.0.1:9/db"
    result = command("tune", *BOOK, f"--space={name}", storage)
    assert_refused(result, "storage: postgresql://127.0.0.1:9/db cannot be used")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_setting_of_the_book_grid_runs(command: Command) -> None:
    arguments = (*BOOK, "--space=book-hparam-search", "--trials=1")
    (trial,) = json_of(command("tune", *arguments, "--json"))["trials"]
    assert trial["state"] == "COMPLETE"
    assert len(trial["params"]) == 8
