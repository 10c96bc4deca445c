"""How fast a run is: tokens a second, share of the hardware's peak, what it waits for."""

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from gpt_lightning.data.dataloader import Batch, ResumableDataLoader
from gpt_lightning.model.flops import flops_per_token
from gpt_lightning.training.loggers import log_metrics
from gpt_lightning.training.module import GPTLightningModule

# dense 16-bit matrix products, FLOP/s, from the makers' data sheets; by what torch calls the device
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
OLDER_THAN_AMPERE = ("V100", "T4")
# bytes, from the same; the A100, H100 and V100 with most. Of the gibibytes that the makers sell as GB, 7 % are
# left out: CUDA itself and gaps take them
MEMORY = {
    "B200": 180e9,
    "H200": 141e9,
    "H100 PCIe": 80e9,
    "H100 NVL": 94e9,
    "H100": 80e9,
    "A100": 80e9,
    "L40S": 48e9,
    "L4": 24e9,
    "A10": 24e9,
    "V100": 32e9,
    "T4": 16e9,
    "RTX 4090": 24e9,
    "RTX 3090": 24e9,
}


class Stopwatch:
    """Wall-clock seconds of training alone: what evaluates, samples and saves stops it meanwhile."""

    def __init__(self) -> None:
        self._stopped = 0.0
        self._stopped_at = 0.0

    def seconds(self) -> float:
        """Not while it is stopped."""
        return time.perf_counter() - self._stopped

    def stop(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # what was begun before belongs to training
        self._stopped_at = time.perf_counter()

    def go_on(self, device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._stopped += time.perf_counter() - self._stopped_at

    @contextmanager
    def stopped(self, device: torch.device) -> Iterator[None]:
        self.stop(device)
        try:
            yield
        finally:
            self.go_on(device)


class SpeedMonitor(Callback):
    """Logs every ``every_n_steps`` updates what the updates since the last time were like.

    ``throughput/tokens_per_second`` over all devices; ``throughput/step_seconds``;
    ``throughput/loading_share`` of the time in which no batch was there yet; ``throughput/memory_gb``, resident or
    on the GPU at most; ``throughput/mfu``, model FLOP/s over the peak of all devices, where that is known. The
    first update of a process, which compiles and warms up, is not counted, unless it alone is due.

    Args:
        clock: Stopped by what is no training.
    """

    def __init__(self, clock: Stopwatch, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"throughput.every_n_steps: {every_n_steps} is too small; give 1 or more"
            )
        self.clock = clock
        self.every_n_steps = every_n_steps
        self.peak: float | None = None
        self._asked_peak = False
        self.figures: dict[str, float] = {}
        self._tokens = 0
        self._steps = 0
        self._seen_step = -1
        self._warms_up = True
        self._began = 0.0
        self._loading = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step
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
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        self._steps += 1
        # by the step alone, so that a resumed run logs where one that was not cut does
        step = trainer.global_step - 1
        due = step > 0 and step % self.every_n_steps == 0
        if not due and not self._warms_up:
            return
        self._warms_up = False
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if due:
            self._log(trainer, pl_module, batch[0].shape[1], step)
        self._start_interval(trainer)

    def _start_interval(self, trainer: Trainer) -> None:
        self._began, self._loading = self.clock.seconds(), _seconds_waited(trainer)
        self._tokens = self._steps = 0

    def _log(self, trainer: Trainer, module: LightningModule, length: int, step: int) -> None:
        assert isinstance(module, GPTLightningModule)
        seconds = self.clock.seconds() - self._began
        if not self._asked_peak:
            self._ask_peak(trainer, module)
        self.figures = figures(
            tokens=self._tokens,
            steps=self._steps,
            seconds=seconds,
            loading_seconds=_seconds_waited(trainer) - self._loading,
            flops_per_token=flops_per_token(module.config, length),
            peak=None if self.peak is None else self.peak * trainer.world_size,
        )
        self.figures["throughput/memory_gb"] = memory_bytes(module.device) / 1e9
        log_metrics(trainer, self.figures, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.stop(pl_module.device)  # Lightning's loop, with trainer.limit_val_batches

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.go_on(pl_module.device)

    def _ask_peak(self, trainer: Trainer, module: LightningModule) -> None:
        self._asked_peak = True
        with self.clock.stopped(module.device):
            self.peak = peak_flops(module.device, trainer.precision)
        if self.peak is None and trainer.is_global_zero:
            name = (
                torch.cuda.get_device_name(module.device)
                if module.device.type == "cuda"
                else module.device
            )
            print(
                f"gpt_lightning: throughput: the peak of {name} at {trainer.precision} is not known, so "
                "no MFU is logged",
                file=sys.stderr,
            )


def _seconds_waited(trainer: Trainer) -> float:
    loader = trainer.train_dataloader
    return loader.seconds_waited if isinstance(loader, ResumableDataLoader) else 0.0


def figures(
    *,
    tokens: int,
    steps: int,
    seconds: float,
    loading_seconds: float,
    flops_per_token: int,
    peak: float | None,
) -> dict[str, float]:
    """What :class:`SpeedMonitor` logs of ``steps`` updates."""
    rate = tokens / seconds
    found = {
        "throughput/tokens_per_second": rate,
        "throughput/step_seconds": seconds / steps,
        "throughput/loading_share": loading_seconds / seconds,
    }
    if peak is not None:
        found["throughput/mfu"] = rate * flops_per_token / peak
    return found


def peak_flops(device: torch.device, precision: Any) -> float | None:
    """FLOP/s of one device at most: from ``PEAKS``, of a CPU measured; none: not known."""
    low = "bf16" in str(precision) or "16" in str(precision)
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if low else torch.float32)
    if device.type != "cuda" or not low:
        return None
    return gpu_value(PEAKS, torch.cuda.get_device_name(device))


# a word in a device's name that makes it less than the card without: "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
_LESS = re.compile(r"\b(MIG|NVL|Laptop|D)\b")


def gpu_value(table: dict[str, float], name: str) -> float | None:
    """A table's entry by what torch calls the device, in whole words: an L40 is no L4, a slice no whole card."""
    key = next((key for key in table if re.search(rf"\b{key}\b", name)), None)
    if key is None or set(_LESS.findall(name)) - set(_LESS.findall(key)):
        return None
    return table[key]


def measured_peak(dtype: torch.dtype, size: int = 1536, repeats: int = 3) -> float:
    """Of square matrix products on the CPU, the fastest of some.

    They grow to ``size`` while one stays below half a second: a CPU without instructions for bfloat16
    multiplies it sixty times slower than float32.
    """
    n = min(96, size)
    while True:
        a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(dtype)
        a @ a
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - began)
        if n == size or 8 * min(seconds) > 0.5:
            return 2 * n**3 / min(seconds)
        n = min(2 * n, size)


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
