"""Whether a store that exists was prepared, or started, from the same inputs with the same settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt_lightning.data.prepare.chunk import ReadPosition


def check_same(out: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Verify that a complete store is of these inputs and settings.

    Args:
        recorded: What the store's manifest says.
        current: What this call would record.

    Raises:
        ValueError: An input or a setting differs.
    """
    _check_settings(out, recorded, current)
    before, now = recorded["sources"], current["sources"]
    index = _first_difference(before, now)
    if index is not None:
        name = (now if index < len(now) else before)[index]["path"]
        raise ValueError(
            f"{out}: holds a store of other inputs ({len(before)}, now {len(now)}; the first that "
            f"differs: {name}); give another --out"
        )


def check_unfinished(out: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Verify that an unfinished store was started from these inputs and settings.

    Inputs that were not read yet may differ, except with --split ratio, where all sizes decide the split.

    Raises:
        ValueError: An input or a setting differs.
    """
    _check_settings(out, recorded, current)
    at = ReadPosition(*recorded["position"]["at"])
    before, now = recorded["sources"], current["sources"]
    if current["settings"]["split"] != "ratio":
        read = at.source + (at.offset > 0)
        before, now = before[:read], now[:read]
    index = _first_difference(before, now)
    if index is not None:
        name = (before if index < len(before) else now)[index]["path"]
        raise ValueError(
            f"{out}: is unfinished, and its input {name} has changed; remove {out} to start again, "
            "or give another --out"
        )


def _check_settings(out: Path, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    if recorded.get("reader", 1) != current["reader"]:
        raise ValueError(
            f"{out}: was prepared by a version that reads byte order marks and line ends differently; "
            "remove it, or give another --out"
        )
    for name, value in current["settings"].items():
        before = recorded["settings"].get(name)
        if before != value:
            raise ValueError(
                f"{out}: was started {_option(name, before)}, not {_option(name, value)}; "
                "give the same, or another --out"
            )


def _option(name: str, value: object) -> str:
    if value is None or isinstance(value, bool):
        return f"with --{name}" if value else f"without --{name}"
    return f"with --{name} {value}"


def _first_difference(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]]
) -> int | None:
    """Index of the first input that differs in kind, size or content; a file may have moved."""
    for index in range(max(len(before), len(now))):
        if _identity(before, index) != _identity(now, index):
            return index
    return None


def _identity(inputs: Sequence[dict[str, Any]], index: int) -> tuple[str, int, str] | None:
    if index >= len(inputs):
        return None
    each = inputs[index]
    return each["kind"], each["bytes"], each["sha256"]
