"""``report sizes``: each model is measured or skipped."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.reports import model_comparison
from helpers import (
    ENVIRONMENT,
    Command,
    python,
    validated_losses,
)
from random_gpt2 import random_gpt2


def sizes(command: Command, *arguments: str) -> dict[str, Any]:
    result = command("report", "sizes", "--prompt=Every effort moves you", "--json",
                   "--device=cpu", *arguments)  # fmt: skip
    assert result.code == 0, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


def test_report_sizes_measures_each_model(gpt2: Any, command: Command, tmp_path: Path) -> None:
    Path("short.txt").write_text(read_corpus("sample")[:5000], encoding="utf-8")
    random_gpt2(tmp_path / "wider", emb_dim=48, n_positions=512)
    small, wide = sizes(command, "--from", "gpt2", "wider", "--text=short.txt", "--out=out",
                        "--context_length=64", "--num_samples=2", "--max_new_tokens=6")["models"]  # fmt: skip
    assert small["parameters"] == sum(p.numel() for p in gpt2.parameters())
    assert small["file_bytes"] == (tmp_path / "gpt2" / "model.safetensors").stat().st_size
    expected = validated_losses(
        command, "--init_from=gpt2", "--data.text=short.txt", "--data.context_length=64"
    )
    for name in ("train_loss", "val_loss", "train_perplexity", "val_perplexity"):
        assert small[name] == pytest.approx(expected[name], rel=1e-5)
    assert wide["parameters"] > small["parameters"]
    for model in (small, wide):
        assert model["tokens_per_second"] > 0
        assert 0 < model["seconds_to_first_token"] < 60
        assert model["peak_memory_bytes"] > model["parameters"] * 4
        assert len(model["samples"]) == 2
        assert all(text.startswith("Every effort moves you") for text in model["samples"])
    with (tmp_path / "out" / "sizes.csv").open(encoding="utf-8") as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["gpt2", "wider"]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text())["models"][0] == small
    assert (tmp_path / "out" / "sizes.png").read_bytes().startswith(b"\x89PNG")

    # generate gives the same samples with the same seed and settings
    result = command("generate", "--from=gpt2", "--prompt=Every effort moves you", "--json",
                   "--num_samples=2", "--max_new_tokens=6", "--temperature=1.5", "--top_k=50",
                   "--device=cpu")  # fmt: skip
    assert [sample["text"] for sample in json.loads(result.out)["samples"]] == small["samples"]


@pytest.mark.slow
def test_model_that_does_not_fit_is_skipped(gpt2: Any, command: Command, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "wider", emb_dim=48)
    arguments = ("--from", "gpt2", "wider", "--max_new_tokens=2", "--num_samples=1")
    small, wide = sizes(command, *arguments, "--max_memory=0.013")["models"]
    assert small["skipped"] is None
    assert wide["skipped"] == "needs about 0.021 GB, 0.013 GB are available"
    assert wide["samples"] == []
    result = command("report", "sizes", "--prompt=x", *arguments, "--max_memory=0", "--device=cpu")
    assert result.code == 0
    assert "gpt2: skipped: needs about" in result.out


def test_time_to_first_token_excludes_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's first pass takes a second, which must not be added to the first model only."""
    times = iter([[1.02, 0.5], [0.4], *[[0.008]] * 200, [0.008, 0.01, 0.3, 0.01]])
    monkeypatch.setattr(
        model_comparison, "_token_times", lambda model, task, new_tokens: next(times)
    )
    monkeypatch.setattr(model_comparison, "_MIN_FIRST_TOKEN_SECONDS", 0.4 + 199.5 * 0.008)
    task = model_comparison.ComparisonTask("x", model_comparison.SamplingParams(), 1, 4, 1)
    first_token, rate = model_comparison._speed(None, task)  # type: ignore[arg-type]
    assert first_token == 0.008
    assert rate == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="getrusage of other systems is not tried here")
def test_peak_memory_does_not_count_the_process_that_starts_the_measurement() -> None:
    """A notebook's kernel is larger than the small models that it compares."""
    measured = "import torch; from gpt_lightning.reports.model_comparison import peak_memory as f"
    large = np.ones(1_500_000_000 // 8)  # all pages are in memory
    result = python("-c", f"{measured}; print(f('cpu'))", env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert 50_000_000 < int(result.stdout) < large.nbytes / 2
