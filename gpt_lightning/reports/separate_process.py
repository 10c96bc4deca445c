"""A measurement in a new process, so that its peak memory is known and a lack of memory ends nothing else."""

import re
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch


class ProcessKilledError(RuntimeError):
    """The process was killed from outside."""


def run_in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what the function returns in a new process.

    Raises:
        ProcessKilledError: The process was killed.
        Exception: What the function raises.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            raise ProcessKilledError(
                "its process was killed, probably because memory was full"
            ) from error


def peak_memory(device: str) -> int:
    """The peak resident memory of this process; on a GPU the peak that torch allocated there."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # getrusage also counts the memory of the process that started this one, such as a notebook's kernel
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if (peak_kb := re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)) is not None:
            return int(peak_kb[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
