"""``build_trainer``: the objects of a run, in Python."""

import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import gpt_lightning
from gpt_lightning import build_trainer
from gpt_lightning.training.build import CALLBACK_ORDER
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.loggers import StepPosition
from gpt_lightning.training.run_files import read_rows
from gpt_lightning.training.task_evaluation import TaskEvaluationCallback
from helpers import python
from runs import assert_same_bits, file_times, small_command, small_run

NOTEBOOK = """
import os, signal, sys
from lightning.pytorch import Callback
from gpt_lightning import EvaluationConfig, RunConfig, build_trainer

class Interrupt(Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does

for ckpt_path in (None, "last"):
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

from gpt_lightning.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_interrupted_notebook_resumes_to_the_bits_of_the_command(tmp_path: Path) -> None:
    """Ctrl-C while ``build_trainer``'s objects train saves the run, and the same process resumes it."""
    result = python("-c", NOTEBOOK, *small_command(tmp_path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ended = [line for line in result.stdout.splitlines() if line.startswith("ended")]
    assert ended == ["ended after 4", "ended after 12"]
    runs = tmp_path / "checkpoints"
    assert_same_bits(runs / "run" / "last.ckpt", runs / "command" / "last.ckpt")


class Listener(Callback):
    """Callback of a user that acts on metrics."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def on_metrics(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        metrics: dict[str, float],
        position: StepPosition,
    ) -> None:
        self.metrics.append({"step": position.step, **metrics})


def test_callbacks_of_a_user_receive_all_metrics(tmp_path: Path) -> None:
    listener = Listener()
    config = small_run(tmp_path)
    config.trainer["callbacks"] = [listener]
    folder = gpt_lightning.fit(config).folder
    rows = read_rows(folder / "metrics.csv")
    for row in rows:
        del row["epoch"], row["seen_epochs"]
    assert listener.metrics == rows
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 5, 10]
    assert [row["step"] for row in rows if "train/loss" in row] == [9]
    recorded = yaml.safe_load((folder / "config.yaml").read_text())
    assert recorded["trainer"].keys() == {"accelerator", "max_steps", "default_root_dir"}


def test_callbacks_act_in_the_stated_order(tmp_path: Path) -> None:
    """The user's callbacks act first, and the checkpoint is saved last."""
    config = small_run(tmp_path)
    config.max_tokens = 1000
    config.model["ema_decay"] = 0.9
    config.trainer["callbacks"] = [ModelCheckpoint(str(tmp_path)), Listener()]
    config.trainer["max_time"] = "00:01:00:00"  # Lightning adds its Timer
    trainer, _, _ = build_trainer(config)
    kinds = [type(callback) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    without_tasks = [kind for kind in CALLBACK_ORDER if kind is not TaskEvaluationCallback]
    assert [kind for kind in kinds if kind in CALLBACK_ORDER] == without_tasks
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
