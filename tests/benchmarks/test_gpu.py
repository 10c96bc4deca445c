"""benchmarks/gpu.py: runs with a toy model without a GPU, and records failed and skipped variants."""

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import (
    ROOT,
    python,
)

ABLATION = ["eager fp32 (the book's model)", "TF32", "bf16", "SDPA (our model)", "fused AdamW",
          "compiled blocks", "padded vocabulary", "loss by chunks", "one kernel a chunk"]  # fmt: skip


def bench(*arguments: str) -> Any:
    return python(str(ROOT / "benchmarks" / "gpu.py"), "--tiny", *arguments, cwd=ROOT,
                  env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.slow
def test_all_variants_run_within_their_tolerance(tmp_path: Path) -> None:
    completed = bench("--out", str(tmp_path / "gpu.json"))
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "gpu.json").read_text()) == result
    found = result["results"]
    assert [name for name, entry in found.items() if {"failed", "skipped"} & set(entry)] == []
    assert [name for name in found if name.startswith("124M training")][: len(ABLATION)] == [
        f"124M training: {name}" for name in ABLATION
    ]
    for name, entry in found.items():
        if name == "hardware limits":
            assert entry["bf16_flop_per_s"] > 0
            continue
        assert entry["tokens_per_second"][0] > 0
        if "training" in name:
            assert entry["losses"][-1] < entry["losses"][0]
            assert ("deviation" in entry) == ("eager fp32" not in name)
        elif not any(word in name for word in ("transformers", "eager", "fit")):
            assert entry["deviation"] <= entry["tolerance"]
    assert {target["name"]: target["passed"] for target in result["targets"]} == {
        "every variant against float32: deviation / tolerance": True
    }


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark as a module."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if name in ("gpu", "gpu_training", "gpu_decoding", "machine"):
            del sys.modules[name]


@pytest.fixture
def runner(gpu: Any, tmp_path: Path) -> Any:
    import time

    import torch

    return gpu.BenchmarkRunner(
        torch.device("cpu"), time.perf_counter() + 60, tmp_path / "out.json", {}
    )


def test_failed_variant_is_recorded_and_the_next_runs(runner: Any, tmp_path: Path) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    runner.run("too large", 1, fails)
    runner.run("small", 1, lambda: {"tokens_per_second": [5.0, 4.0, 6.0]})
    runner.run("long", 1000, dict)
    found = json.loads((tmp_path / "out.json").read_text())["results"]
    assert found["too large"]["failed"] == (
        "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    )
    assert found["small"]["tokens_per_second"] == [5.0, 4.0, 6.0]
    assert found["long"]["skipped"].startswith("needs about 1000 s, ")


def test_variant_that_takes_too_long_is_stopped(runner: Any) -> None:
    def forever() -> dict[str, Any]:
        while True:
            pass

    runner.run("endless", 0.1, forever)
    assert runner.results["endless"]["failed"] == "took more than 0 s"


def test_targets_use_measured_variants_within_tolerance(gpu: Any, runner: Any) -> None:
    within_tolerance = {"deviation": 0.5, "tolerance": 1.0}
    runner.results = {
        "124M training: a": {"tokens_per_second": [470_000.0], **within_tolerance},
        "124M training: b": {"tokens_per_second": [600_000.0], "deviation": 2.0, "tolerance": 1.0},
        "124M training: c": {"tokens_per_second": [900_000.0]},
        "124M fit": {"tokens_per_second": [450_000.0, 440_000.0, 460_000.0]},
        "124M decoding, batch 1: graph": {"tokens_per_second": [9000.0], **within_tolerance},
        "124M decoding, batch 1: fused": {"tokens_per_second": [3000.0], **within_tolerance},
        "1558M training: a": {"skipped": "no time"},
    }
    checked, not_measured = gpu.check_targets(runner, "NVIDIA H200")
    assert [(target["name"], target["value"], target["passed"]) for target in checked] == [
        ("every variant against float32: deviation / tolerance", 2.0, False),
        ("124M, the fit command: tok/s", 450_000.0, False),
        ("124M, the fit command: tok/s, stretch", 450_000.0, False),
        ("124M training tok/s, the best variant", 470_000.0, True),
        ("124M training tok/s, the best variant, stretch", 470_000.0, False),
        ("124M decoding tok/s, batch 1", 3000.0, False),
    ]
    assert not_measured == ["1558M training tok/s", "1558M decoding tok/s, batch 1"]
    assert gpu.check_targets(runner, "NVIDIA A100")[1] == []


def test_error_without_a_gpu_names_tiny(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with warnings.catch_warnings(), pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert "there is no CUDA GPU; give --tiny" in capsys.readouterr().err
