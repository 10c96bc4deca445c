"""Arithmetic of batches."""

import pytest

from gpt_lightning.data.epochs import nearest_multiple


@pytest.mark.parametrize(
    ("value", "step", "most", "nearest"),
    [(5, 2, None, 6), (5, 2, 5, 4), (1, 4, 7, 4), (7, 3, 15, 6), (9, 2, 9, 8), (3, 4, None, 4)],
)
def test_nearest_multiple(value: int, step: int, most: int | None, nearest: int) -> None:
    assert nearest_multiple(value, step, most) == nearest
