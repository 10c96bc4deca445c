"""Lines of JSON, parsed by orjson where the extra ``fast`` is installed; what is accepted does not change."""

import json
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np

_MAX_DEPTH = 500  # json refuses deeper values than about 990, orjson than 1,024
_MAX_DIGITS = 4300  # of a whole number that json reads; orjson makes a float of a longer one


def parse_line(line: bytes) -> Any:
    """The value of a line of UTF-8, or ``None`` if it is left to :func:`parse_text`.

    That one has the last word on all that orjson refuses (NaN, a lone surrogate, a byte order mark), and on what
    orjson alone accepts.
    """
    loads = _orjson_loads()
    if loads is None or _is_unusual(line):
        return None
    try:
        return loads(line)
    except ValueError:
        return None


def parse_text(text: str) -> Any:
    """The value of a line.

    Raises:
        ValueError, RecursionError: It is not JSON, or is nested too deep.
    """
    return json.loads(text.removeprefix("\ufeff"))


@cache
def _orjson_loads() -> Any:
    try:
        return import_module("orjson").loads
    except Exception:  # missing, or broken in any way
        return None


def _is_unusual(line: bytes) -> bool:
    """Whether a line may hold a deep value, or a number of more than ``_MAX_DIGITS`` digits."""
    if len(line) <= _MAX_DEPTH:
        return False
    brackets = np.frombuffer(line, np.uint8) | 0x20  # makes { of [ and no other character
    if np.count_nonzero(brackets == ord("{")) > _MAX_DEPTH:
        return True
    step = _MAX_DIGITS // 2  # so many digits hold a complete block of this size
    return any(line[at : at + step].isdigit() for at in range(0, len(line) - step + 1, step))
