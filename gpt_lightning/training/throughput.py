"""Speed of a run: tokens a second, model FLOPs utilization, time spent waiting for data."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.training.hardware import peak_flops
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import GPTLightningModule
from gpt_lightning.training.step_callback import StepEndCallback

logger = logging.getLogger(__name__)


class Stopwatch:
    """Stopwatch of training alone: evaluation, sampling and saving stop it."""

    def __init__(self) -> None:
        self._stopped = 0.0
        self._stopped_at = 0.0

    def seconds(self) -> float:
        """Return the seconds that it has run; only while it runs."""
        return time.perf_counter() - self._stopped

    def stop(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # kernels that were launched before belong to training
        self._stopped_at = time.perf_counter()

    def resume(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._stopped += time.perf_counter() - self._stopped_at

    @contextmanager
    def stopped(self, device: torch.device) -> Iterator[None]:
        self.stop(device)
        try:
            yield
        finally:
            self.resume(device)


class SpeedMonitor(StepEndCallback):
    """Callback that logs the speed of training every ``every_n_steps`` steps, over the steps since the last time.

    - ``throughput/tokens_per_second``: over all devices.
    - ``throughput/step_time``: seconds per optimizer step.
    - ``throughput/data_wait_fraction``: fraction of the time that training waited for a batch.
    - ``throughput/peak_memory_gb``: peak of the GPU's allocated memory; on a CPU the resident memory now.
    - ``throughput/mfu``: model FLOP/s divided by the peak of all devices, if the peak is known.

    The first step of a process compiles and warms up. It is not counted, unless no other step is.

    Args:
        clock: Stopwatch that runs while the run trains.
    """

    def __init__(self, clock: Stopwatch, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"throughput.every_n_steps: {every_n_steps} is too small; give 1 or more"
            )
        self.clock = clock
        self.every_n_steps = every_n_steps
        self.peak: float | None = None
        self._has_measured_peak = False
        self.metrics: dict[str, float] = {}
        self._tokens = 0
        self._steps = 0
        self._length = 0
        self._warms_up = True
        self._began = 0.0
        self._loading = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._warms_up = True
        self._start_interval(trainer)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        self._tokens += batch[0].numel() * trainer.world_size
        self._length = batch[0].shape[1]
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, batch_idx: int) -> None:
        self._steps += 1
        # The step alone decides, so that a resumed run logs at the same steps as an uninterrupted run.
        step = trainer.global_step - 1
        due = step > 0 and step % self.every_n_steps == 0
        if not due and not self._warms_up:
            return
        self._warms_up = False
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if due:
            self._log(trainer, pl_module, step)
        self._start_interval(trainer)

    def _start_interval(self, trainer: Trainer) -> None:
        self._began, self._loading = self.clock.seconds(), _seconds_waited(trainer)
        self._tokens = self._steps = 0

    def _log(self, trainer: Trainer, module: LightningModule, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        seconds = self.clock.seconds() - self._began
        if not self._has_measured_peak:
            self._measure_peak(trainer, module)
        self.metrics = speed_metrics(
            tokens=self._tokens,
            steps=self._steps,
            seconds=seconds,
            loading_seconds=_seconds_waited(trainer) - self._loading,
            flops_per_token=flops_per_token(module.config, self._length),
            peak=None if self.peak is None else self.peak * trainer.world_size,
        )
        self.metrics["throughput/peak_memory_gb"] = memory_bytes(module.device) / 1e9
        log_metrics(trainer, self.metrics, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.stop(pl_module.device)  # Lightning's loop, with trainer.limit_val_batches

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume(pl_module.device)

    def _measure_peak(self, trainer: Trainer, module: LightningModule) -> None:
        self._has_measured_peak = True
        with self.clock.stopped(module.device):
            self.peak = peak_flops(module.device, trainer.precision)
        if self.peak is None and trainer.is_global_zero:
            name = (
                torch.cuda.get_device_name(module.device)
                if module.device.type == "cuda"
                else module.device
            )
            logger.warning(
                f"throughput: the peak FLOP/s of {name} at {trainer.precision} is not known, so "
                "no MFU is logged"
            )


def _seconds_waited(trainer: Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.seconds_waited if isinstance(loader, ResumableDataLoader) else 0.0


def speed_metrics(
    *,
    tokens: int,
    steps: int,
    seconds: float,
    loading_seconds: float,
    flops_per_token: int,
    peak: float | None,
) -> dict[str, float]:
    """Compute what :class:`SpeedMonitor` logs after ``steps`` optimizer steps."""
    rate = tokens / seconds
    metrics = {
        "throughput/tokens_per_second": rate,
        "throughput/step_time": seconds / steps,
        "throughput/data_wait_fraction": loading_seconds / seconds,
    }
    if peak is not None:
        metrics["throughput/mfu"] = rate * flops_per_token / peak
    return metrics


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
