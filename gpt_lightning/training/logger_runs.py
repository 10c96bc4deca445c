"""The run ids of W&B and MLflow, which a resumed run continues."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger

from gpt_lightning.training.lightning_compat import (
    has_mlflow_run,
    set_logger_run_id,
    tag_changed_hyperparams,
)

logger = logging.getLogger(__name__)


class LoggerRuns(Callback):
    """Callback that saves the run ids of the loggers in the checkpoint, by the class of the logger."""

    def __init__(self) -> None:
        self._run_ids: dict[str, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for each in trainer.loggers:
            run_id = None
            if isinstance(each, MLFlowLogger):
                run_id = each.run_id
                # MLflow shows a run that has ended as finished, also while it is continued
                each.experiment.update_run(run_id, status="RUNNING")
            elif isinstance(each, WandbLogger):
                run_id = each.version
            if run_id is not None:
                self._run_ids[type(each).__name__] = str(run_id)

    def state_dict(self) -> dict[str, Any]:
        return dict(self._run_ids)


def continue_logger_runs(loggers: list[Logger], checkpoint: dict[str, Any]) -> None:
    """Make the loggers of a resumed run write to the runs that its checkpoint names; for rank 0, which logs."""
    run_ids = checkpoint.get("callbacks", {}).get(LoggerRuns.__qualname__, {})
    for each in loggers:
        if (run_id := run_ids.get(type(each).__name__)) is None:
            continue
        if isinstance(each, MLFlowLogger):
            if not has_mlflow_run(each, run_id):
                logger.warning(
                    f"trainer.logger: MLflow does not have the run {run_id} of the checkpoint; a new one starts"
                )
                continue
            tag_changed_hyperparams(each, checkpoint["hyper_parameters"], checkpoint["global_step"])
        set_logger_run_id(each, run_id)
