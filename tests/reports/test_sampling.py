"""``report sampling``: the book's counts, given tokens, next tokens of a model."""

import csv
from pathlib import Path

import pytest

from helpers import (
    Command,
    json_of,
    reference,
)

BOOK_COUNTS = {
    1.0: [73, 0, 0, 582, 2, 0, 0, 343, 0],
    0.1: [0, 0, 0, 985, 0, 0, 0, 15, 0],
    5.0: [165, 75, 42, 239, 71, 46, 32, 227, 103],
}


def test_exercise_5_1_gives_the_books_counts(command: Command) -> None:
    rows = json_of(command("report", "sampling", "--json"))["rows"]
    for temperature, counts in BOOK_COUNTS.items():
        at_temperature = [row for row in rows if row["temperature"] == temperature]
        assert [row["count"] for row in at_temperature] == counts
        assert sum(row["probability"] for row in at_temperature) == pytest.approx(1.0)
        for row in at_temperature:
            assert row["expected"] == pytest.approx(1000 * row["probability"])
            assert row["low"] <= row["high"]
    recorded = reference("verdict_run.json")["exercise_5_1"]
    assert {f"{t:g}": counts for t, counts in BOOK_COUNTS.items()} == recorded["counts"]


def test_pizza_has_the_books_probability(command: Command) -> None:
    result = command("report", "sampling", "--token=pizza", "--json")
    pizza = {row["temperature"]: row for row in json_of(result)["token"]}
    assert pizza[5.0]["probability"] == pytest.approx(0.043, abs=5e-5)
    result = command("report", "sampling", "--token=pizza")
    assert "pizza at temperature 5: 4.30% exactly, 32 of 1000 samples" in result.out
    methods = {m["name"]: m for m in json_of(command("report", "sampling", "--json"))["methods"]}
    assert methods["exact"]["largest_error"] == 0.0
    assert methods["the book's loop"]["largest_error"] == pytest.approx(
        methods["all draws at once"]["largest_error"]
    )


def test_given_tokens_and_logits_are_sampled(command: Command) -> None:
    result = command(
        "report", "sampling", "--tokens=[a,b,c]", "--logits=[1,2,-1]", "--temperatures=[2,0]",
        "--num_samples=50", "--seed=7", "--top_k=[2]", "--json",
    )  # fmt: skip
    rows = json_of(result)["rows"]
    assert [row["token"] for row in rows] == ["a", "b", "c"] * 2
    assert rows[2]["probability"] == 0.0  # top_k 2
    assert rows[4]["count"] == 50  # temperature 0
    assert rows[4]["z"] == 0.0


def test_next_tokens_of_a_model_are_sampled(
    command: Command, trained_run: Path, tmp_path: Path
) -> None:
    completed = command(
        "report", "sampling", f"--from={trained_run}", "--prompt=The clock", "--show=6",
        "--temperatures=[0.5,1]", "--top_p=[0.9]", "--num_samples=10", "--out=figures", "--json",
    )  # fmt: skip
    result = json_of(completed)
    assert len(result["rows"]) == 12
    assert result["rows"][0]["probability"] >= result["rows"][1]["probability"]
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "sampling.csv", "sampling.json", "sampling.png",
    }  # fmt: skip
    with (tmp_path / "figures" / "sampling.csv").open(encoding="utf-8") as file:
        assert [row["token"] for row in csv.DictReader(file)] == [
            r["token"] for r in result["rows"]
        ]


def test_token_option_adds_a_row_of_the_model(command: Command, trained_run: Path) -> None:
    completed = command(
        "report", "sampling", f"--from={trained_run}", "--prompt=The clock", "--token= pizza",
        "--show=2", "--temperatures=[1]", "--num_samples=10", "--json",
    )  # fmt: skip
    result = json_of(completed)
    assert [row["token"] for row in result["token"]] == ["' pizza'"]
    assert len(result["rows"]) == 3
