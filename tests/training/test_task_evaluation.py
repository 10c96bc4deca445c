"""Tasks during training: logged numbers are those of ``evaluate``, and the run stays the same."""

import hashlib
import json
import math
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt_lightning.evals import task_downloads
from gpt_lightning.training import task_evaluation
from gpt_lightning.training.run import FitResult
from helpers import DDP, FSDP, SMALL_QUICKSTART, Command, assert_refused, json_of, python
from runs import read_metrics, same_checkpoints, same_runs, small_run
from task_examples import write_tasks

NUMBERS = {
    "hellaswag": ("acc", "acc_norm"),
    "lambada": ("acc", "perplexity"),
    "wikitext": ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}
TAGS = [f"eval/{task}_{number}" for task, numbers in NUMBERS.items() for number in numbers]


@pytest.fixture
def tasks(command: Command, tmp_path: Path) -> str:
    """The setting ``evaluation.tasks`` with small files of all tasks."""
    return f"--evaluation.tasks={json.dumps(write_tasks(tmp_path, copies=5))}"


def task_rows(run: str) -> dict[int, list[float]]:
    """Step → numbers of all tasks, as metrics.csv has them."""
    rows = read_metrics(Path("checkpoints") / run)
    return {int(row["step"]): [row[tag] for tag in TAGS] for row in rows if TAGS[0] in row}


def test_tasks_are_those_of_evaluate_and_leave_the_run_as_it_is(
    fit: Command, command: Command, tasks: str
) -> None:
    common = ("--trainer.max_steps=8", "--trainer.max_epochs=-1", "--model.config.drop_rate=0.1",
              "--evaluation.eval_freq=2")  # fmt: skip
    watched = fit("--run=watched", tasks, "--evaluation.task_freq=3", *common)
    fit("--run=alone", *common)
    assert same_runs("watched", "alone")
    assert not task_rows("alone")
    found = task_rows("watched")
    assert list(found) == [3, 6, 8]
    assert found[3] != found[8]
    assert watched.out.count("(Step 000003): hellaswag acc 0.") == 1
    assert " ± 0." in watched.out
    board = EventAccumulator("checkpoints/watched").Reload()
    for number, tag in enumerate(TAGS):
        logged = {event.step: event.value for event in board.Scalars(tag)}
        assert logged == {step: pytest.approx(row[number]) for step, row in found.items()}
    expected = []
    for task, file in (("hellaswag", "choices.jsonl"), ("lambada", "texts.jsonl"), ("wikitext", "pages.txt")):  # fmt: skip
        result = json_of(command("evaluate", "--from=checkpoints/watched", f"--task={task}",
                                 f"--file={file}", "--json"))  # fmt: skip
        expected += [result[number] for number in NUMBERS[task]]
    assert found[8] == pytest.approx(expected, rel=1e-5)


def test_resumed_run_has_the_same_rows(fit: Command, tasks: str) -> None:
    """The numbers at the end of the first part are removed, as the longer run has none there."""
    common = (tasks, "--evaluation.task_freq=3", "--trainer.max_epochs=-1", "--model.config.drop_rate=0.1",
              "--checkpoint.save_best=false")  # fmt: skip
    fit("--run=at_once", "--trainer.max_steps=8", *common)
    fit("--run=resumed", "--trainer.max_steps=5", *common)
    assert list(task_rows("resumed")) == [3, 5]
    fit("--run=resumed", "--trainer.max_steps=8", "--ckpt_path=last", *common)
    assert task_rows("resumed") == task_rows("at_once")
    assert same_runs("resumed", "at_once")
    # without tasks the file keeps what it has
    alone = common[2:]
    fit("--run=resumed", "--trainer.max_steps=9", "--ckpt_path=last", *alone)
    assert list(task_rows("resumed")) == [3, 6]


def test_signal_ends_an_evaluation(
    fit: Command, command: Command, tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops at this step and saves it; resumed, it is the run that was not stopped."""
    settings = (*SMALL_QUICKSTART, "--run=stopped", tasks, "--evaluation.task_freq=3", "--trainer.max_steps=5")  # fmt: skip
    plain = task_evaluation.log_likelihoods
    calls = 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(task_evaluation, "log_likelihoods", interrupted)
        result = command("fit", *settings)
    assert result.code == 143
    assert calls == 1
    assert "step 3: a signal ended the evaluation by tasks" in result.err
    assert not task_rows("stopped")
    assert command("fit", *settings, "--ckpt_path=last").code == 0
    fit("--run=alone", "--trainer.max_steps=5")
    assert same_checkpoints("stopped", "alone")
    assert list(task_rows("stopped")) == [5]


def test_python_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gpt_lightning import EvaluationConfig, fit

    monkeypatch.chdir(tmp_path)
    config = small_run(tmp_path, max_steps=2)
    files = write_tasks(tmp_path)
    config.evaluation = EvaluationConfig(prompt=None, tasks={"lambada": files["lambada"]})
    result: FitResult = fit(config)
    assert result.metrics["eval/lambada_perplexity"] > 1000
    assert "lambada: lambada.jsonl" not in (result.folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("group", "name", "value", "message"),
    [
        ("evaluation", "task_freq", 0, "evaluation.task_freq: 0 is too small"),
        ("evaluation", "task_limit", 0, "evaluation.task_limit: 0 is too small"),
        ("evaluation", "tasks", ["lambda"], "did you mean lambada?"),
        ("checkpoint", "keep_every_n_train_steps", 0, "keep_every_n_train_steps: 0 is too small"),
        ("checkpoint", "max_to_keep", 2, "max_to_keep: 2 has no effect"),
    ],
)
def test_settings_that_change_in_python_are_checked(
    tmp_path: Path, group: str, name: str, value: Any, message: str
) -> None:
    from gpt_lightning import EvaluationConfig, fit

    config = small_run(tmp_path, max_steps=2)
    config.evaluation = EvaluationConfig(prompt=None, tasks=write_tasks(tmp_path))
    setattr(getattr(config, group), name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        fit(config)
    assert not (tmp_path / "checkpoints").exists()


def test_task_that_is_named_later_in_python_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its file in the cache, and in the form of a list."""
    from gpt_lightning import fit

    file = Path(write_tasks(tmp_path)["lambada"])
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    folder = task_downloads.task_folder("lambada")
    folder.mkdir(parents=True)
    (folder / "lambada_test.jsonl").write_bytes(file.read_bytes())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    made = replace(task_downloads.TASK_DOWNLOADS["lambada"], sha256=sha256)
    monkeypatch.setitem(task_downloads.TASK_DOWNLOADS, "lambada", made)
    config = small_run(tmp_path, max_steps=2)
    config.evaluation.tasks = ["lambada"]
    assert fit(config).metrics["eval/lambada_perplexity"] > 1000


def test_logits_that_are_not_finite_do_not_end_the_run(fit: Command, tasks: str) -> None:
    """Its losses are NaN, too."""
    result = fit(tasks, "--run=diverged", "--trainer.max_steps=1", "--model.lr=1e30", "--model.warmup_steps=0",
                 "--evaluation.prompt=null")  # fmt: skip
    rows = task_rows("diverged")
    assert list(rows) == [1]
    assert all(map(math.isnan, rows[1]))
    assert "(Step 000001): hellaswag acc nan, acc_norm nan\n" in result.out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--evaluation.tasks=hellaswag"], ["hellaswag: its file is not downloaded", "download hellaswag"]),
        (["--evaluation.tasks=[lambada, wikitext]"], ["lambada: its file is not", "download lambada"]),
        (["--evaluation.tasks={wikitext: null}"], ["wikitext: its file is not", "download wikitext-2"]),
        (["--evaluation.tasks=[lambada, lambada]"], ["lambada is given twice"]),
        (["--evaluation.tasks=helaswag"], ["helaswag is not a task; did you mean hellaswag?"]),
        (["--evaluation.tasks={arc: choices.jsonl}"], ["arc is not a task; give one of hellaswag, lambada"]),
        (["--evaluation.tasks.hellaswag=nowhere"], ["nowhere cannot be read (No such file"]),
        (["--evaluation.tasks={lambada: choices.jsonl}"], ["choices.jsonl, line 1: has no text"]),
        (["--evaluation.tasks={hellaswag: long.jsonl}"], ["hellaswag: example 2: an ending has 1", "the model reads 16"]),
        (["--evaluation.task_freq=0"], ["evaluation.task_freq: 0 is too small"]),
        (["--evaluation.task_limit=0"], ["evaluation.task_limit: 0 is too small"]),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("tasks")
def test_bad_tasks_are_refused(command: Command, arguments: list[str], parts: list[str]) -> None:
    long = {"ctx": "It is", "endings": ["so and " * 50, "no"], "label": 0}
    short = {"ctx": "It is", "endings": ["so", "no"], "label": 0}
    Path("long.jsonl").write_text("\n".join(map(json.dumps, [short, long])), encoding="utf-8")
    assert_refused(command("fit", *SMALL_QUICKSTART, *arguments), "evaluation.task", *parts)
    assert not Path("checkpoints").exists()


def test_only_the_first_examples_are_used(fit: Command, tasks: str) -> None:
    """An ending that is too long is no mistake behind them."""
    long = {"text": "It is " + "s" * 400}
    with Path("texts.jsonl").open("a", encoding="utf-8") as file:
        file.write("\n" + json.dumps(long))
    fit(tasks, "--evaluation.task_limit=10", "--trainer.max_steps=2", "--evaluation.prompt=null")
    assert list(task_rows("quickstart")) == [2]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp2"])
def test_two_processes_evaluate_as_one(
    fit: Command, tasks: str, tmp_path: Path, strategy: list[str]
) -> None:
    common = (tasks, "--evaluation.task_freq=2", "--data.global_batch_size=4", "--data.batch_size=1",
              "--model.config.drop_rate=0", "--trainer.max_steps=6")  # fmt: skip
    fit(*common, "--run=one")
    for run, arguments in (("two", common), ("alone", common[2:])):
        result = python("-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *arguments, *strategy,
                        f"--run={run}", cwd=tmp_path, timeout=100)  # fmt: skip
        assert result.returncode == 0, result.stderr
    two, one = task_rows("two"), task_rows("one")
    assert list(two) == list(one) == [2, 4, 6]
    for step, row in two.items():
        assert row == pytest.approx(one[step], rel=1e-3)
    assert same_runs("two", "alone")
    assert same_checkpoints("two", "alone")
