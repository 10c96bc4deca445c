"""What a run leaves in its folder beside checkpoints and figures: its configuration, and TensorBoard's events."""

import sys
import types
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from gpt_lightning.training.loggers import attempt


class SaveRunConfig(SaveConfigCallback):
    """Keeps a new run's configuration beside its checkpoints; a resumed run keeps the one it has."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        path = self.folder / "config.yaml"
        if path.exists():
            return
        config = self.config.clone()
        for act in (
            "config",
            "ckpt_path",
            "init_from",
            "init_optimizer",
            "allow_import",
        ):  # done once, not settings
            config.pop(act, None)
        begun = ""
        if self.config.init_from:
            with_optimizer = " --init_optimizer true" if self.config.init_optimizer else ""
            begun = f"# begun with --init_from {self.config.init_from}{with_optimizer}\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        # the default of Lightning's Timer is one, where a string is expected
        yaml.SafeDumper.add_multi_representer(
            Enum, lambda dumper, enum: dumper.represent_data(enum.value)
        )
        path.write_text(begun + self.parser.dump(config, skip_validation=True), encoding="utf-8")


class RunTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's event files in the run's folder, without ``hparams.yaml``: config.yaml says it all."""

    def save(self) -> None:
        attempt(self.experiment.flush)

    def finalize(self, status: str) -> None:
        attempt(lambda: super(RunTensorBoardLogger, self).finalize(status))


def block_tensorflow() -> None:
    """TensorBoard imports TensorFlow where it is installed, 6 s and 500 MB, unless this module exists."""
    name = "tensorboard.compat.notf"
    sys.modules.setdefault(name, types.ModuleType(name))
