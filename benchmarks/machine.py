"""Description of the machine, timing with interleaved repeats, and targets."""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def description(*packages: str, **peers: str | None) -> dict[str, Any]:
    """CPU, GPU, package versions and commit. Versions of ``peers`` are read with the given interpreters."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = commit_of(Path(__file__).parent)
    versions = {}
    for package in ("torch", *packages):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    for peer, python in peers.items():
        if python:
            code = f"from importlib.metadata import version; print(version('{peer}'))"
            versions[peer] = subprocess.run(
                [python, "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
    machine = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
    return machine | {"gpu": gpu()} if torch.cuda.is_available() else machine


def commit_of(checkout: Path) -> str:
    """The commit of a git checkout; empty if it is none."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=checkout,
    ).stdout.strip()


def gpu() -> dict[str, Any]:
    """Name, memory and driver versions of the first GPU."""
    properties = torch.cuda.get_device_properties(0)
    try:
        driver = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
    except OSError:
        driver = ""
    return {
        "name": properties.name,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """``memory_gb``: peak memory of tensors on the GPU since the last reset. Empty on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}


def seconds_per_call(
    work: Callable[[], Any], device: torch.device, seconds: float, groups: int = 5
) -> list[float]:
    """Seconds per call of ``work`` in each of ``groups`` groups, which take about ``seconds`` together.

    ``work`` must be warmed up before.
    """
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    calls = max(1, min(1000, round(seconds / groups / (time.perf_counter() - start))))
    group_seconds = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        group_seconds.append((time.perf_counter() - start) / calls)
    return group_seconds


def interleaved(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, ``repeats`` times, in turn. A first round is warm-up and not counted.

    A function that returns a ``float`` returns its seconds itself.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            result = function()
            if repeat:
                own = isinstance(result, float)
                seconds[name].append(result if own else time.perf_counter() - start)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> float:
    """Median of the pairwise ratios. Load from other processes affects both runs of a pair alike."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def at_least(name: str, value: float, target: float) -> dict[str, Any]:
    """A result that passes if ``value`` is at least ``target``."""
    return {"name": name, "value": round(value, 4), "at_least": target, "passed": value >= target}


def at_most(name: str, value: float, target: float) -> dict[str, Any]:
    """A result that passes if ``value`` is at most ``target``."""
    return {"name": name, "value": round(value, 4), "at_most": target, "passed": value <= target}
