"""A resumed run continues its MLflow and W&B runs. Both write to this machine only."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers import Command

needs_mlflow = pytest.mark.skipif(
    find_spec("mlflow") is None or find_spec("sqlalchemy") is None,
    reason="MLflow with SQLAlchemy is not installed: pip install mlflow",
)
needs_wandb = pytest.mark.skipif(
    find_spec("wandb") is None, reason="W&B is not installed: pip install wandb"
)
LOGGERS = "--trainer.logger=lightning.pytorch.loggers"
STEPS = ("--evaluation.eval_freq=1", "--trainer.log_every_n_steps=1")


@needs_mlflow
@pytest.mark.filterwarnings("default")  # of MLflow's own dependencies
def test_mlflow_run_continues(fit: Command) -> None:
    from mlflow.tracking import MlflowClient

    logger = (f"{LOGGERS}.MLFlowLogger", "--trainer.logger.tracking_uri=sqlite:///mlflow.db")
    fit(*STEPS, *logger, "--trainer.max_steps=3")
    fit(*STEPS, *logger, "--trainer.max_steps=6", "--ckpt_path=last")
    client = MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("lightning_logs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    for tag in ("val_loss", "train/loss"):
        history = client.get_metric_history(run.info.run_id, tag)
        assert [entry.step for entry in history] == [0, 1, 2, 3, 4, 5], tag


@needs_wandb
@pytest.mark.filterwarnings("default")  # of W&B's own dependencies
def test_wandb_run_continues(fit: Command, tmp_path: Path) -> None:
    import wandb

    logger = (f"{LOGGERS}.WandbLogger", "--trainer.logger.offline=true")
    fit(*STEPS, *logger, "--trainer.max_steps=3")
    wandb.finish()
    fit(*STEPS, *logger, "--trainer.max_steps=6", "--ckpt_path=last")
    wandb.finish()
    parts = sorted(tmp_path.glob("wandb/offline-run-*"))
    run_ids = {part.name.rpartition("-")[2] for part in parts}
    assert len(run_ids) == 1
    steps = [step for part in parts for step in logged_steps(part, "val_loss")]
    assert steps == [0, 1, 2, 3, 4, 5]


def logged_steps(folder: Path, tag: str) -> list[int]:
    """The steps of a metric in W&B's own file of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    steps = []
    for data in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        if tag in items:
            steps.append(items["trainer/global_step"])
    return steps


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


@pytest.mark.parametrize("name", ["MLFlowLogger", "WandbLogger"])
def test_logger_without_its_package_is_one_line(command: Command, name: str) -> None:
    package = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}[name]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    result = command("fit", f"{LOGGERS}.{name}", "--data.text=sample")
    assert result.code == 2
    assert result.error.count("\n") == 1, result.err
    assert package in result.error
