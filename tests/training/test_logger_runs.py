"""A resumed run continues its MLflow and W&B runs. Both write to this machine only."""

import json
import os
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from helpers import ENVIRONMENT, ROOT, SMALL_QUICKSTART, Command, python

needs_mlflow = pytest.mark.skipif(
    None in map(find_spec, ("mlflow", "sqlalchemy", "alembic")),
    reason="MLflow with SQLAlchemy and Alembic is not installed: pip install '.[loggers]'",
)
needs_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="W&B is not installed: pip install '.[loggers]'"
)
LOGGERS = "--trainer.logger=lightning.pytorch.loggers"
MLFLOW = f"{LOGGERS}.MLFlowLogger"
STEPS = ("--evaluation.eval_freq=1", "--trainer.log_every_n_steps=1")
# of an evaluation, and of training
TAGS = ("train_loss", "val_loss", "train/loss", "train/grad_norm", "lr")

Entry = tuple[int, float]  # step, value


class Signal(Callback):
    """Callback that sends a signal to its own process after some steps."""

    def __init__(self, steps: int, signum: int) -> None:
        self.steps, self.signum = steps, signum

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.steps:
            if self.signum == signal.SIGKILL:
                time.sleep(2)  # W&B's process writes what it has received
            os.kill(os.getpid(), self.signum)


def mlflow_in(folder: Path) -> tuple[str, ...]:
    """MLflow's logger, with a database in a folder."""
    return MLFLOW, f"--trainer.logger.tracking_uri=sqlite:///{folder}/mlflow.db"


def mlflow_run(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("lightning_logs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def mlflow_history(folder: Path, tag: str) -> list[Entry]:
    """Steps and values of a metric of the only run, in the order in which they were logged."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    found = client.get_metric_history(mlflow_run(folder).info.run_id, tag)
    return [(entry.step, entry.value) for entry in sorted(found, key=lambda e: e.timestamp)]


def wandb_history(folder: Path, tag: str) -> list[Entry]:
    """Steps and values of a metric of the only run, whose parts are in one folder each."""
    parts = sorted(folder.glob("wandb/offline-run-*"))
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1, parts
    return [entry for part in parts for entry in logged(part, tag)]


def logged(folder: Path, tag: str) -> Iterator[Entry]:
    """Steps and values of a metric in W&B's file of a part."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    for data in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.run.run_id:
            assert folder.name.endswith(f"-{record.run.run_id}")
        items = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if tag in items:
            yield items["trainer/global_step"], items[tag]


def log_records(content: bytes) -> Iterator[bytes]:
    """The records in LevelDB's log format: blocks of 32 KiB; checksum, length and type precede each part."""
    position, record = 7, b""  # after W&B's header
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:  # padding
            position += left
            continue
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        kind = content[position + 6]
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or its last part
            yield record
            record = b""


@needs_mlflow
@needs_wandb
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of MLflow's own dependencies
def test_run_that_was_stopped_and_killed_is_one_run(tmp_path: Path) -> None:
    """SIGTERM after 3 steps; SIGKILL in step 7, when the last checkpoint has 5 steps; then to the end at 10 steps."""
    page = (ROOT / "docs" / "file-formats.md").read_text(encoding="utf-8")
    (tmp_path / "loggers.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    often = ENVIRONMENT | {"WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL": "0.2"}

    def fit(*arguments: str) -> int:
        return python(
            "-m", "gpt_lightning", "fit", *SMALL_QUICKSTART, *STEPS, "--config=loggers.yaml",
            "--trainer.max_steps=10", "--checkpoint.every_n_train_steps=5", "--checkpoint.save_best=false",
            *arguments, cwd=tmp_path, env=often,
        ).returncode  # fmt: skip

    def signal_after(steps: int, signum: signal.Signals) -> tuple[str, ...]:
        return (f"--allow_import={__name__}", f"--trainer.callbacks+={__name__}.Signal",
                f"--trainer.callbacks.steps={steps}", f"--trainer.callbacks.signum={signum:d}")  # fmt: skip

    assert fit(*signal_after(3, signal.SIGTERM)) == 143
    assert fit("--ckpt_path=last", *signal_after(8, signal.SIGKILL)) == -signal.SIGKILL
    assert fit("--ckpt_path=last") == 0
    for history in (mlflow_history, wandb_history):
        for tag in TAGS:
            entries = history(tmp_path, tag)
            # SIGTERM leaves neither a gap nor a duplicate; after SIGKILL the steps since the checkpoint are repeated
            steps = [step for step, _ in entries]
            assert steps == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9], (history, tag)
            values = dict(entries)
            assert all(values[step] == value for step, value in entries), (history, tag)
            assert len(set(values.values())) > 1, (history, tag)


@needs_mlflow
@pytest.mark.filterwarnings("default")  # of MLflow's own dependencies
def test_mlflow_run_continues_with_other_settings(fit: Command, tmp_path: Path) -> None:
    """MLflow refuses another value of a parameter, so the new value is a tag."""
    logger = mlflow_in(tmp_path)
    assert "tensorboard --logdir" not in fit(*STEPS, *logger, "--trainer.max_steps=3").err
    fit(*STEPS, *logger, "--trainer.max_steps=6", "--model.lr=0.002", "--ckpt_path=last")
    run = mlflow_run(tmp_path)
    assert run.info.status == "FINISHED"
    assert run.data.params["lr"] == "0.001"
    assert run.data.params["config/emb_dim"] == "8"
    changed = {name: value for name, value in run.data.tags.items() if "from step" in name}
    assert changed == {"lr from step 3": "0.002"}
    for tag in TAGS:
        assert [step for step, _ in mlflow_history(tmp_path, tag)] == [0, 1, 2, 3, 4, 5], tag


@needs_mlflow
@pytest.mark.filterwarnings("default")  # of MLflow's own dependencies
def test_missing_mlflow_run_is_replaced(fit: Command, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fit(*STEPS, *mlflow_in(tmp_path), "--trainer.max_steps=2")
    run_id = mlflow_run(tmp_path).info.run_id
    result = fit(*STEPS, *mlflow_in(elsewhere), "--trainer.max_steps=4", "--ckpt_path=last")
    assert f"MLflow does not have the run {run_id}" in result.err
    assert [step for step, _ in mlflow_history(elsewhere, "val_loss")] == [2, 3]


@pytest.mark.parametrize("name", ["MLFlowLogger", "WandbLogger"])
def test_logger_without_its_package_is_one_line(command: Command, name: str) -> None:
    package = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}[name]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    result = command("fit", f"{LOGGERS}.{name}", "--data.text=sample")
    assert result.code == 2
    assert result.error.count("\n") == 1, result.err
    assert package in result.error
