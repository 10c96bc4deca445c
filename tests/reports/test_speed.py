"""``report speed``: every row has the losses of the book's model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt_lightning.reports import speed, speed_results
from gpt_lightning.reports.speed import Setup, SpeedTask
from helpers import TINY, TINY_MODEL, Command, assert_refused

BOOK = Setup(is_book=True)
CHANGES: list[dict[str, Any]] = [
    {}, {"fused": True}, {"dtype": "bfloat16"}, {"padded_vocabulary": True}, {"chunked": True},
    {"chunked": True, "padded_vocabulary": True, "fused": True},
]  # fmt: skip


def task(**changes: Any) -> SpeedTask:
    config = replace(TINY, **changes)
    rng = np.random.default_rng(0)
    windows = rng.integers(config.vocab_size, size=(11, config.context_length + 1))
    return SpeedTask(config, windows, 2, lr=1e-3, weight_decay=0.1, seed=1, chunk_size=16)


@pytest.mark.parametrize(
    "model", [{}, {"tied_embeddings": True, "qkv_bias": True}], ids=["", "tied"]
)
@pytest.mark.parametrize("changes", CHANGES, ids=lambda changes: " ".join(changes))
def test_losses_of_each_row_are_those_of_the_books_model(
    changes: dict[str, Any], model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "MAX_STEPS", 6)
    book, ours = (speed.measure(task(**model), setup, 60.0) for setup in (BOOK, Setup(**changes)))
    assert len(book.losses) == len(ours.losses) == 6
    assert len(set(book.losses)) == 6
    tolerance = speed.TOLERANCES[changes.get("dtype", "float32")]
    assert ours.losses == pytest.approx(book.losses, abs=tolerance)
    assert ours.losses != pytest.approx(
        [loss + 3 * tolerance for loss in book.losses], abs=tolerance
    )


def test_a_larger_batch_has_the_mean_loss_of_the_same_windows() -> None:
    book = speed.measure(task(), BOOK, 0.0)
    large = speed.measure(task(), Setup(batch_factor=speed.BATCH_FACTOR), 0.0)
    assert len(book.losses) == 2  # whatever the time
    assert large.losses[0] == pytest.approx(np.mean(book.first_losses), abs=1e-5)


def test_a_row_with_another_loss_is_reported(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are measured in this process, and the last one has other weights."""

    def measured(task: SpeedTask, setup: Setup, seconds: float) -> Any:
        found = speed.measure(task, setup, 0.0)
        if setup.chunked:
            return replace(found, losses=[loss + 0.5 for loss in found.losses])
        return found

    monkeypatch.setattr(speed, "_measure_apart", measured)
    changes = [("our model", "", {"is_book": False}), ("chunks", "", {"chunked": True})]
    monkeypatch.setattr(speed, "improvements", lambda device: changes)
    result = command("report", "speed", "--config=quickstart", *TINY_MODEL)
    assert result.code == 1, result.err
    assert "the loss DIFFERS" in result.out


def test_rows_that_are_not_measured_say_why(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(task: SpeedTask, setup: Setup, seconds: float) -> Any:
        if setup.compiled:
            return "no compiler"
        return speed.measure(task, setup, 0.0)

    monkeypatch.setattr(speed, "_measure_apart", measured)
    monkeypatch.setattr(speed, "_fast_dtype", lambda device: None)
    result = command("report", "speed", "--config=quickstart", *TINY_MODEL, "--json")
    assert result.code == 0, result.err
    rows = {row["name"]: row for row in json.loads(result.out)["rows"]}
    assert [*rows][:3] == ["the book's model", "our model", "fused AdamW"]
    assert rows["bfloat16"]["reason"] == "this CPU multiplies bfloat16 slower than float32"
    assert rows["compiled"]["reason"] == "no compiler"
    assert all(row["is_equal"] for row in rows.values() if row["reason"] is None)


def test_changes_are_made_to_our_model_also_where_it_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    setups: list[Setup] = []

    def measured(task: SpeedTask, setup: Setup, seconds: float) -> Any:
        if setup.compiled:
            return "no compiler"
        setups.append(setup)
        found = speed.measure(task, setup, 0.0)
        return replace(found, seconds_per_step=1.0 + len(setups))  # each row is slower

    monkeypatch.setattr(speed, "_measure_apart", measured)
    monkeypatch.setattr(speed, "_fast_dtype", lambda device: None)
    rows = speed.measure_all(task(), 1e9)
    assert [setup.is_book for setup in setups] == [True] + [False] * (len(setups) - 1)
    assert [row.name for row in rows if row.is_kept] == [
        "the book's model",
        "our model",
        "batch size x4",
    ]


@pytest.mark.slow
def test_report_in_real_processes(command: Command) -> None:
    result = command(
        "report", "speed", "--config=quickstart", *TINY_MODEL, "--minutes=1", "--out=kept", "--json"
    )
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    rows = answer["rows"]
    assert rows[0]["name"] == "the book's model"
    assert len(rows) == 8
    measured = [row for row in rows if row["reason"] is None]
    assert len(measured) >= 3
    assert all(row["is_equal"] and row["peak_memory_bytes"] > 1e7 for row in measured)
    assert json.loads(Path("kept/speed.json").read_text(encoding="utf-8")) == answer
    assert {path.name for path in Path("kept").iterdir()} == {
        "speed.json",
        "speed.csv",
        "speed.png",
    }
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--minutes=0"], "minutes: 0.0 is out of range"),
        (["--init_from=gpt2-124M"], "init_from: report speed starts from random weights"),
        (["--minutes=soon"], "minutes: soon is not a number"),
        (["--trainer.accelerator=mps"], "trainer.accelerator: report speed knows cpu and gpu"),
        (["--data.text=nowhere.txt"], "nowhere.txt does not exist"),
        (["--model.config.emb_dim=15"], "emb_dim: 15 is not divisible"),
        (["--minute=1"], "did you mean"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(command: Command, arguments: list[str], cause: str) -> None:
    result = command("report", "speed", "--config=quickstart", "--out=kept", *arguments)
    assert_refused(result, cause)
    assert not Path("kept").exists()


def test_figure_is_drawn() -> None:
    rows = [
        speed_results.SpeedRow("a", "", None, True, 100.0, 0.1, 1.0, 10**9, (1.0,), 0.0, True),
        speed_results.SpeedRow("b", "", None, False, 80.0, 0.1, 0.8, 10**9, (1.0,), 0.0, True),
        speed_results.SpeedRow("c", "", "no compiler"),
    ]
    figure = speed_results.speed_figure(rows, "a caption")
    figure.canvas.draw()
    assert len(figure.axes[0].patches) == 2
