"""From arguments to settings, and from settings to a configuration that gives the same ones."""

from pathlib import Path

import pytest
import yaml

from gpt_lightning import GPTConfig
from gpt_lightning.cli.training_cli import TrainingCLI
from gpt_lightning.training.run_files import recorded_settings
from helpers import QUICKSTART, ROOT

CALLBACKS = (
    "--trainer.callbacks+=lightning.pytorch.callbacks.Timer",
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.train_time_interval=0:10:00",
    "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging",
    "--trainer.callbacks.swa_lrs=0.1",
)


@pytest.mark.parametrize(
    "arguments",
    [
        *([f"--config={path}"] for path in sorted((ROOT / "configs").glob("*.yaml"))),
        [QUICKSTART, *CALLBACKS],
        [QUICKSTART, "--evaluation.prompt=null", "--trainer.limit_train_batches=1.0"],
    ],
    ids=lambda arguments: Path(arguments[0]).stem + f" {len(arguments)}",
)
def test_recorded_settings_give_the_same_settings(arguments: list[str], tmp_path: Path) -> None:
    """Classes named by class_path with a duration, an enum or a device among their defaults included."""

    def record(arguments: list[str]) -> dict[str, object]:
        cli = TrainingCLI("fit", arguments, None)
        config = cli.run_config()
        config.init_from = None
        architecture = GPTConfig(**config.given_architecture)
        return recorded_settings(config, architecture, cli.recorded_trainer())

    recorded = record(arguments)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recorded, sort_keys=False))
    assert record([f"--config={tmp_path / 'config.yaml'}"]) == recorded
