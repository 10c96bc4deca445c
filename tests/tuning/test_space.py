"""Spaces: which files are accepted, and their combinations."""

from typing import Any

import pytest

from gpt_lightning.tuning.proposal import as_text, propose
from gpt_lightning.tuning.space import Range, Space, read_space


def space_of(content: dict[str, Any]) -> Space:
    return read_space(content, lambda name: name != "model.lr")


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ([], "space: a: has no choices"),
        ([1, 2, 1], "space: a: 1 is there twice"),
        ([[1, 2], [1, 2]], "space: a: [1, 2] is there twice"),
        ([float("nan")], "space: a: nan is not a number"),
        (3, "space: a is neither a list nor a range; give [A, B] or {low: A, high: B}"),
        ({"low": 1}, "space: a: has no high"),
        ({"low": 1, "high": 2, "steps": 1}, "space: a.steps: is not a part of a range"),
        ({"low": 2, "high": 1}, "space: a: low 2 is above high 1"),
        ({"low": 0, "high": 1, "log": True}, "space: a.low: 0 has no logarithm"),
        ({"low": -1.0, "high": 1.0, "log": True}, "space: a.low: -1.0 has no logarithm"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "space: a: log and step exclude"),
        ({"low": 1, "high": 9, "step": 0}, "space: a.step: 0 is too small"),
        ({"low": "1", "high": 9}, "space: a.low: 1 is not a finite number"),
        ({"low": True, "high": 9}, "space: a.low: True is not a finite number"),
        ({"low": 1, "high": float("inf")}, "space: a.high: inf is not a finite number"),
        ({"low": 1, "high": 9, "log": 1}, "space: a.log: 1 is not true or false"),
    ],
)
def test_domain_is_refused(domain: Any, message: str) -> None:
    with pytest.raises(ValueError, match="space: a") as raised:
        space_of({"a": domain})
    assert str(raised.value).startswith(message)
    assert "; " in str(raised.value)


def test_whole_numbers_of_a_setting_that_takes_none_are_floats() -> None:
    space = space_of({"model.lr": {"low": 0, "high": 1}, "a": {"low": 0, "high": 1}})
    assert space.domains["model.lr"] == Range(0.0, 1.0)
    assert isinstance(space.domains["model.lr"].to_json()["low"], float)
    assert space.domains["a"].size == 2
    assert space.size is None


def test_each_combination_has_a_number() -> None:
    content = {"a": [1, 1.0, True, [1, 2]], "b": {"low": 1, "high": 10, "step": 4},
               "c": {"low": 0.1, "high": 0.5, "step": 0.1}, "d": [None, "x"]}  # fmt: skip
    space = space_of(content)
    assert space.size == 4 * 3 * 5 * 2
    points = [space.point(number) for number in range(space.size)]
    assert len({as_text(point) for point in points}) == space.size
    assert {point["b"] for point in points} == {1, 5, 9}
    assert {point["c"] for point in points} == {0.1, 0.2, 0.3, 0.4, 0.5}
    for point in points:
        assert as_text(space.from_optuna(space.to_optuna(point))) == as_text(point)
    again = read_space(space.to_json(), lambda name: True)
    assert as_text(again.point(77)) == as_text(space.point(77))


def test_order_of_the_file_does_not_matter() -> None:
    one, other = space_of({"a": [1, 2], "b": [3, 4]}), space_of({"b": [3, 4], "a": [1, 2]})
    assert [one.point(n) for n in range(4)] == [other.point(n) for n in range(4)]


@pytest.mark.parametrize("sampler", ["grid", "random"])
def test_trials_of_a_grid_try_each_combination_once(sampler: Any) -> None:
    space = space_of({"a": [1, 2, 3], "b": ["x", None, "y", True]})
    tried = [propose(space, sampler, (7, number, 0), set(), []) for number in range(12)]
    assert len({as_text(params) for params in tried}) == 12
    other = [propose(space, sampler, (8, number, 0), set(), []) for number in range(12)]
    assert tried != other  # the order is random


def test_random_settings_are_a_function_of_seed_and_number() -> None:
    space = space_of({"model.lr": {"low": 1e-5, "high": 1e-1, "log": True}, "a": [1, 2]})
    drawn = [propose(space, "random", (7, number, 0), set(), []) for number in range(50)]
    assert drawn == [propose(space, "random", (7, number, 0), set(), []) for number in range(50)]
    rates = [params["model.lr"] for params in drawn]
    assert len(set(rates)) == 50
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert 15 < sum(rate < 1e-3 for rate in rates) < 35  # the logarithm is uniform
