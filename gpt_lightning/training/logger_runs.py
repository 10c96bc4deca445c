"""The run ids of W&B and MLflow, which a resumed run continues."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from gpt_lightning.training.lightning_compat import set_logger_run_id


class LoggerRuns(Callback):
    """Callback that saves the run ids of the loggers in the checkpoint, by the class of the logger."""

    def __init__(self) -> None:
        self._run_ids: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            run_id = logger.run_id if isinstance(logger, MLFlowLogger) else None
            run_id = logger.version if isinstance(logger, WandbLogger) else run_id
            if run_id is not None:
                self._run_ids[type(logger).__name__] = str(run_id)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._run_ids)


def continue_logger_runs(loggers: list[Logger], checkpoint: dict[str, Any]) -> None:
    """Make the loggers of a resumed run write to the runs that its checkpoint names."""
    run_ids = checkpoint.get("callbacks", {}).get(LoggerRuns.__qualname__, {})
    for logger in loggers:
        if (run_id := run_ids.get(type(logger).__name__)) is not None:
            set_logger_run_id(logger, run_id)
