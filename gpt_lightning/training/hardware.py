"""Peak FLOP/s of the training device, and a setting of glibc's malloc that makes steps on a CPU faster."""

import ctypes
import platform
from typing import Any

import torch

from gpt_lightning.model.cpu_peak import measured_peak
from gpt_lightning.model.hardware import PEAKS, gpu_value

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Keep the memory that a step frees in this process, for the next step.

    By default glibc returns every large freed tensor to the system, which gives it back as new, zeroed pages: with
    124M parameters this is 300,000 page faults a step, a quarter of its time (benchmarks/training.py). After this
    call the process keeps the memory of its peak, and unused gaps between tensors: up to 40 % more in total.

    Returns:
        Whether it was possible; it needs glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def peak_flops(device: torch.device, precision: Any) -> float | None:
    """Return the peak FLOP/s of a device, from a table or measured on a CPU; ``None`` if it is not known."""
    low = "bf16" in str(precision) or "16" in str(precision)
    if device.type == "cpu":
        return measured_peak(torch.bfloat16 if low else torch.float32)
    if device.type != "cuda" or not low:
        return None
    return gpu_value(PEAKS, torch.cuda.get_device_name(device))
