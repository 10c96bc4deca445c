"""The private parts of Lightning that we use, and what they need to stay right."""

import inspect
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count, repeat
from typing import Any

import lightning
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loops.optimization.automatic import ClosureResult
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from gpt_lightning.data.dataloader import Batch

logger = logging.getLogger(__name__)

# The Lightning versions that the fast loop was tested with. Any other runs Lightning's own loop.
TESTED_VERSIONS = ("2.6.6",)

# Strategies and precisions that do nothing more in a step than the fast loop does. Subclasses may do more.
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy)
_PRECISIONS = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
# Methods that the fast loop does not call, so a module or data module that overrides one gets Lightning's loop.
_NOT_CALLED = {
    LightningModule: (
        "backward",
        "optimizer_step",
        "optimizer_zero_grad",
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    ),
    LightningDataModule: (
        "on_before_batch_transfer",
        "transfer_batch_to_device",
        "on_after_batch_transfer",
    ),
}

SubprocessLauncher = _SubprocessScriptLauncher


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """Return the checkpoint that ``trainer.save_checkpoint`` would write now."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return checkpoint


def can_stop_early(trainer: Trainer) -> bool:
    """Return whether ``trainer.should_stop`` ends the run now: ``min_steps`` and ``min_epochs`` are reached."""
    return bool(trainer.fit_loop._can_stop_early)


def set_logged_steps(loop: dict[str, Any], steps: int) -> None:
    """Set the step that Lightning logs with next, in a checkpoint's state of the fit loop."""
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def forks_processes(strategy: Strategy) -> bool:
    """Return whether the strategy starts its processes by forking, as ``ddp_fork`` and ``ddp_notebook`` do."""
    return getattr(strategy, "_start_method", "popen") != "popen"


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Use all devices for data parallelism; ``auto`` would split matrices among a node's devices."""
    strategy._data_parallel_size = size
    strategy._tensor_parallel_size = 1


class FastTrainingEpochLoop(_TrainingEpochLoop):
    """Epoch loop with the same steps, hooks, counters and state as Lightning's, but 0.2 to 0.5 ms a step.

    Lightning's own loop asks every callback for every hook and wraps a step in closures, contexts and profiler
    names, which costs about 2 ms a step (benchmarks/README.md). :func:`fast_loop_unsupported_reason` says when its
    code runs all the same. Callbacks and their hooks are looked up when an epoch starts.

    A resumed run continues at the position that its checkpoint has (:class:`gpt_lightning.training.loop_state.LoopState`), with what followed in the
    run that was saved: the end of the batch, Lightning's validation if it is due, then the next batch or the hooks
    at the end of the epoch. Lightning's own restart does not distinguish all positions, and miscounts epochs.
    """

    _at_batch_end = False
    _has_logged = False
    _is_manual = False

    def update_restart_stage(self) -> None:
        """Nothing: :meth:`reset` alone decides where a resumed run continues."""

    def reset(self) -> None:
        fit_loop = self.trainer.fit_loop
        # Lightning does not load the data's position where the epoch of the checkpoint is complete
        if (positions := fit_loop._combined_loader_states_to_load) and fit_loop._combined_loader:
            fit_loop._combined_loader._load_state_dicts(positions)
            fit_loop._combined_loader_states_to_load = []
        resumed = self._restarting and fit_loop.restarted_mid_epoch
        self.restarting = False  # of this loop and those in it
        self._at_batch_end = False
        if not resumed:  # a new epoch
            super().reset()
            return
        _enter_epoch_again(self.trainer)
        progress = self.batch_progress
        batches = self.trainer.num_training_batches
        if batches != math.inf:  # the epoch may have another length now
            progress.is_last_batch = progress.current.ready >= batches
        self._at_batch_end = progress.current.completed < progress.current.ready
        if self._at_batch_end:
            progress.increment_completed()

    def on_run_start(self, data_fetcher: Any) -> None:
        super().on_run_start(data_fetcher)
        trainer, module = self.trainer, self.trainer.lightning_module
        strategy = trainer.strategy
        self._is_manual = not module.automatic_optimization
        reason = fast_loop_unsupported_reason(trainer)
        self._is_fast = reason is None
        if reason is not None and not self._has_logged:
            self._has_logged = True
            logger.info(f"training uses Lightning's own loop, which is slower: {reason}")
        if self._is_fast:
            data_fetcher._start_profiler = data_fetcher._stop_profiler = _nothing
            loaders = data_fetcher.combined_loader._iterator.iterators
            if len(loaders) == 1:  # in the form in which it gives those of several
                data_fetcher.iterator = zip(loaders[0], count(), repeat(0))
        self._validates = trainer.enable_validation or bool(trainer.lr_scheduler_configs)
        wrapped = strategy.model is not module or type(trainer.precision_plugin) is not Precision
        self._training_step = strategy.training_step if wrapped else module.training_step
        self._calls = {hook: _calls(hook, trainer.callbacks, trainer, module) for hook in _HOOKS}
        self._module_state = vars(module)  # nn.Module is slow in setting an attribute
        if self._at_batch_end:
            self._at_batch_end = False
            self.on_advance_end(data_fetcher)

    @property
    def global_step(self) -> int:
        """Optimizer steps so far. Lightning's property asks the module each time whether it optimizes manually."""
        if self._is_manual:
            return super().global_step
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed

    def advance(self, data_fetcher: Any) -> None:
        """A batch: a step, or with accumulation a part of one."""
        if not self._is_fast:
            super().advance(data_fetcher)
            return
        trainer, progress = self.trainer, self.batch_progress
        batch, _, _ = next(data_fetcher)
        batch_idx = progress.current.ready
        progress.is_last_batch = data_fetcher.done
        if trainer.strategy.root_device.type != "cpu":  # where the loader makes them
            batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        progress.increment_ready()
        self._log_of(batch)
        if self._call("on_train_batch_start", batch, batch_idx) == -1:  # skip the rest of the epoch
            progress.increment_by(0, is_last_batch=True)
            progress.increment_processed()
            raise StopIteration
        progress.increment_started()
        outputs = self._step(batch, batch_idx)
        progress.increment_processed()
        self._call("on_train_batch_end", outputs, batch, batch_idx)
        logged = bool(self._results)  # by self.log
        if logged:
            trainer._logger_connector.on_batch_end()
        progress.increment_completed()
        if logged:
            trainer._logger_connector.update_train_step_metrics()
        self._results.batch = None

    def on_advance_end(self, data_fetcher: Any) -> None:
        """Validation, where Lightning's loop does it and not an evaluation of ours."""
        if self._validates or self.trainer.should_stop or self.trainer.received_sigterm:
            super().on_advance_end(data_fetcher)
        elif not self._should_accumulate():
            self._batches_that_stepped += 1

    def _log_of(self, batch: Batch) -> None:
        """Set the batch for self.log, as ``_LoggerConnector.on_batch_start`` does."""
        connector = self.trainer._logger_connector
        connector._first_loop_iter = connector._first_loop_iter is None
        self._results.batch = batch
        self._results.batch_size = self._results.dataloader_idx = None

    def _step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        trainer = self.trainer
        strategy = trainer.strategy
        counts = self.automatic_optimization.optim_progress.optimizer
        optimizer = trainer.optimizers[0]
        accumulates = self._should_accumulate()
        if not accumulates:
            counts.step.increment_ready()
        waits = accumulates and isinstance(strategy, ParallelStrategy)
        with strategy.block_backward_sync() if waits else nullcontext():
            self._module_state["_current_fx_name"] = "training_step"
            output = self._training_step(batch, batch_idx)
            self._module_state["_current_fx_name"] = None
            loss: Tensor | None
            extra: dict[str, Any] = {}
            if type(output) is Tensor:
                loss = output
                if trainer.accumulate_grad_batches > 1:
                    loss = loss / trainer.accumulate_grad_batches
            else:
                loss, extra = self._loss_and_extra(output)
            if batch_idx % trainer.accumulate_grad_batches == 0:
                counts.zero_grad.increment_ready()
                self._call("on_before_zero_grad", optimizer)
                counts.zero_grad.increment_started()
                optimizer.zero_grad()
                counts.zero_grad.increment_completed()
            if loss is not None:
                self._call("on_before_backward", loss)
                loss.backward()
                self._call("on_after_backward")
        if not accumulates:
            self._call("on_before_optimizer_step", optimizer)
            trainer.lightning_module.configure_gradient_clipping(
                optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
            )
            optimizer.step()
            counts.step.increment_completed()
        return {} if loss is None else {"loss": loss.detach(), **extra}

    def _loss_and_extra(self, output: Any) -> tuple[Tensor | None, dict[str, Any]]:
        """The loss of a ``training_step`` that returns a dict or None, and the dict's other values."""
        trainer = self.trainer
        if output is None and trainer.world_size > 1:
            raise RuntimeError(
                "training_step returned None, which training on several devices does not support"
            )
        result = ClosureResult.from_training_step_output(output, trainer.accumulate_grad_batches)
        if result.closure_loss is None:
            self._warning_cache.warn("`training_step` returned `None`: the batch has no gradient")
        return result.closure_loss, result.extra

    def _call(self, hook: str, *arguments: Any) -> object:
        """Call the callbacks' hooks, then the module's; return what the last one returns."""
        if not (calls := self._calls[hook]):
            return None
        self._module_state["_current_fx_name"] = hook  # for self.log
        for call in calls:
            returned = call(*arguments)
        self._module_state["_current_fx_name"] = None
        return returned


def fast_loop_unsupported_reason(trainer: Trainer) -> str | None:
    """Return what the run has that only Lightning's own loop does; ``None`` if the fast loop can run it."""
    module, strategy, precision = (
        trainer.lightning_module,
        trainer.strategy,
        trainer.precision_plugin,
    )
    is_ours = type(strategy).__module__.startswith("gpt_lightning.")
    for base, instance in (
        (LightningModule, module),
        (LightningDataModule, trainer.datamodule),  # type: ignore[attr-defined]
    ):
        for name in _NOT_CALLED[base]:
            if instance is not None and is_overridden(name, instance, base):
                return f"{type(instance).__name__} overrides {name}"
    if not module.automatic_optimization:
        return "the module uses manual optimization"
    if len(trainer.optimizers) != 1:
        return f"there are {len(trainer.optimizers)} optimizers"
    closure = inspect.signature(type(trainer.optimizers[0]).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        return f"{type(trainer.optimizers[0]).__name__} needs a closure"
    if type(trainer.profiler) is not PassThroughProfiler:  # type: ignore[attr-defined]
        return "a profiler is on"
    if type(strategy) not in _STRATEGIES and not is_ours:
        return f"the strategy is {type(strategy).__name__}"
    if type(precision) not in _PRECISIONS:
        return f"the precision plugin is {type(precision).__name__}"
    if getattr(precision, "scaler", None) is not None:
        return "gradients are scaled"
    if getattr(strategy, "_model_averager", None) is not None:  # DDP's local SGD
        return "replicas are averaged"
    if trainer.lr_scheduler_configs:
        return "a callback sets the learning rate"
    return None


def _nothing() -> None:
    pass


def _enter_epoch_again(trainer: Trainer) -> None:
    """Call ``on_train_epoch_start`` where a run resumes within an epoch, for what callbacks set there.

    A GradientAccumulationScheduler sets the number of micro-batches of a step there. A callback with a state in the checkpoint
    keeps what it did there, and is not called. What the others log there was logged by the run that was saved.
    """
    module = trainer.lightning_module
    loggers, trainer.loggers = trainer.loggers, []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if type(callback).state_dict is Callback.state_dict:
            callback.on_train_epoch_start(trainer, module)
    module.on_train_epoch_start()
    trainer.loggers = loggers


def _calls(
    hook: str, callbacks: list[Callback], trainer: Trainer, module: LightningModule
) -> list[Callable[..., object]]:
    """Of the callbacks, then the module, those that have made ``hook`` their own."""
    calls: list[Callable[..., object]] = [
        partial(getattr(callback, hook), trainer, module)
        for callback in callbacks
        if callable(getattr(callback, hook))
        and (
            hook in vars(callback)  # as LambdaCallback's
            or getattr(type(callback), hook) is not getattr(Callback, hook)
        )
    ]
    if getattr(type(module), hook) is not getattr(LightningModule, hook):
        calls.append(getattr(module, hook))
    return calls


def use_fast_epoch_loop(trainer: Trainer) -> None:
    """Replace Lightning's epoch loop, unless this Lightning is not one of :data:`TESTED_VERSIONS`."""
    if lightning.__version__ not in TESTED_VERSIONS:
        logger.warning(
            f"lightning {lightning.__version__} was not tested (only {', '.join(TESTED_VERSIONS)}): training uses "
            "its own loop, which is slower and may not resume exactly"
        )
        return
    loop = trainer.fit_loop
    loop.epoch_loop = FastTrainingEpochLoop(
        trainer, loop.epoch_loop.min_steps, loop.epoch_loop.max_steps
    )


def set_logger_run_id(logger: Logger, run_id: str) -> None:
    """Make a W&B or MLflow logger that has written nothing continue a run, unless the user has named one."""
    if isinstance(logger, MLFlowLogger):
        logger._run_id = logger._run_id or run_id
    elif isinstance(logger, WandbLogger):
        logger._id = logger._id or run_id
        logger._wandb_init["id"] = logger._id


def has_mlflow_run(logger: MLFlowLogger, run_id: str) -> bool:
    """Return whether there is an MLflow run that a logger can continue: it may be deleted, or on another machine."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(logger._mlflow_client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def tag_changed_hyperparams(logger: MLFlowLogger, before: dict[str, Any], step: int) -> None:
    """Make an MLflow logger write the hyperparameters that a resumed run has changed to tags of its run.

    MLflow refuses another value of a parameter.

    Args:
        logger: Logger of the resumed run.
        before: Hyperparameters of the checkpoint.
        step: Steps before the change.
    """
    old = _flatten_dict(before)

    def log_hyperparams(params: Any) -> None:
        new = _flatten_dict(_convert_params(params))
        for name in [name for name in new if name in old and str(new[name]) != str(old[name])]:
            logger.experiment.set_tag(logger.run_id, f"{name} from step {step}", str(new[name]))
        logged = logger.experiment.get_run(logger.run_id).data.params
        added = {name: value for name, value in new.items() if name not in logged}
        type(logger).log_hyperparams(logger, added)

    logger.log_hyperparams = log_hyperparams  # type: ignore[method-assign]
