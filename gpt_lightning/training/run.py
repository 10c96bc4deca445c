"""``fit`` and ``validate``: the checks before the first step, the run, and its result."""

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from gpt_lightning.data.datamodule import TextDataModule
from gpt_lightning.pretrained.source import find_checkpoint
from gpt_lightning.pretrained.weights import read_checkpoint
from gpt_lightning.table import html_table
from gpt_lightning.training.build import BuiltRun, build_run, ensure_new_run, writes_files
from gpt_lightning.training.config import RunConfig
from gpt_lightning.training.distributed import (
    init_elastic_process_group,
    is_rank_zero,
    terminate_ranks_on_error,
)
from gpt_lightning.training.evaluation import EvaluationCallback
from gpt_lightning.training.hardware import keep_freed_memory
from gpt_lightning.training.lightning_messages import quiet_lightning
from gpt_lightning.training.loggers import RunTensorBoardLogger
from gpt_lightning.training.resume import reached_limit
from gpt_lightning.training.run_files import loss_figure, read_rows
from gpt_lightning.training.run_length import Progress, run_steps
from gpt_lightning.training.run_lock import RunLock
from gpt_lightning.training.run_warnings import device_warnings, run_warnings
from gpt_lightning.training.schedule import Schedule

if TYPE_CHECKING:
    from gpt_lightning.figure import Figure

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """Result of :func:`fit`.

    Attributes:
        folder: Folder of the run; ``load_model(str(folder))`` reads its model.
        stopped_by: Signal that stopped the run early; ``None`` if there was none.
        metrics: Metrics of the last evaluation, by their names in the logs; empty if there was none.
    """

    folder: Path
    stopped_by: signal.Signals | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def loss_figure(self) -> "Figure":
        """Plot the training and validation losses of the run's evaluations, also those before a resume.

        Raises:
            ValueError, OSError: The run has no evaluations, or no ``metrics.csv``.
        """
        return loss_figure(read_rows(self.folder / "metrics.csv"))

    def _repr_html_(self) -> str:
        stopped = {"stopped by": self.stopped_by.name} if self.stopped_by is not None else {}
        losses = {name: f"{value:.3f}" for name, value in self.metrics.items()}
        return html_table([{"run": str(self.folder), **stopped, **losses}])


@quiet_lightning()
def fit(config: RunConfig, *, recorded_trainer: Mapping[str, Any] | None = None) -> FitResult:
    """Train a model, as the command ``fit`` does. The first of these that is given decides what the run starts from:

    1. ``ckpt_path``: the same run resumes, with its weights, optimizer, data position and random numbers.
    2. ``init_from``: a new run with existing weights, and existing moments with ``init_optimizer``.
    3. Neither: a new run with random weights.

    A signal stops the run after the current step and saves it; it is not raised again, see ``stopped_by``. A second
    Ctrl-C stops the run at once. With several devices a script trains one run, because each rank runs the script.

    Args:
        recorded_trainer: ``config.trainer`` as config.yaml records it, where it holds Python objects.

    Raises:
        ValueError, OSError: A setting cannot be used; the message is one line, and nothing was written.
        FloatingPointError: A loss or a gradient is not finite.
        KeyboardInterrupt: The run was stopped at once.
    """
    with RunLock() as lock:
        if is_rank_zero() and writes_files(config):
            lock.acquire(config.folder)
        built = build_run(config, recorded_trainer=recorded_trainer)
        if _is_finished(built):
            return FitResult(config.folder)
        return _train(built)


def _train(built: BuiltRun) -> FitResult:
    config, trainer, folder = built.config, built.trainer, built.config.folder
    if is_rank_zero():
        ensure_new_run(built)
        setup_data_early(built)
        steps = _steps_of_run(built)
        if built.checkpoint_callback is not None:
            built.checkpoint_callback.check_disk_space(
                built.module.config,
                built.module.optimizer_config.state_values(built.module.config),
                str(trainer.precision),
                steps,
                has_ema=built.module.ema_decay is not None,
            )
        schedule = _check_schedule(built, steps)
        _check_compiler(built)
    init_elastic_process_group(trainer)
    on_cpu = trainer.strategy.root_device.type == "cpu"
    keeps = config.keep_freed_memory is not False and on_cpu and keep_freed_memory()
    if is_rank_zero():
        for warning in run_warnings(
            config, trainer, built.module.config, schedule, keeps_freed_memory=keeps
        ):
            logger.warning(warning)
        if writes_files(config):
            logger.info(f"{folder}: {_describe_data(built.datamodule)}")
    try:
        with terminate_ranks_on_error(trainer):
            # it resumes from trainer.ckpt_path
            trainer.fit(built.module, datamodule=built.datamodule, weights_only=True)
    except MisconfigurationException as error:
        raise ValueError(f"trainer: {error}") from error
    except SystemExit as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt(f"{folder}: --ckpt_path last resumes it") from error
        if trainer.is_global_zero:
            logger.info(f"{folder}: ended by sys.exit({error.code!r}), not by its settings")
        raise
    stopped_by = built.graceful_stop.received
    if trainer.is_global_zero:
        if stopped_by is not None:
            built.graceful_stop.requeue()
            logger.info(f"{folder}: stopped; --ckpt_path last resumes it")
        else:
            for line in _summary(built):
                logger.info(line)
            logger.info(f"{folder}: done{_viewer(built)}")
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return FitResult(folder, stopped_by, metrics)


def _describe_data(data: TextDataModule) -> str:
    what = data.described()
    text = ", ".join(what["text"]) if isinstance(what["text"], list) else what["text"]
    return (
        f"text {text}: {data.tokens:,} tokens; {what['train_windows']:,} windows of {what['context_length']} tokens for "
        f"training, {what['val_windows']:,} for validation"
    )


def _summary(built: BuiltRun) -> Iterator[str]:
    """Losses of the last evaluated weights and of best.ckpt, and the file that ``generate`` takes."""
    trainer, folder = built.trainer, built.config.folder
    (evaluation,) = (c for c in trainer.callbacks if isinstance(c, EvaluationCallback))  # type: ignore[attr-defined]
    if built.checkpoint_callback is None:
        return
    losses = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if evaluation.evaluated_steps is not None:
        is_last = evaluation.evaluated_steps == trainer.global_step
        name = "last.ckpt" if is_last else "last evaluation"
        yield f"{name}: step {evaluation.evaluated_steps - 1}, {_losses(losses)}"
    best = built.checkpoint_callback.best
    # the file is another one after the run was resumed from an earlier step, or in another folder
    if best.step is not None and built.checkpoint_callback.saved_best_step() == best.step:
        rows = [row for row in read_rows(folder / "metrics.csv") if row["step"] == best.step - 1]
        losses = {"val_loss": best.val_loss}
        for row in rows:
            losses |= row
        yield (
            f"best.ckpt: step {best.step - 1}, {_losses(losses)}, the lowest at an evaluation "
            f"(every {evaluation.eval_freq} steps)"
        )
    yield f"generate --from {folder} takes last.ckpt"
    if built.module.ema_decay is not None:
        yield f"convert {folder} NAME.ckpt --ema writes its averaged weights, which generate takes too"


def _viewer(built: BuiltRun) -> str:
    """The command that shows TensorBoard's files, if the run has written them."""
    if not any(isinstance(each, RunTensorBoardLogger) for each in built.trainer.loggers):
        return ""
    return f"; tensorboard --logdir {built.config.folder.parent} shows it"


def _losses(metrics: Mapping[str, float]) -> str:
    names = ("train_loss", "val_loss", "val_loss_ema")
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)


def _is_interrupt(error: SystemExit) -> bool:
    """Return whether Lightning made this exit from Ctrl-C; a callback may call ``sys.exit(1)`` too."""
    return error.code == 1 and isinstance(error.__context__, KeyboardInterrupt)


def _is_finished(built: BuiltRun) -> bool:
    """Return whether the run has reached its end before, and log it; only missing names of its checkpoint are made then."""
    if built.start.checkpoint_path is None:
        return False
    trainer, config = built.trainer, built.config
    checkpoint = read_checkpoint(built.start.checkpoint_path)
    reached = reached_limit(checkpoint, trainer.max_steps, trainer.max_epochs, config.max_tokens)
    if reached is None:
        return False
    if is_rank_zero():
        if built.checkpoint_callback is not None:
            built.checkpoint_callback.restore_names(built.start.checkpoint_path, checkpoint)
        limit, setting = reached
        option = setting if setting == "max_tokens" else f"trainer.{setting}"
        logger.info(
            f"{config.folder}: already finished ({limit}); to train further, give a larger --{option}"
        )
    return True


def setup_data_early(built: BuiltRun, stage: str = "fit") -> None:
    """Read the text before anything is written; Lightning would create the loggers' files first."""
    built.trainer.strategy.connect(built.module)
    built.datamodule.trainer = built.trainer
    built.datamodule.setup(stage)
    if built.start.checkpoint_path is not None:
        _check_position(built.datamodule, read_checkpoint(built.start.checkpoint_path))


def _steps_of_run(built: BuiltRun) -> int | None:
    """Return the optimizer steps of a run from its start to its end; ``None`` if it has no end."""
    done = Progress()
    if built.start.checkpoint_path is not None:
        checkpoint = read_checkpoint(built.start.checkpoint_path)
        done = Progress(checkpoint["global_step"], checkpoint["tokens_seen"])
    return run_steps(built.datamodule.epoch_shape(), built.trainer, built.config.max_tokens, done)


def _check_schedule(built: BuiltRun, steps: int | None) -> Schedule:
    """Return the schedule of the run; one that does not fit its length is refused."""
    schedule = built.module.schedule
    if not built.config.trainer.get("fast_dev_run"):
        schedule.check_clipping(steps)
    return schedule.resolve(steps)


def _check_position(data: TextDataModule, checkpoint: dict[str, Any]) -> None:
    """Refuse data that differ from the checkpoint's before TensorBoard's files are changed."""
    recorded = checkpoint.get(type(data).__qualname__)
    if recorded is None:
        logger.warning(
            "ckpt_path: the checkpoint does not record its data (it was written by an earlier version), so the text is "
            "not verified"
        )
    else:
        data.load_state_dict(recorded)
    for position in checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", []):
        data.train_dataloader().load_state_dict(position)


def _check_compiler(built: BuiltRun) -> None:
    """Compile something small, to report a missing compiler in one line before the first step."""
    if not built.module.compile_blocks:
        return
    try:
        torch.compile(lambda x: x * x)(torch.zeros(1, device=built.trainer.strategy.root_device))
    except RuntimeError as error:
        cause = str(error).strip().splitlines()[0]
        raise ValueError(
            f"model.compile: {cause}; install what is missing, or leave it out"
        ) from error


@quiet_lightning()
def validate(config: RunConfig, *, val_only: bool = False) -> dict[str, Any]:
    """Compute loss and perplexity of a model on both splits of a text; every token has the same weight.

    The weights are those of ``ckpt_path`` (last, best or a path), else of ``init_from``.

    Args:
        val_only: Leave out the training split, which is much larger.

    Returns:
        Losses, perplexities, bits per byte and tokens of both splits, with the names of ``validate --json``, and
        what they were measured on: ``source``, ``text`` and its windows.

    Raises:
        ValueError, OSError: A setting cannot be used; the message is one line.
    """
    if config.ckpt_path == "auto":
        raise ValueError("ckpt_path: auto is for fit; give last, best or a path")
    if config.source is None:
        raise ValueError("init_from: validate needs weights; give --init_from SOURCE")
    built = build_run(config, trains=False)
    built.datamodule.validates_training = not val_only
    trainer = built.trainer
    if is_rank_zero():
        setup_data_early(built, "validate")
        _check_compiler(built)
        for warning in device_warnings(trainer):
            logger.warning(warning)
    init_elastic_process_group(trainer)
    try:
        with terminate_ranks_on_error(trainer):
            trainer.validate(built.module, datamodule=built.datamodule, verbose=False)
    except SystemExit as error:
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise
    metrics: dict[str, Any] = {
        name: value.item() for name, value in trainer.callback_metrics.items()
    }
    for split in ("val",) if val_only else ("train", "val"):
        metrics[f"{split}_tokens"] = int(metrics[f"{split}_tokens"])
    source = config.source
    # not one of our checkpoints, or on another drive of Windows than the working directory
    with suppress(FileNotFoundError, ValueError):
        source = Path(os.path.relpath(find_checkpoint(source))).as_posix()
    return {**metrics, "source": source, **built.datamodule.described()}
