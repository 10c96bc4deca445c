"""Trainer, module and data module from the settings of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.data.tokenizer import Tokenizer
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.model.precision import has_float64
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.checkpoint_io import AtomicCheckpointIO
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.distributed import FSDP2Strategy, check_strategy, is_rank_zero
from gpt_lightning.training.ema import WeightEMA
from gpt_lightning.training.evaluation import EvaluationCallback, SampleTextCallback
from gpt_lightning.training.lightning_compat import use_fast_epoch_loop
from gpt_lightning.training.logger_runs import LoggerRuns, continue_logger_runs
from gpt_lightning.training.loggers import RunTensorBoardLogger, block_tensorflow
from gpt_lightning.training.loop_state import LoopState
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.progress_bar import RunProgressBar
from gpt_lightning.training.run_files import MetricsCSV, SaveRunConfig, recorded_settings
from gpt_lightning.training.skip_step import SkipBadSteps
from gpt_lightning.training.start import Start, find_start, was_started
from gpt_lightning.training.stopping import GracefulStop, MaxTokens
from gpt_lightning.training.task_evaluation import (
    TaskEvaluationCallback,
    build_tasks,
    task_tags,
)
from gpt_lightning.training.throughput import SpeedMonitor, Stopwatch
from gpt_lightning.training.train_metrics import TrainMetrics
from gpt_lightning.training.trainer_settings import check_trainer

# Order in which the callbacks act after an optimizer step. The user's own callbacks act before them.
CALLBACK_ORDER: tuple[type[Callback], ...] = (
    RunProgressBar,
    MaxTokens,  # ends the run; later callbacks see that this step is the last one
    LoopState,  # corrects the counters of a resumed run before others read them
    TrainMetrics,  # logs a GPU's row of the step before, before others log this step
    LoggerRuns,  # keeps the ids of the loggers' runs
    SpeedMonitor,  # takes the time before the others need some
    SkipBadSteps,  # no optimizer step is evaluated or saved before its gradients are checked
    WeightEMA,  # has the weights of this step before they are evaluated and saved
    EvaluationCallback,
    SampleTextCallback,  # prints below the line of the evaluation
    TaskEvaluationCallback,
    SaveRunConfig,
    MetricsCSV,  # a run that is killed after its last checkpoint has all rows and the plot
    GracefulStop,  # a signal ends the run with this step, and the next callback saves it
    CheckpointCallback,  # saves the state of all others
)

# part of a message of Lightning → our message
_LIGHTNING_ERRORS = {
    "No supported gpu backend found": "trainer.accelerator: no GPU is available; give cpu, or auto",
    "should be an int > 0": "trainer.devices: on a CPU it is the number of processes; give a number, such as 1",
    "can not run on your system": "trainer.accelerator: it is not available; give cpu, or auto",
}


@dataclass(frozen=True)
class BuiltRun:
    """Objects of a run.

    Attributes:
        config: Its settings.
        start: What it starts from.
        trainer, module, datamodule: What Lightning runs.
        graceful_stop: Callback that stops the run on a signal.
        checkpoint_callback: Callback that saves checkpoints; ``None`` for a run that saves none.
    """

    config: RunConfig
    start: Start
    trainer: Trainer
    module: GPTLightningModule
    datamodule: TextDataModule
    graceful_stop: GracefulStop
    checkpoint_callback: CheckpointCallback | None


def build_trainer(config: RunConfig) -> tuple[Trainer, GPTLightningModule, TextDataModule]:
    """Build the objects that ``fit`` trains with, for ``trainer.fit(module, datamodule=datamodule)``.

    ``trainer.ckpt_path`` is set where the settings resume a run; it is cleared when the run ends.
    :func:`gpt_lightning.fit` does more: it checks the data and the disk before the first step, and locks the folder.

    Raises:
        ValueError, OSError: A setting cannot be used, or the folder holds another run; the message is one line.
    """
    built = build_run(config)
    ensure_new_run(built)
    return built.trainer, built.module, built.datamodule


def build_run(
    config: RunConfig, *, trains: bool = True, recorded_trainer: Mapping[str, Any] | None = None
) -> BuiltRun:
    """Build the objects of a run.

    Args:
        trains: Whether the run trains; otherwise it validates, and only module, data and trainer matter.
        recorded_trainer: ``config.trainer`` as config.yaml records it, where it holds Python objects.

    Raises:
        ValueError, OSError: A setting cannot be used; the message is one line.
    """
    config.check()
    check_trainer(config.trainer, trains=trains)
    seed_everything(config.seed_everything, workers=True)
    start = find_start(config, trains=trains)
    module, datamodule = build_modules(config, start.architecture, start.tokenizer)
    module.max_tokens = config.max_tokens
    if start.weights is not None:
        module.initialize_from(start.weights, with_optimizer=trains and config.init_optimizer)
    stop, clock = GracefulStop(), Stopwatch()
    io = AtomicCheckpointIO(
        config.checkpoint.async_save, config.checkpoint.keep_previous, config.checkpoint.max_to_keep
    )
    checkpoints = None
    if trains and writes_files(config) and config.trainer.get("enable_checkpointing") is not False:
        checkpoints = CheckpointCallback(
            config.folder,
            io,
            clock,
            every_n_train_steps=config.checkpoint.every_n_train_steps,
            save_best=config.checkpoint.save_best,
            keep_every_n_train_steps=config.checkpoint.keep_every_n_train_steps,
            on_failure=config.checkpoint.on_failure,
        )
    callbacks = _users_callbacks(config)
    if config.trainer.get("enable_progress_bar") is not False:
        callbacks.append(RunProgressBar())
    if trains:
        callbacks += [*_training_callbacks(config, clock), stop]
        if config.evaluation.tasks:
            callbacks.append(_task_evaluation(config, start, stop, clock))
        if writes_files(config):
            callbacks += _file_callbacks(config, start.architecture, recorded_trainer)
        if checkpoints is not None:
            callbacks.append(checkpoints)
    settings = {
        **config.trainer,
        **(_trainer_defaults(config) if trains else {}),
        "callbacks": sorted(callbacks, key=_position),
        "plugins": [*_as_list(config.trainer.get("plugins")), *([io] if trains else [])],
        "logger": _logger(config, start) if trains else False,
        "enable_checkpointing": checkpoints is not None,
        "enable_model_summary": bool(config.trainer.get("enable_model_summary")),
    }
    trainer = _make_trainer(settings)
    if trains and isinstance(trainer.strategy, FSDP2Strategy):
        module.optimizer_config.check_sharding()
    if start.checkpoint_path is not None:
        trainer.ckpt_path = start.checkpoint_path
    return BuiltRun(config, start, trainer, module, datamodule, stop, checkpoints)


def ensure_new_run(built: BuiltRun) -> None:
    """Check that a new run does not overwrite one that is there.

    Raises:
        ValueError: The folder holds a run already; the message says how to resume it.
    """
    folder = built.config.folder
    resumes = built.start.checkpoint_path is not None or built.config.ckpt_path == "auto"
    if resumes or not (folder / "config.yaml").exists():
        return
    remedy = "resume it with --ckpt_path last"
    if not was_started(folder):
        remedy = "it stopped before its first checkpoint, so --ckpt_path auto starts it again"
    raise ValueError(
        f"run: {folder} holds a run already; {remedy}, or give this run another name with --run NAME"
    )


def writes_files(config: RunConfig) -> bool:
    """Return whether the run has a folder; Lightning's ``fast_dev_run`` writes nothing."""
    return not config.trainer.get("fast_dev_run")


def build_modules(
    config: RunConfig, architecture: GPTConfig, tokenizer: Tokenizer
) -> tuple[GPTLightningModule, TextDataModule]:
    """Build module and data module, which check their settings.

    Raises:
        ValueError: A setting cannot be used; the message is one line.
    """
    seeds = _seeds(config)
    module = GPTLightningModule(
        **{**seeds, **_python_numbers(config.model), "config": architecture}
    )
    data = TextDataModule(**{**seeds, **_python_numbers(config.data)})
    module.tokenizer = data.tokenizer = tokenizer
    return module, data


def _python_numbers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings without NumPy's numbers, which a checkpoint cannot hold."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}


def _seeds(config: RunConfig) -> dict[str, Any]:
    return {"seed": config.seed_everything, "rng": config.rng}


def _training_callbacks(config: RunConfig, clock: Stopwatch) -> list[Callback]:
    """Callbacks of a run that trains, besides those that write files and stop it."""
    evaluation, ema_decay = config.evaluation, config.model.get("ema_decay")
    ema = None if ema_decay is None else WeightEMA(ema_decay)
    callbacks: list[Callback] = [
        LoopState(),
        LoggerRuns(),
        SpeedMonitor(clock, config.throughput.every_n_steps),
        SkipBadSteps(config.bad_steps, config.max_bad_steps, config.skip_spikes),
        TrainMetrics(clock),
        EvaluationCallback(evaluation.eval_freq, evaluation.eval_iter, config.rng, clock, ema),
    ]
    if ema is not None:
        callbacks.append(ema)
    if config.max_tokens is not None:
        callbacks.append(MaxTokens(config.max_tokens))
    if evaluation.prompt is not None:
        callbacks.append(
            SampleTextCallback(
                evaluation.prompt,
                evaluation.max_new_tokens,
                config.rng,
                clock,
                log_next_token=evaluation.log_next_token,
            )
        )
    elif evaluation.log_next_token:
        raise ValueError("evaluation.log_next_token: needs evaluation.prompt; give some text")
    return callbacks


def _task_evaluation(
    config: RunConfig, start: Start, stop: GracefulStop, clock: Stopwatch
) -> TaskEvaluationCallback:
    tasks = build_tasks(config.evaluation, start.tokenizer, start.architecture.context_length)
    return TaskEvaluationCallback(tasks, config.evaluation.task_freq, stop, clock)


def _file_callbacks(
    config: RunConfig, architecture: GPTConfig, recorded_trainer: Mapping[str, Any] | None
) -> list[Callback]:
    """Callbacks that write the files beside the checkpoints."""
    recorded = recorded_settings(config, architecture, recorded_trainer)
    data = {**recorded["data"], **_seeds(config)}
    trainer = {k: v for k, v in recorded["trainer"].items() if isinstance(v, str | int | float)}
    hparams = {"data": data, "trainer": trainer}
    ema_tags = [] if config.model.get("ema_decay") is None else [EvaluationCallback.EMA_TAG]
    tags = [*ema_tags, *task_tags(config.evaluation)]
    return [SaveRunConfig(config, recorded), MetricsCSV(config.folder, hparams, tags)]


def _users_callbacks(config: RunConfig) -> list[Callback]:
    callbacks: list[Callback] = _as_list(config.trainer.get("callbacks"))
    for callback in callbacks:
        if type(callback) in CALLBACK_ORDER:
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} is made from the settings of the run; leave it out"
            )
    return callbacks


def _position(callback: Callback) -> int:
    """Return the position in ``CALLBACK_ORDER``; the user's callbacks come first."""
    kind = type(callback)
    return CALLBACK_ORDER.index(kind) if kind in CALLBACK_ORDER else -1


def _trainer_defaults(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the trainer whose default is another one here than in Lightning."""
    limits: dict[str, Any] = {}
    ends_by_itself = config.trainer.get("max_epochs") is not None or config.trainer.get(
        "max_steps"
    ) not in (None, -1)
    if config.max_tokens is not None and not ends_by_itself:
        limits["max_epochs"] = -1  # else Lightning ends after 1,000
    if config.trainer.get("log_every_n_steps") is None:
        limits["log_every_n_steps"] = 10
    if config.trainer.get("limit_val_batches") is None:
        limits["limit_val_batches"] = 0  # EvaluationCallback validates, not Lightning's loop
    return limits


def _make_trainer(settings: dict[str, Any]) -> Trainer:
    if settings.get("reload_dataloaders_every_n_epochs"):
        raise ValueError(
            "trainer.reload_dataloaders_every_n_epochs: would restart the order of the windows each time; leave it out"
        )
    try:
        trainer = Trainer(**settings)
    except (
        MisconfigurationException,
        ValueError,
        TypeError,
        RuntimeError,
        ModuleNotFoundError,
    ) as error:
        raise ValueError(_explain_trainer(error)) from error
    if trainer.world_size == 1 and not is_rank_zero():
        raise ValueError(
            f"trainer.devices: the environment makes this process number {rank_zero_only.rank} of several "  # type: ignore[attr-defined]
            "(RANK, LOCAL_RANK or SLURM_PROCID), but the run has one device; give --trainer.devices, or unset "
            "the variable"
        )
    positions = [position for c in trainer.callbacks if (position := _position(c)) >= 0]  # type: ignore[attr-defined]
    assert positions == sorted(positions), "Lightning has changed the order of the callbacks"
    check_strategy(trainer.strategy)
    device = trainer.strategy.root_device
    if trainer.precision == "64-true" and not has_float64(device):
        raise ValueError(f"trainer.precision: {device.type} has no float64; give 32-true")
    use_fast_epoch_loop(trainer)
    return trainer


def _explain_trainer(error: Exception) -> str:
    """One line for an error that the Trainer raises about its settings."""
    message = " ".join(str(error).split())
    for part, line in _LIGHTNING_ERRORS.items():
        if part in message:
            return line
    return f"trainer: {message}"


def _logger(config: RunConfig, start: Start) -> Any:
    """Return the loggers that the settings name, or TensorBoard's in the run's folder."""
    chosen = config.trainer.get("logger")
    resumed = start.checkpoint_path and read_checkpoint(start.checkpoint_path)
    if chosen is not None and chosen is not True:
        if resumed and is_rank_zero():
            continue_logger_runs(_as_list(chosen), resumed)
        return chosen
    block_tensorflow()
    return RunTensorBoardLogger(config.folder, purge_step=resumed["global_step"] if resumed else 0)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
