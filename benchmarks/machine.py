"""What every result says about where it was measured, and medians of interleaved repeats."""

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
    """Machine, its GPU where there is one, versions and commit; also of peers, each in the interpreter that is given."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    versions = {}
    for package in ("torch", *packages):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    for peer, python in peers.items():
        if python:
            asked = f"from importlib.metadata import version; print(version('{peer}'))"
            versions[peer] = subprocess.run(
                [python, "-c", asked], capture_output=True, text=True, check=True
            ).stdout.strip()
    about = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit,
    }
    return about | {"gpu": gpu()} if torch.cuda.is_available() else about


def gpu() -> dict[str, Any]:
    """The first GPU's name, memory and what drives it."""
    about = torch.cuda.get_device_properties(0)
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
        "name": about.name,
        "memory_gb": round(about.total_memory / 1e9, 1),
        "capability": f"{about.major}.{about.minor}",
        "driver": driver or "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """``memory_gb`` that tensors took on the GPU at most since that was set back; of a CPU nothing."""
    if device.type != "cuda":
        return {}
    return {"memory_gb": round(torch.cuda.max_memory_allocated(device) / 1e9, 2)}


def seconds_a_call(
    work: Callable[[], Any], device: torch.device, seconds: float, groups: int = 5
) -> list[float]:
    """Of each of ``groups`` rows of calls that take about ``seconds`` together; what is warm by now."""
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    calls = max(1, min(1000, round(seconds / groups / (time.perf_counter() - began))))
    found = []
    for _ in range(groups):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        found.append((time.perf_counter() - began) / calls)
    return found


def interleaved(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, ``repeats`` times, one after the other in turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(slower: list[float], faster: list[float]) -> float:
    """The median of the pairwise ratios: what one turn's weather does, it does to both."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def at_least(name: str, value: float, bar: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "at_least": bar, "holds": value >= bar}


def at_most(name: str, value: float, bar: float) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "at_most": bar, "holds": value <= bar}
