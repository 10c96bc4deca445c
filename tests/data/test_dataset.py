"""Windows of tokens: the book's, over several arrays, without holding pages."""

from pathlib import Path

import numpy as np
import psutil
import pytest

import book
from gpt_lightning.data.dataloader import ResumableDataLoader
from gpt_lightning.data.dataset import ConcatWindowDataset, WindowDataset
from helpers import some_tokens


@pytest.mark.parametrize("n", [0, 1, 8, 9, 10, 57, 200])
@pytest.mark.parametrize("length", [1, 8])
@pytest.mark.parametrize("stride", [1, 3, 8, 11])
def test_windows_equal_the_books(n: int, length: int, stride: int) -> None:
    tokens = some_tokens(n)
    theirs = book.BookDataset(tokens.tolist(), length, stride)
    ours = WindowDataset([tokens], length, stride)
    assert ours.shape == (len(theirs), length + 1)
    drawn = ours.read(np.arange(len(ours)))
    for i, (inputs, targets) in enumerate(theirs[i] for i in range(len(theirs))):
        assert drawn[i, :-1].tolist() == inputs.tolist()
        assert drawn[i, 1:].tolist() == targets.tolist()


@pytest.mark.parametrize("cuts", [[], [37], [0, 1, 2, 3, 50, 50, 99, 100], list(range(0, 101, 5))])
@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 3), (8, 8), (8, 30), (99, 7)])
def test_windows_over_several_arrays_equal_those_over_one(
    cuts: list[int], length: int, stride: int
) -> None:
    tokens = some_tokens(100)
    whole = WindowDataset([tokens], length, stride)
    parts = WindowDataset(np.split(tokens, cuts), length, stride)
    assert parts.shape == whole.shape
    order = np.random.default_rng(0).permutation(len(whole))
    expected = [tokens[i * stride : i * stride + length + 1].tolist() for i in order]
    assert parts.read(order).tolist() == whole.read(order).tolist() == expected


def test_pages_of_a_mapped_file_are_released(tmp_path: Path) -> None:
    """Windows from all parts of a file of 400 MB, of which a page fault loads 64 kB."""
    path, n = tmp_path / "tokens", 2 * 10**8
    with path.open("wb") as file:
        file.truncate(2 * n)
    parts = [np.memmap(path, "<u2", "r", n * i // 2, (n // 4,)) for i in range(4)]
    before = psutil.Process().memory_info().rss
    loader = ResumableDataLoader(WindowDataset(parts, 256, 64), 16, shuffle=True, drop_last=True)
    most = 0
    for i, _ in zip(range(500), loader, strict=False):
        if i % 10 == 0:
            most = max(most, psutil.Process().memory_info().rss - before)
    assert len(loader.windows) > 3 * 10**6  # whose order as an array would be 24 MB
    assert most < 50e6


def test_a_window_comes_from_one_source_only() -> None:
    ones, twos = (np.full(n, n, dtype=np.uint16) for n in (50, 83))
    joined = ConcatWindowDataset([WindowDataset([ones], 8, 8), WindowDataset([twos], 8, 8)])
    assert joined.shape == (6 + 10, 9)
    drawn = joined.read(np.array([15, 0, 5, 6]))
    assert (drawn == np.array([83, 50, 50, 83])[:, None]).all()
