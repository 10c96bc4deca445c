"""The Python interface: ``RunConfig``, ``build_trainer`` and ``fit`` do what the command does."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import gpt_lightning
from gpt_lightning import CheckpointConfig, EvaluationConfig, RunConfig, build_trainer
from gpt_lightning.cli.main import main
from gpt_lightning.training.build import CALLBACK_ORDER
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.verify_resume import compare_checkpoints
from runs import file_times

ARCHITECTURE = {"context_length": 16, "emb_dim": 16, "n_heads": 2, "n_layers": 1}


def small_run(folder: Path, name: str = "run", max_steps: int = 12) -> RunConfig:
    """Run of a second, in Python."""
    return RunConfig(
        run=name,
        model={"config": dict(ARCHITECTURE)},
        data={"text": "sample", "train_ratio": 0.1, "stride": 40},
        trainer={"accelerator": "cpu", "max_steps": max_steps, "default_root_dir": str(folder)},
        evaluation=EvaluationConfig(eval_iter=2, max_new_tokens=3),
    )


def small_command(folder: Path, name: str = "command", max_steps: int = 12) -> list[str]:
    """The same run as arguments of the command."""
    return [
        "fit", f"--run={name}", *(f"--model.config.{k}={v}" for k, v in ARCHITECTURE.items()),
        "--data.text=sample", "--data.train_ratio=0.1", "--data.stride=40", "--trainer.accelerator=cpu",
        f"--trainer.max_steps={max_steps}", f"--trainer.default_root_dir={folder}",
        "--evaluation.eval_iter=2", "--evaluation.max_new_tokens=3",
    ]  # fmt: skip


def assert_same_bits(one: Path, other: Path) -> None:
    assert [part.difference for part in compare_checkpoints(one, other)] == [""] * 3


def test_python_and_command_train_the_same_bits(tmp_path: Path) -> None:
    result = gpt_lightning.fit(small_run(tmp_path))
    assert main(small_command(tmp_path)) == 0
    assert result.folder == tmp_path / "checkpoints" / "run"
    assert result.stopped_by is None
    command = tmp_path / "checkpoints" / "command"
    assert_same_bits(result.folder / "last.ckpt", command / "last.ckpt")
    losses = (command / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert [result.metrics[name] for name in ("train_loss", "val_loss")] == pytest.approx(
        [float(value) for value in losses[3:5]]
    )


def test_command_continues_what_python_recorded(tmp_path: Path) -> None:
    """``config.yaml`` of a run from Python starts the same run as a command."""
    folder = gpt_lightning.fit(small_run(tmp_path)).folder
    assert main(["fit", f"--config={folder / 'config.yaml'}", "--run=again"]) == 0
    assert_same_bits(folder / "last.ckpt", folder.with_name("again") / "last.ckpt")


SCRIPT = """
import os, signal, sys
from lightning.pytorch import Callback
from gpt_lightning import EvaluationConfig, RunConfig, build_trainer

class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does

ckpt_path = sys.argv[1] if len(sys.argv) > 1 else None
config = RunConfig(
    run="run",
    model={"config": dict(context_length=16, emb_dim=16, n_heads=2, n_layers=1)},
    data={"text": "sample", "train_ratio": 0.1, "stride": 40},
    trainer={"accelerator": "cpu", "max_steps": 12, "callbacks": [Interrupt()]},
    evaluation=EvaluationConfig(eval_iter=2, max_new_tokens=3),
    ckpt_path=ckpt_path,
)
trainer, module, datamodule = build_trainer(config)
trainer.fit(module, datamodule=datamodule)
print("ended after", trainer.global_step)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted_script_resumes_to_the_bits_of_the_command(tmp_path: Path) -> None:
    """Ctrl-C in a script that uses ``build_trainer`` saves the run; the script resumes it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    last_lines = []
    for arguments in ([], ["last"]):
        finished = subprocess.run(
            [sys.executable, "script.py", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        last_lines.append(finished.stdout.splitlines()[-1])
    assert last_lines == ["ended after 4", "ended after 12"]
    # in a process of the same kind: what other tests leave in this one may change the last bit of a sum
    command = [sys.executable, "-m", "gpt_lightning", *small_command(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    runs = tmp_path / "checkpoints"
    assert_same_bits(runs / "run" / "last.ckpt", runs / "command" / "last.ckpt")


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
        ({"run": "a/b"}, "run: a/b is not a folder's name"),
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


class Listener(Callback):
    """Callback of a user that acts on evaluations."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_evaluation(
        self, trainer: Trainer, pl_module: LightningModule, metrics: dict[str, float]
    ) -> None:
        self.metrics.append(dict(metrics))


def test_callbacks_of_a_user_receive_each_evaluation(tmp_path: Path) -> None:
    listener = Listener()
    config = small_run(tmp_path)
    config.trainer["callbacks"] = [listener]
    folder = gpt_lightning.fit(config).folder
    header, *rows = (folder / "metrics.csv").read_text().splitlines()
    assert [
        ",".join(str(row[name]) for name in header.split(",")) for row in listener.metrics
    ] == rows
    assert [row["step"] for row in listener.metrics] == [0, 5, 10]
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["trainer"].keys() == {"accelerator", "max_steps", "default_root_dir"}


def test_callbacks_act_in_the_stated_order(tmp_path: Path) -> None:
    """The user's callbacks act first, and the checkpoint is saved last."""
    config = small_run(tmp_path)
    config.max_tokens = 1000
    config.trainer["callbacks"] = [ModelCheckpoint(str(tmp_path)), Listener()]
    config.trainer["max_time"] = "00:01:00:00"  # Lightning adds its Timer
    trainer, _, _ = build_trainer(config)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    assert [kind for kind in kinds if kind in CALLBACK_ORDER] == list(CALLBACK_ORDER)
    assert kinds[0] is Listener
    assert kinds[-2:] == [ModelCheckpoint, CheckpointCallback]


def test_build_trainer_does_not_overwrite_a_run(tmp_path: Path) -> None:
    folder = gpt_lightning.fit(small_run(tmp_path)).folder
    before = file_times(folder)
    with pytest.raises(ValueError, match="holds a run already"):
        build_trainer(small_run(tmp_path))
    assert file_times(folder) == before


def test_trainer_forgets_the_checkpoint_that_it_resumed(tmp_path: Path) -> None:
    """Otherwise a later ``validate`` would load it again, and not measure the trained weights."""
    gpt_lightning.fit(small_run(tmp_path, max_steps=5))
    config = small_run(tmp_path)
    config.ckpt_path = "last"
    trainer, module, datamodule = build_trainer(config)
    assert trainer.ckpt_path is not None
    trainer.fit(module, datamodule=datamodule)
    assert trainer.ckpt_path is None
    assert trainer.global_step == 12


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


def test_locked_folder_is_refused(tmp_path: Path) -> None:
    """``fit`` locks the folder of its run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt_lightning", *small_command(tmp_path, "run", max_steps=100_000)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        metrics = tmp_path / "checkpoints" / "run" / "metrics.csv"
        deadline = time.monotonic() + 60
        while not metrics.exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(ValueError, match="is being trained by process"):
            gpt_lightning.fit(small_run(tmp_path))
    finally:
        process.kill()
        process.wait()
