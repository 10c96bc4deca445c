"""Space of a study: for each setting, the values that a trial may have."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

MAX_POINTS = 1 << 40  # settings of a space that can be numbered


@dataclass(frozen=True)
class Choices:
    """List of values of a setting."""

    values: tuple[Any, ...]

    @property
    def size(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return self.values[index]

    def distribution(self) -> CategoricalDistribution:
        """Optuna's form: the values, or their JSON if Optuna cannot store them or tell them apart (1 and 1.0)."""
        plain = all(value is None or isinstance(value, str | int | float) for value in self.values)
        if plain and len(set(self.values)) == self.size:
            return CategoricalDistribution(self.values)
        return CategoricalDistribution([json.dumps(value) for value in self.values])

    def from_optuna(self, value: Any) -> Any:
        return self.values[self.distribution().choices.index(value)]

    def to_optuna(self, value: Any) -> Any:
        texts = [json.dumps(each) for each in self.values]  # as values, 1 and true are equal
        return self.distribution().choices[texts.index(json.dumps(value))]

    def to_json(self) -> Any:
        return list(self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, also both; whole numbers if both are ``int``.

    Attributes:
        log: Whether the logarithm is drawn uniformly.
        step: Distance of two values; ``None``: any number, or any whole number.
    """

    low: int | float
    high: int | float
    log: bool = False
    step: int | float | None = None

    @property
    def is_int(self) -> bool:
        return isinstance(self.low, int)

    @property
    def size(self) -> int | None:
        """Number of values; ``None`` if they cannot be listed."""
        step = 1 if self.is_int and self.step is None else self.step
        if step is None:
            return None
        return int((Decimal(str(self.high)) - Decimal(str(self.low))) / Decimal(str(step))) + 1

    def __getitem__(self, index: int) -> int | float:
        value = Decimal(str(self.low)) + index * Decimal(str(self.step or 1))  # 0.1 + 0.2 is 0.3
        return int(value) if self.is_int else float(value)

    def distribution(self) -> IntDistribution | FloatDistribution:
        high: Any = self.high if self.size is None else self[self.size - 1]
        if self.is_int:
            return IntDistribution(int(self.low), high, self.log, int(self.step or 1))
        return FloatDistribution(self.low, high, self.log, self.step)

    def from_optuna(self, value: Any) -> int | float:
        if self.step is None:
            return int(value) if self.is_int else float(value)
        return self[round((value - self.low) / self.step)]

    def to_optuna(self, value: int | float) -> int | float:
        return value

    def to_json(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


Domain = Choices | Range
Params = dict[str, Any]  # setting → value


@dataclass(frozen=True)
class Space:
    """Setting → :class:`Choices` or :class:`Range`."""

    domains: Mapping[str, Domain]

    @property
    def size(self) -> int | None:
        """Number of combinations; ``None`` if they cannot be numbered."""
        sizes = [domain.size for domain in self.domains.values()]
        size = math.prod(size for size in sizes if size is not None)
        return None if None in sizes or size > MAX_POINTS else size

    def point(self, index: int) -> Params:
        """The combination with a number from 0 to ``size - 1``; the last setting changes fastest."""
        params: Params = {}
        for name, domain in reversed(list(self.domains.items())):
            assert domain.size is not None
            index, position = divmod(index, domain.size)
            params[name] = domain[position]
        return {name: params[name] for name in self.domains}

    def distributions(self) -> dict[str, BaseDistribution]:
        return {name: domain.distribution() for name, domain in self.domains.items()}

    def from_optuna(self, params: Mapping[str, Any]) -> Params:
        """The values of a trial of Optuna."""
        return {name: d.from_optuna(params[name]) for name, d in self.domains.items()}

    def to_optuna(self, params: Params) -> dict[str, Any]:
        """The values as Optuna stores them."""
        return {name: domain.to_optuna(params[name]) for name, domain in self.domains.items()}

    def to_json(self) -> dict[str, Any]:
        return {name: domain.to_json() for name, domain in self.domains.items()}


def read_space(content: Mapping[str, Any], takes_int: Callable[[str], bool]) -> Space:
    """The space that a YAML file describes.

    Args:
        takes_int: Whether a setting may be a whole number.

    Raises:
        ValueError: It cannot be used; the message is one line.
    """
    names = sorted(
        content
    )  # the numbers of the combinations do not depend on the order in the file
    return Space({name: _domain(name, content[name], takes_int(name)) for name in names})


def _domain(name: str, given: Any, takes_int: bool) -> Domain:
    where = f"space: {name}"
    if isinstance(given, list):
        return _choices(where, given)
    if not isinstance(given, dict):
        raise ValueError(
            f"{where} is neither a list nor a range; give [A, B] or {{low: A, high: B}}"
        )
    for key in given:
        if key not in ("low", "high", "log", "step"):
            raise ValueError(
                f"{where}.{key}: is not a part of a range; give low, high, log or step"
            )
    for key in ("low", "high"):
        if key not in given:
            raise ValueError(f"{where}: has no {key}; give it")
    numbers = [
        key for key in ("low", "high", "step") if given.get(key) is not None or key != "step"
    ]
    for key in numbers:
        value = given[key]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{where}.{key}: {value} is not a finite number; give one")
    if not isinstance(given.get("log", False), bool):
        raise ValueError(f"{where}.log: {given['log']} is not true or false; give one of them")
    is_int = takes_int and all(isinstance(given[key], int) for key in numbers)
    if not is_int:
        given = {**given, **{key: float(given[key]) for key in numbers}}
    domain = Range(**given)
    if domain.low > domain.high:
        raise ValueError(f"{where}: low {domain.low} is above high {domain.high}; exchange them")
    if domain.step is not None and domain.log:
        raise ValueError(f"{where}: log and step exclude each other; leave one out")
    if domain.step is not None and domain.step <= 0:
        raise ValueError(f"{where}.step: {domain.step} is too small; give more than 0")
    if domain.log and domain.low <= 0:
        raise ValueError(f"{where}.low: {domain.low} has no logarithm; give more than 0")
    return domain


def _choices(where: str, given: list[Any]) -> Choices:
    if not given:
        raise ValueError(f"{where}: has no choices; give at least one")
    texts = []
    for value in given:
        try:
            texts.append(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{where}: {value} is not a number, text, list or mapping; put it in quotes"
            ) from error
        if texts[-1] in texts[:-1]:
            raise ValueError(f"{where}: {value} is there twice; give each choice once")
    return Choices(tuple(given))
