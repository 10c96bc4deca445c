"""Trainer, module and data module from the settings of a run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import seed_everything
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.model.config import GPTConfig
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.training.checkpoint_callback import CheckpointCallback
from gpt_lightning.training.checkpoint_io import AtomicCheckpointIO
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.distributed import check_strategy, is_rank_zero
from gpt_lightning.training.evaluation import EvaluationCallback, SampleTextCallback
from gpt_lightning.training.lightning_compat import use_fast_epoch_loop
from gpt_lightning.training.loggers import RunTensorBoardLogger, block_tensorflow
from gpt_lightning.training.loop_state import LoopState
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.progress_bar import RunProgressBar
from gpt_lightning.training.run_files import MetricsCSV, SaveRunConfig, recorded_settings
from gpt_lightning.training.skip_step import SkipBadSteps
from gpt_lightning.training.start import Start, find_start
from gpt_lightning.training.stopping import GracefulStop, MaxTokens
from gpt_lightning.training.throughput import SpeedMonitor, Stopwatch

# Order in which the callbacks act after an optimizer step. The user's own callbacks act before them.
CALLBACK_ORDER: tuple[type[Callback], ...] = (
    RunProgressBar,
    MaxTokens,  # ends the run; later callbacks see that this step is the last one
    LoopState,  # corrects the counters of a resumed run before others read them
    SpeedMonitor,  # takes the time before the others need some
    SkipBadSteps,  # no optimizer step is evaluated or saved before its gradients are checked
    EvaluationCallback,
    SampleTextCallback,  # prints below the line of the evaluation
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
        stop: Callback that stops the run on a signal.
        checkpoints: Callback that saves checkpoints; ``None`` for a run that saves none.
    """

    config: RunConfig
    start: Start
    trainer: Trainer
    module: GPTLightningModule
    datamodule: TextDataModule
    stop: GracefulStop
    checkpoints: CheckpointCallback | None


def build_trainer(config: RunConfig) -> tuple[Trainer, GPTLightningModule, TextDataModule]:
    """Build the objects that ``fit`` trains with, for ``trainer.fit(module, datamodule=datamodule)``.

    ``trainer.ckpt_path`` is set where the settings resume a run. :func:`gpt_lightning.fit` does more: it checks the
    data, the disk and the folder before the first step, and locks the folder.

    Raises:
        ValueError, OSError: A setting cannot be used; the message is one line.
    """
    built = build_run(config)
    return built.trainer, built.module, built.datamodule


def build_run(
    config: RunConfig, *, trains: bool = True, recorded_trainer: Mapping[str, Any] | None = None
) -> BuiltRun:
    """Build the objects of a run.

    Args:
        trains: Whether the run trains; otherwise it validates.
        recorded_trainer: ``config.trainer`` as config.yaml records it, where it holds Python objects.

    Raises:
        ValueError, OSError: A setting cannot be used; the message is one line.
    """
    seed_everything(config.seed_everything, workers=True)
    start = find_start(config, trains=trains)
    module, datamodule = build_modules(config, start.architecture)
    if start.weights is not None:
        module.initialize_from(start.weights, with_optimizer=config.init_optimizer)
    settings = dict(config.trainer)
    stop = GracefulStop()
    callbacks = _as_list(settings.pop("callbacks", None))
    _check_users_callbacks(callbacks)
    plugins = _as_list(settings.pop("plugins", None))
    checkpoints = None
    if settings.get("enable_progress_bar") is not False:
        callbacks.append(RunProgressBar())
    if trains:
        writes = not settings.get("fast_dev_run")
        no_limit = settings.get("max_epochs") is None and settings.get("max_steps", -1) in (
            -1,
            None,
        )
        if config.max_tokens is not None and no_limit:
            settings["max_epochs"] = -1  # else Lightning ends after 1,000
        if settings.get("limit_val_batches") is None:
            settings["limit_val_batches"] = 0  # EvaluationCallback validates, not Lightning's loop
        clock = Stopwatch()
        io = AtomicCheckpointIO(config.checkpoint.async_save, config.checkpoint.keep_previous)
        plugins.append(io)
        callbacks += [*_training_callbacks(config, clock), stop]
        if writes:
            recorded = recorded_settings(config, start.architecture, recorded_trainer)
            callbacks += [
                SaveRunConfig(config, recorded),
                MetricsCSV(config.folder, {"data": {**recorded["data"], **_seeds(config)}}),
            ]
        if writes and settings.get("enable_checkpointing") is not False:
            checkpoints = CheckpointCallback(
                config.folder,
                io,
                clock,
                every_n_train_steps=config.checkpoint.every_n_train_steps,
                save_best=config.checkpoint.save_best,
                on_failure=config.checkpoint.on_failure,
            )
            callbacks.append(checkpoints)
    settings["callbacks"] = _in_order(callbacks)
    settings["logger"] = _loggers(config, start, settings.get("logger")) if trains else False
    settings["plugins"] = plugins
    settings["enable_checkpointing"] = checkpoints is not None
    settings["enable_model_summary"] = bool(settings.get("enable_model_summary"))
    trainer = _make_trainer(settings)
    assert trainer.callbacks == _in_order(trainer.callbacks), "Lightning changed the order"  # type: ignore[attr-defined]
    if start.checkpoint is not None:
        trainer.ckpt_path = start.checkpoint
    return BuiltRun(config, start, trainer, module, datamodule, stop, checkpoints)


def build_modules(
    config: RunConfig, architecture: GPTConfig
) -> tuple[GPTLightningModule, TextDataModule]:
    """Build module and data module, which check their settings.

    Raises:
        ValueError: A setting cannot be used; the message is one line.
    """
    seeds = _seeds(config)
    return (
        GPTLightningModule(**{**seeds, **config.model, "config": architecture}),
        TextDataModule(**{**seeds, **config.data}),
    )


def _seeds(config: RunConfig) -> dict[str, Any]:
    return {"seed": config.seed_everything, "rng": config.rng}


def _training_callbacks(config: RunConfig, clock: Stopwatch) -> list[Callback]:
    """Callbacks of a run that trains, besides those that write files and stop it."""
    evaluation = config.evaluation
    callbacks: list[Callback] = [
        LoopState(),
        SpeedMonitor(clock, config.throughput.every_n_steps),
        SkipBadSteps(config.bad_steps, config.max_bad_steps, config.skip_spikes),
        EvaluationCallback(evaluation.eval_freq, evaluation.eval_iter, config.rng, clock),
    ]
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


def _in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Sort callbacks by ``CALLBACK_ORDER``; all others come first, in the order they have."""

    def position(callback: Callback) -> int:
        kind = type(callback)
        return CALLBACK_ORDER.index(kind) if kind in CALLBACK_ORDER else -1

    return sorted(callbacks, key=position)


def _check_users_callbacks(callbacks: Iterable[Callback]) -> None:
    for callback in callbacks:
        if type(callback) in CALLBACK_ORDER:
            raise ValueError(
                f"trainer.callbacks: {type(callback).__name__} is part of every run; leave it out"
            )


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
    check_strategy(trainer.strategy)
    use_fast_epoch_loop(trainer)
    return trainer


def _explain_trainer(error: Exception) -> str:
    """One line for an error that the Trainer raises about its settings."""
    message = " ".join(str(error).split())
    for part, line in _LIGHTNING_ERRORS.items():
        if part in message:
            return line
    return f"trainer: {message}"


def _loggers(config: RunConfig, start: Start, chosen: Any) -> Any:
    """Return the loggers that the settings name, or TensorBoard's in the run's folder."""
    if chosen is not None and chosen is not True:
        return chosen
    block_tensorflow()
    return RunTensorBoardLogger(
        save_dir=config.folder.parent,
        name=config.folder.name,
        version="",
        default_hp_metric=False,
        # remove what a resumed run will log again
        purge_step=read_checkpoint(start.checkpoint)["global_step"] if start.checkpoint else 0,
    )


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
