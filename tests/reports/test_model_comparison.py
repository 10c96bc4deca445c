"""``report sizes``: each model is measured or skipped."""

import csv
import html
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gpt_lightning import save_model
from gpt_lightning.data.corpus import read_corpus
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.data.unicode import printable
from gpt_lightning.reports import model_comparison
from gpt_lightning.reports.text_metrics import distinct_n, seq_rep_n
from helpers import (
    ENVIRONMENT,
    Command,
    assert_refused,
    json_of,
    python,
    tiny_gpt2_vocabulary,
    validated_losses,
)
from random_gpt2 import random_gpt2
from task_examples import write_tasks


def sizes(command: Command, *arguments: str) -> dict[str, Any]:
    result = command("report", "sizes", "--prompt=Every effort moves you", "--json",
                   "--device=cpu", *arguments)  # fmt: skip
    assert result.code == 0, result.err
    answer: dict[str, Any] = json.loads(result.out)
    return answer


def test_report_sizes_measures_each_model(gpt2: Any, command: Command, tmp_path: Path) -> None:
    Path("short.txt").write_text(read_corpus("sample")[:5000], encoding="utf-8")
    random_gpt2(tmp_path / "wider", emb_dim=48, n_positions=512)
    tasks = {"lambada": write_tasks(tmp_path)["lambada"]}
    small, wide = sizes(command, "--from", "gpt2", "wider", "--text=short.txt", "--out=out",
                        f"--tasks={json.dumps(tasks)}", "--context_length=64", "--num_samples=2", "--max_new_tokens=6")["models"]  # fmt: skip
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
        assert model["tasks"]["lambada"]["perplexity"] > 1000
        assert all(text.startswith("Every effort moves you") for text in model["samples"])
    with (tmp_path / "out" / "sizes.csv").open(encoding="utf-8") as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["gpt2", "wider"]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text())["models"][0] == small
    page = (tmp_path / "out" / "sizes.html").read_text(encoding="utf-8")
    assert "<td>lambada perplexity</td>" in page
    assert f"<td>{small['val_loss']:.6f}</td><td>{wide['val_loss']:.6f}</td>" in page
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
        model_comparison, "_token_times", lambda model, tokenizer, task, new_tokens: next(times)
    )
    monkeypatch.setattr(model_comparison, "_MIN_FIRST_TOKEN_SECONDS", 0.4 + 199.5 * 0.008)
    task = model_comparison.ComparisonTask("x", model_comparison.SamplingParams(), 1, 4, 1)
    first_token, rate = model_comparison._speed(None, GPT2, task)  # type: ignore[arg-type]
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


@pytest.mark.slow
def test_tasks_and_variety_are_beside_the_losses(
    gpt2: Any, command: Command, tmp_path: Path
) -> None:
    random_gpt2(tmp_path / "wider", emb_dim=48, n_positions=64)
    files = write_tasks(tmp_path)
    result = sizes(command, "--from", "gpt2", "wider", f"--tasks={json.dumps(files)}", "--task_limit=3",
                   "--max_new_tokens=9", "--num_samples=2", "--temperature=0", "--out=out")  # fmt: skip
    assert (result["settings"]["tasks"], result["settings"]["task_limit"]) == (files, 3)
    for model in result["models"]:
        for task, file in files.items():
            expected = json_of(command("evaluate", f"--from={model['source']}", f"--task={task}",
                                       f"--file={file}", "--limit=3", "--json"))  # fmt: skip
            for name, value in model["tasks"][task].items():
                assert value == pytest.approx(expected[name], rel=1e-5), (task, name)
        assert 0 < model["distinct_1"] <= 0.5  # two equal texts
        assert 0 <= model["seq_rep_4"] <= 1
    with (tmp_path / "out" / "sizes.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[1]["hellaswag_acc"]) == result["models"][1]["tasks"]["hellaswag"]["acc"]
    page = (tmp_path / "out" / "sizes.html").read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=(?!['\"]?data:)|https?://|@import|url\(", page)
    for text in ("hellaswag acc_norm", "distinct-2", "seq-rep-4", "peak memory"):
        assert f"<td>{text}</td>" in page
    assert "<td>train loss</td>" not in page  # there is no text
    for model in result["models"]:
        assert html.escape(printable(model["samples"][0])) in page


@pytest.mark.slow
def test_perplexity_of_a_large_loss_is_a_number(command: Command, tmp_path: Path) -> None:
    """e to the power of 1,000 is beyond the largest float."""
    model = tiny_gpt2_vocabulary()
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1e3
    save_model(model, tmp_path / "large")
    (measured,) = sizes(command, "--from", "large", "--text=sample", "--max_new_tokens=1",
                        "--num_samples=1", "--batch_size=64")["models"]  # fmt: skip
    assert measured["val_loss"] > 1000
    assert 1e300 < measured["val_perplexity"] < math.inf


@pytest.mark.slow
def test_page_of_a_skipped_model(gpt2: Any, command: Command, tmp_path: Path) -> None:
    random_gpt2(tmp_path / "wider", emb_dim=48)
    files = write_tasks(tmp_path)
    models = sizes(command, "--from", "wider", "gpt2", "--max_new_tokens=2", "--num_samples=1", "--out=out",
                   f"--tasks={json.dumps(files)}", "--max_memory=0.013")["models"]  # fmt: skip
    assert models[0]["tasks"] == dict.fromkeys(files)
    assert models[1]["tasks"]["lambada"]["examples"] == 2
    page = (tmp_path / "out" / "sizes.html").read_text(encoding="utf-8")
    assert "wider: skipped: needs about" in page
    assert re.search("<td>hellaswag acc</td><td></td><td>0", page)


def test_model_that_is_given_twice_is_refused(command: Command) -> None:
    """It would take two columns of one name."""
    result = command("report", "sizes", "--prompt=x", "--from", "a", "b", "a")
    assert_refused(result, "from: a is given more than once")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tasks=hellaswag"], ["hellaswag: its file is not downloaded", "download hellaswag"]),
        (["--tasks=helaswag"], ["helaswag is not a task; did you mean hellaswag?"]),
        (["--tasks={lambada: nowhere}"], ["nowhere cannot be read"]),
        (["--tasks={hellaswag: texts.jsonl}"], ["texts.jsonl, line 1: has no endings"]),
        (["--task_limit=0"], ["task_limit: 0 is too small"]),
    ],
)
@pytest.mark.usefixtures("gpt2")
def test_bad_tasks_of_a_comparison_are_refused(
    command: Command, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    write_tasks(tmp_path)
    result = command("report", "sizes", "--from", "gpt2", "--prompt=x", "--out=out", *arguments)
    assert_refused(result, "task", *parts)
    assert not (tmp_path / "out").exists()


def test_repetition_and_variety_are_those_of_their_definitions() -> None:
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4  # no pair spans two texts
    assert distinct_n([[], [1]], 2) == 0.0
    assert seq_rep_n([[1, 2, 3, 4, 5]], 4) == 0.0
    assert seq_rep_n([[7] * 8, [1, 2, 3, 4, 5], [1]], 4) == pytest.approx((1 - 1 / 5 + 0) / 2)
    assert seq_rep_n([[1, 2, 3]], 4) is None
