"""Stops a run after the current step: at ``max_tokens``, or on SIGTERM and Ctrl-C, with a checkpoint."""

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from lightning.pytorch import LightningModule, Trainer

from gpt_lightning.model.async_copy import AsyncHostCopy
from gpt_lightning.training.lightning_compat import can_stop_early
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.run_length import epoch_shape
from gpt_lightning.training.step_callback import StepEndCallback
from gpt_lightning.training.windows_console import ConsoleCloseHandler

logger = logging.getLogger(__name__)


class MaxTokens(StepEndCallback):
    """Callback that ends the run with the first optimizer step after which it has seen ``max_tokens`` tokens."""

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens} is too small; give 1 or more")
        self.max_tokens = max_tokens

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._end_when_seen(trainer, pl_module)  # a resumed run may be complete

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._end_when_seen(trainer, pl_module)

    def _end_when_seen(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, GPTLightningModule)
        if module.tokens_seen >= self.max_tokens:
            # as max_steps does, even before min_epochs and min_steps
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None
            trainer.should_stop = True

    def last_step(self, trainer: Trainer) -> int | None:
        """Return the last step of the run; ``None`` if it is not known."""
        module, epoch = trainer.lightning_module, epoch_shape(trainer)
        if not isinstance(module, GPTLightningModule) or epoch is None:
            return None
        left = max(0, self.max_tokens - module.tokens_seen)
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return trainer.global_step + epoch.steps_for(left, after_batches=done)


def ends_run(trainer: Trainer) -> bool:
    """Return whether the step that was just done is the last one of the run."""
    if trainer.should_stop:
        return can_stop_early(trainer)
    ends_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return ends_epochs or trainer.global_step == trainer.max_steps


# Signals and the command's exit codes. SLURM warns with SIGUSR1 before it terminates a job. On Windows, Ctrl-Break and
# a closed console are SIGBREAK.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}
if hasattr(signal, "SIGUSR1"):
    EXIT_CODES[signal.SIGUSR1] = 143
if hasattr(signal, "SIGBREAK"):
    EXIT_CODES[signal.SIGBREAK] = 143


@contextmanager
def default_signal_handlers() -> Iterator[None]:
    """Let signals end the process at once, as they do without :class:`GracefulStop`."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {
        signum: signal.signal(
            signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
        )
        for signum in EXIT_CODES
    }
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _reads_later(device: torch.device) -> bool:
    """Return whether the result of the ranks' all-reduce is read one step later, so that a GPU never waits for it."""
    return device.type == "cuda"


class GracefulStop(StepEndCallback):
    """Callback that stops the run after the current step, on all ranks, when any rank gets a signal.

    The signal handler only sets a flag. The ranks compare their flags after each step; with several GPUs they
    read the result one step later, so that no GPU waits. A second SIGINT interrupts at once. The handlers
    replace Lightning's during training: those of 2.6.6 exit with 0, and wait forever if a rank other than 0 got
    the signal.

    Attributes:
        received: Signal that stopped the run; ``None`` if there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._pending = 0
        self._compared: AsyncHostCopy | None = None
        self._console = ConsoleCloseHandler(self._note_close)

    @property
    def is_requested(self) -> bool:
        """Whether this rank has got a signal, so that the run stops after the current step."""
        return self._pending != 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._console.install()
        if threading.current_thread() is threading.main_thread():
            for signum in EXIT_CODES:
                signal.signal(signum, self._note)  # Lightning restores the handlers before

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self._pending:
            signal.default_int_handler(signum, frame)
        self._pending = self._pending or signum

    def _note_close(self) -> None:
        if hasattr(signal, "SIGBREAK"):
            self._note(signal.SIGBREAK, None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._console.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._console.remove()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        signum = self._from_all_ranks(pl_module.device) if trainer.world_size > 1 else self._pending
        if not signum or self.received is not None:
            return
        self.received = signal.Signals(signum)
        if trainer.is_global_zero:
            logger.warning(f"{self.received.name}: stopping after {trainer.global_step} steps")
        # now, even before min_epochs and min_steps
        trainer.fit_loop.min_epochs = 0
        trainer.fit_loop.epoch_loop.min_steps = None
        trainer.should_stop = True

    def _from_all_ranks(self, device: torch.device) -> int:
        """Return the highest signal number that any rank has noted, up to this step or the one before."""
        noted = torch.full((), self._pending, device=device)
        torch.distributed.all_reduce(noted, torch.distributed.ReduceOp.MAX)
        before, self._compared = self._compared, AsyncHostCopy(noted)
        compared = before if _reads_later(device) else self._compared
        return 0 if compared is None else int(compared.read())

    def requeue(self) -> None:
        """Ask SLURM to run the job again if its warning (SIGUSR1) stopped this run."""
        job = os.environ.get("SLURM_ARRAY_JOB_ID")
        if job is not None:
            job = f"{job}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
        job = job or os.environ.get("SLURM_JOB_ID")
        if job is None or self.received is None or self.received.name != "SIGUSR1":
            return
        try:
            subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            logger.warning(f"job {job} could not be requeued: {error}")
