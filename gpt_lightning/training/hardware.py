"""The machine that trains: its peak FLOP/s, and how its main memory is allocated."""

import ctypes
import platform
import time
from typing import Any

import torch

from gpt_lightning.model.hardware import PEAKS, gpu_value

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let what a step frees stay with the process, for the next step; for the rest of the process.

    glibc hands each large tensor that is freed back to the system, which hands it out again as new pages of
    zeros: for 124M parameters 300,000 page faults a step, a fourth of its time (benchmarks/training.py). The
    process then keeps what its largest moment took, and holes between what is in use: up to 40 % more in all.

    Returns:
        Whether it was done: with glibc alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def peak_flops(device: torch.device, precision: Any) -> float | None:
    """FLOP/s of one device at most: from ``PEAKS``, of a CPU measured; none: not known."""
    low = "bf16" in str(precision) or "16" in str(precision)
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if low else torch.float32)
    if device.type != "cuda" or not low:
        return None
    return gpu_value(PEAKS, torch.cuda.get_device_name(device))


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
