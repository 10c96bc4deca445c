"""``fit`` and ``validate`` in Python do what the commands do."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

import gpt_lightning
from gpt_lightning import CheckpointConfig, EvaluationConfig, FitResult, RunConfig
from gpt_lightning.cli.main import main
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.run_files import read_rows
from runs import assert_same_bits, small_command, small_run


def test_python_and_command_train_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = gpt_lightning.fit(small_run(tmp_path))
    assert main(small_command(tmp_path)) == 0
    assert result.folder == tmp_path / "checkpoints" / "run"
    assert result.stopped_by is None
    command = tmp_path / "checkpoints" / "command"
    assert_same_bits(result.folder / "last.ckpt", command / "last.ckpt")
    losses = [result.metrics[name] for name in ("train_loss", "val_loss")]
    (last,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("last.ckpt: "))
    assert "train_loss {:.3f}, val_loss {:.3f}".format(*losses) in last


def test_command_continues_what_python_recorded(tmp_path: Path) -> None:
    """``config.yaml`` of a run from Python starts the same run as a command."""
    folder = gpt_lightning.fit(small_run(tmp_path)).folder
    assert main(["fit", f"--config={folder / 'config.yaml'}", "--run=again"]) == 0
    assert_same_bits(folder / "last.ckpt", folder.with_name("again") / "last.ckpt")


def test_fit_resumes_and_knows_a_finished_run(tmp_path: Path) -> None:
    folder = gpt_lightning.fit(small_run(tmp_path, max_steps=5)).folder
    longer = small_run(tmp_path)
    longer.ckpt_path = "last"
    assert gpt_lightning.fit(longer).metrics
    before = (folder / "last.ckpt").read_bytes()
    assert gpt_lightning.fit(longer).metrics == {}  # it has reached its end
    assert (folder / "last.ckpt").read_bytes() == before
    gpt_lightning.fit(small_run(tmp_path, "straight"))
    assert_same_bits(folder / "last.ckpt", folder.with_name("straight") / "last.ckpt")


def test_notebook_shows_a_run_and_its_curves(tmp_path: Path) -> None:
    """Also those of a run that was finished before, or was stopped by a signal."""
    result = gpt_lightning.fit(small_run(tmp_path, max_steps=5))
    shown = result._repr_html_()
    for text in (str(result.folder), "val_loss", f"{result.metrics['val_loss']:.3f}"):
        assert text in shown
    assert "stopped by" not in shown
    stopped = replace(result, stopped_by=signal.SIGINT)
    assert "<th>stopped by</th>" in stopped._repr_html_()
    assert "<td>SIGINT</td>" in stopped._repr_html_()

    longer = small_run(tmp_path)
    longer.ckpt_path = "last"
    for resumed in (gpt_lightning.fit(longer), gpt_lightning.fit(longer)):
        curve = resumed.loss_figure().axes[0].lines[1].get_ydata()
        rows = read_rows(resumed.folder / "metrics.csv")
        assert list(curve) == [row["val_loss"] for row in rows if "val_loss" in row]
        assert len(curve) == 3
        assert str(resumed.folder) in resumed._repr_html_()


def test_curves_of_a_run_without_evaluations_are_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,epoch,train/loss\n1,1,2.5\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: has no losses of an evaluation; train"):
        FitResult(tmp_path).loss_figure()


def test_validate_measures_the_best_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run(tmp_path)
    gpt_lightning.fit(config)
    config.ckpt_path = "best"
    result = gpt_lightning.validate(config)
    capsys.readouterr()
    code = main(["validate", f"--init_from={config.folder / 'best.ckpt'}", "--json",
                 "--trainer.accelerator=cpu"])  # fmt: skip
    assert code == 0
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run": "a/b/c"}, "run: a/b/c is not a folder's name"),
        ({"run": "../b"}, "run: ../b is not a folder's name"),
        ({"run": "/b"}, "run: /b is not a folder's name"),
        ({"run": "nul/b"}, "run: nul/b cannot be a folder's name on Windows"),
        ({"run": "nul"}, "run: nul cannot be a folder's name on Windows"),
        ({"run": "Con.1"}, "run: Con.1 cannot be a folder's name on Windows"),
        ({"run": "long."}, "run: long. cannot be a folder's name on Windows"),
        ({"seed_everything": -1}, "seed_everything: -1 is out of range"),
        ({"ckpt_path": "last"}, "ckpt_path: the run has no"),
        ({"model": {"config": {"emb_dim": 10, "n_heads": 3}}}, "n_heads"),
        ({"data": {"text": "sample", "batch_size": 0}}, "data.batch_size: 0 is too small"),
        ({"data": {"texts": "sample"}}, "data.texts: is not a setting; did you mean text"),
        (
            {"model": {"config": {"emb": 8}}},
            "model.config.emb: is not a setting; did you mean emb_dim",
        ),
        ({"model": {"seed": 7}}, "model.seed: is set by seed_everything"),
        ({"rng": "Step"}, "rng: Step is unknown; give step or global"),
        ({"bad_steps": "Stop"}, "bad_steps: Stop is unknown; give stop or skip"),
        ({"checkpoint": {"on_failure": "halt"}}, "checkpoint.on_failure: halt is unknown"),
        ({"evaluation": {"eval_freqs": 8}}, "evaluation.eval_freqs: is not a setting"),
        ({"trainer": {"max_steps": 0}}, "trainer.max_steps: 0 trains nothing"),
        (
            {"trainer": {"max_step": 3}},
            "trainer.max_step: is not a setting; did you mean max_steps",
        ),
        ({"trainer": {"accelerator": "gpu5"}}, "trainer.accelerator: gpu5 is unknown"),
        ({"evaluation": EvaluationConfig(eval_freq=0)}, "evaluation.eval_freq: 0 is too small"),
        (
            {"evaluation": EvaluationConfig(prompt=None, log_next_token=True)},
            "evaluation.log_next_token: needs evaluation.prompt",
        ),
        (
            {"checkpoint": CheckpointConfig(every_n_train_steps=0)},
            "checkpoint.every_n_train_steps: 0 is too small",
        ),
        (
            {"trainer": {"callbacks": [EvaluationCallback()], "accelerator": "cpu"}},
            "trainer.callbacks: EvaluationCallback is made from the settings",
        ),
    ],
)
def test_wrong_setting_is_one_line_and_writes_nothing(
    change: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as error:
        gpt_lightning.fit(RunConfig(**change))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_python_values_are_recorded_as_yaml(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    config.model["lr"] = np.float64(0.01)
    (tmp_path / "text.txt").write_text("One line of a text.\n" * 400)
    config.data["text"] = tmp_path / "text.txt"
    config.trainer["default_root_dir"] = tmp_path
    recorded = yaml.safe_load((gpt_lightning.fit(config).folder / "config.yaml").read_text())
    assert recorded["model"]["lr"] == 0.01
    assert recorded["data"]["text"] == str(tmp_path / "text.txt")
    assert recorded["trainer"]["default_root_dir"] == str(tmp_path)


# a process that locks a run until its input ends
HOLDER = """
import sys
from dataclasses import replace
from pathlib import Path
from gpt_lightning.training.run_lock import RunLock
with RunLock() as lock:
    lock.acquire(Path(sys.argv[1]))
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_locked_folder_is_refused(tmp_path: Path) -> None:
    """``fit`` locks the folder of its run."""
    folder = tmp_path / "checkpoints" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match=f"is being trained by process {holder.pid} on "):
            gpt_lightning.fit(small_run(tmp_path))
        holder.communicate()
    assert gpt_lightning.fit(small_run(tmp_path, max_steps=1)).metrics
