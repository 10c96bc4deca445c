"""The benchmarks run, and end with one line of JSON."""

import json
import shutil
from pathlib import Path

import pytest

from helpers import (
    ROOT,
    python,
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        pytest.param("generation", ["--repeats=1"], marks=pytest.mark.slow),
        pytest.param("saving", ["--repeats=1"], marks=pytest.mark.slow),
        pytest.param("startup", ["--tiny", "--repeats=1"], marks=pytest.mark.slow),
        pytest.param("serving", [], marks=pytest.mark.slow),
        pytest.param(
            "exploring",
            ["--repeats=1"],
            marks=[
                pytest.mark.browser,
                pytest.mark.slow,
                pytest.mark.skipif(CHROMIUM is None, reason="no chromium here"),
            ],
        ),
        pytest.param("windows", [], marks=pytest.mark.slow),
        pytest.param("data", ["--repeats=1"], marks=pytest.mark.slow),
        pytest.param("plan", [], marks=pytest.mark.nightly),
        pytest.param("loading", [], marks=pytest.mark.slow),
        pytest.param("training", ["--repeats=1"], marks=pytest.mark.slow),
        pytest.param("speculation", ["--repeats=1"], marks=pytest.mark.slow),
        pytest.param("muon", ["--rounds=1"], marks=pytest.mark.slow),
    ],
)
def test_benchmarks_run_and_end_with_json(name: str, arguments: list[str]) -> None:
    completed = python(f"benchmarks/{name}.py", "--tiny", *arguments, cwd=ROOT)
    assert completed.returncode == 0, completed.stderr
    result = json.loads(completed.stdout.splitlines()[-1])
    assert result["targets"]
    assert all({"name", "value", "passed"} <= set(target) for target in result["targets"])
    assert result["machine"]["versions"]["torch"]


@pytest.mark.nightly
def test_tokens_to_a_loss_resumes(tmp_path: Path) -> None:
    """The second call finds all runs in RESULTS.jsonl."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {i} towers of town {i % 7}." for i in range(60_000)))
    script = ("benchmarks/tokens_to_loss.py", "--tiny", f"--corpus={text}", f"--work={tmp_path}")
    first, second = (python(*script, cwd=ROOT, timeout=600) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    results = (tmp_path / "RESULTS.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in results]
    assert len(names) == len(set(names)) >= 11
    measured = [json.loads(done.stdout.splitlines()[-1])["measured"] for done in (first, second)]
    assert measured[0] == measured[1]
    (one,) = measured[0]
    curves = [json.loads(line) for line in results]
    best = {
        r["optimizer"]: min(
            s["val_loss"]
            for s in curves
            if s["optimizer"] == r["optimizer"] and s["share"] in (0.7, 1)
        )
        for r in curves
    }
    assert one["adamw_losses"] == [best["adamw"]]
    assert one["muon_losses"]["0.7"] == [best["muon"]]


@pytest.mark.nightly
def test_tokens_to_a_loss_refuse_a_text_that_is_too_short(tmp_path: Path) -> None:
    """A run that sees fewer tokens than its recipe says would change the share."""
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {i} towers of town {i % 7}." for i in range(5_000)))
    script = ("benchmarks/tokens_to_loss.py", "--tiny", f"--corpus={text}", f"--work={tmp_path}")
    result = python(*script, cwd=ROOT)
    assert result.returncode == 1
    assert "give more text" in result.stderr
    assert not (tmp_path / "RESULTS.jsonl").exists()


@pytest.mark.slow
def test_benchmark_against_the_harness_runs() -> None:
    pytest.importorskip("lm_eval", reason="needs the extra harness")
    test_benchmarks_run_and_end_with_json("evaluating", [])


@pytest.mark.parametrize("ready", ["", "echo ready\nread line\n"])
def test_error_of_a_peer_process_is_shown(tmp_path: Path, ready: str) -> None:
    """benchmarks/worker.py, of a process that ends before it is ready, or instead of a step."""
    peer = tmp_path / "python"
    peer.write_text(f"#!/bin/sh\n{ready}echo 'MemoryError: none left' >&2\nexit 3\n")
    peer.chmod(0o755)
    program = f"from worker import Worker; Worker('train', {str(peer)!r}, 'litgpt', {{}}).go()"
    result = python("-c", program, cwd=ROOT / "benchmarks")
    assert result.stderr.endswith("RuntimeError: litgpt: ended with 3: MemoryError: none left\n")
