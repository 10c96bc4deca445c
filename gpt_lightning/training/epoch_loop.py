"""Lightning's loop over an epoch's batches, whose usual step runs straight through.

Lightning's own asks each callback for each hook, wraps a step in closures, contexts and names for a profiler,
and on several devices has all of them wait for each other before each batch: two thirds of what ``fit`` took
above a plain loop (benchmarks/README.md).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import count, repeat
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.plugins import (
    DoublePrecision,
    HalfPrecision,
    MixedPrecision,
    Precision,
)
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy, SingleDeviceStrategy

from gpt_lightning.data.dataloader import Batch
from gpt_lightning.training.distributed import FSDP2Strategy

# those that do no more in a step than is done here; ones derived from them may
_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, FSDP2Strategy)
_PRECISIONS = (Precision, MixedPrecision, HalfPrecision, DoublePrecision)
_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)


class FastTrainingEpochLoop(_TrainingEpochLoop):
    """The same steps, hooks in the same order, counts and state as Lightning's.

    Lightning's own runs where it does more: with a profiler, another's strategy or precision, the gradient scaler
    of 16-mixed, a callback's learning rates (StochasticWeightAveraging), averaged replicas. Callbacks and their
    hooks are looked up as an epoch begins. A hook ends no epoch by returning -1; ``trainer.should_stop`` ends the
    run.

    A resumed run continues at the position that its checkpoint has (``loop_state.py``), with what followed in the
    run that was saved: the end of the batch, Lightning's validation if it is due, then the next batch or the hooks at
    the epoch's end. Lightning's own restart does not tell apart all positions, and loses count of epochs.
    """

    _at_batch_end = False

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
        self._straight = (
            type(trainer.profiler) is PassThroughProfiler
            and type(strategy) in _STRATEGIES
            and type(trainer.precision_plugin) in _PRECISIONS
            and getattr(trainer.precision_plugin, "scaler", None) is None
            and getattr(strategy, "_model_averager", None) is None  # DDP's local SGD
            and not trainer.lr_scheduler_configs  # a callback's
        )
        if self._straight:
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
        """Updates so far; Lightning's asks the module first whether it counts them itself."""
        return self.automatic_optimization.optim_progress.optimizer.step.total.completed

    def advance(self, data_fetcher: Any) -> None:
        """A batch: a step, or with accumulation a part of one."""
        if not self._straight:
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
        self._call("on_train_batch_start", batch, batch_idx)
        progress.increment_started()
        outputs = self._update(batch, batch_idx)
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
        """What self.log is told of a batch: ``_LoggerConnector.on_batch_start``."""
        figures = self.trainer._logger_connector
        figures._first_loop_iter = figures._first_loop_iter is None
        self._results.batch = batch
        self._results.batch_size = self._results.dataloader_idx = None

    def _update(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
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
            loss = self._training_step(batch, batch_idx)
            self._module_state["_current_fx_name"] = None
            if trainer.accumulate_grad_batches > 1:
                loss = loss / trainer.accumulate_grad_batches
            if batch_idx % trainer.accumulate_grad_batches == 0:
                counts.zero_grad.increment_ready()
                self._call("on_before_zero_grad", optimizer)
                counts.zero_grad.increment_started()
                optimizer.zero_grad()
                counts.zero_grad.increment_completed()
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
        return {"loss": loss.detach()}

    def _call(self, hook: str, *arguments: Any) -> None:
        if not (calls := self._calls[hook]):
            return
        self._module_state["_current_fx_name"] = hook  # for self.log
        for call in calls:
            call(*arguments)
        self._module_state["_current_fx_name"] = None


def _nothing() -> None:
    pass


def _enter_epoch_again(trainer: Trainer) -> None:
    """Call ``on_train_epoch_start`` where a run resumes within an epoch, for what callbacks set there.

    A GradientAccumulationScheduler sets the size of updates there. A callback whose state is in the checkpoint has
    what it did as its state, and is not called. What the others log there was logged by the run that was saved.
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
    """In place of Lightning's."""
    loop = trainer.fit_loop
    loop.epoch_loop = FastTrainingEpochLoop(
        trainer, loop.epoch_loop.min_steps, loop.epoch_loop.max_steps
    )
