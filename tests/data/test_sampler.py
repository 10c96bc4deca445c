"""Permutations and mixtures: bijective, random, in the given shares."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gpt_lightning.data.sampler import FeistelPermutation, MixtureSampler, shuffled


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 1000, 4095, 4096, 4097, 65537, 999_983])
def test_permutation_is_a_bijection(n: int) -> None:
    order = FeistelPermutation(n, 7)(np.arange(n))
    assert np.array_equal(np.sort(order), np.arange(n))
    # single positions in any order
    some = np.random.default_rng(0).integers(0, n, 50)
    assert np.array_equal(FeistelPermutation(n, 7)(some), order[some])
    if n > 30:
        assert not np.array_equal(FeistelPermutation(n, 8)(np.arange(n)), order)


def chi_squared(observed: np.ndarray) -> float:
    """Chi-squared statistic of uniform counts, in standard deviations."""
    expected, freedom = observed.mean(), observed.size - 1
    return float((((observed - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("make", [FeistelPermutation, shuffled])
def test_permutation_passes_tests_of_randomness(make: Callable[[int, int], Any]) -> None:
    """As randperm does: positions of the parts of an epoch, successive windows, single positions over seeds."""
    n = 100_003
    order = make(n, 3)(np.arange(n))
    stretches, thirds = np.arange(n) * 50 // n, order * 50 // n
    assert abs(chi_squared(np.bincount(stretches * 50 + thirds))) < 5
    steps = np.diff(order) % n
    assert abs(chi_squared(np.bincount(steps * 1000 // n))) < 5
    assert np.unique(steps).size > 0.6 * n  # 1 - 1/e
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / math.sqrt(n)
    # the same positions under many seeds, with a small n where a weak permutation is visible
    orders = np.stack([make(12, seed)(np.arange(12)) for seed in range(6000)])
    for place in range(12):
        assert abs(chi_squared(np.bincount(orders[:, place], minlength=12))) < 5
    pairs = np.bincount(orders[:, 0] * 12 + orders[:, 1], minlength=144).reshape(12, 12)
    assert np.all(np.diag(pairs) == 0)
    assert abs(chi_squared(pairs[~np.eye(12, dtype=bool)])) < 5


def test_mixture_draws_by_weight_and_reads_all_of_each_source() -> None:
    counts, shares = [5, 700, 40], [0.2, 0.5, 0.3]
    mixture = MixtureSampler(counts, [2, 5, 3], seed=4)
    places = np.arange(3 * 65536 + 1000)
    drawn = mixture(places)
    sources = np.searchsorted(np.cumsum(counts), drawn, side="right")
    for k, (count, share) in enumerate(zip(counts, shares, strict=True)):
        # each source has its share of any part, up to two windows
        so_far = np.cumsum(sources == k)
        assert np.abs(so_far - share * (places + 1)).max() < 2.0 + 1e-4 * 3
        own = drawn[sources == k] - sum(counts[:k])
        whole = own[: len(own) // count * count].reshape(-1, count)
        assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(count), (len(whole), 1)))
        assert not np.array_equal(whole[0], whole[1])
    # single positions, also very large ones
    some = np.random.default_rng(0).permutation(places)[:300]
    assert np.array_equal(MixtureSampler(counts, [0.2, 0.5, 0.3], seed=4)(some), drawn[some])
    assert not np.array_equal(MixtureSampler(counts, [2, 5, 3], seed=5)(places), drawn)
    far = np.arange(10**14, 10**14 + 50)
    assert np.array_equal(mixture(far)[10:20], mixture(far[10:20]))


def test_shares_of_a_mixture_are_rounded_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    for n in (1, 2, 7, 300):
        weights = rng.random(n) ** 8 + 1e-9
        mixture = MixtureSampler([3] * n, weights.tolist(), seed=0)
        assert sum(mixture.shares) == 65536
        assert min(mixture.shares) >= 1
        off = np.array(mixture.shares) - np.array(mixture.weights) * 65536
        assert np.abs(off).max() <= max(1.0, np.sum(np.array(mixture.shares) == 1))
