"""The order in which a pass sees its windows: a function of a seed and the place in the pass."""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Permutation = Callable[[Indices], Indices]  # places in a pass → numbers of windows

MAX_IN_MEMORY = 1 << 20  # windows whose order is an array: 8 MB, 20 ms
_ROUNDS = 8
_PERIOD = 1 << 16  # places in which each source has its share
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's


def seed_from(*key: int) -> int:
    """A 63-bit seed that is a pure function of ``key``; any change in any part gives an unrelated one."""
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sequential(places: Indices) -> Indices:
    """The order 0, 1, 2, …"""
    return places


def shuffled(n: int, seed: int) -> Permutation:
    """``torch.randperm``, as a ``DataLoader`` draws it. Takes 8 n bytes."""
    numbers = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    return lambda places: numbers[places]


class FeistelPermutation:
    """An order of 0, …, n - 1 that is computed where it is asked for, and takes no memory.

    A place is written as two digits, the first of a and the second of b values, a ≈ b ≈ √n. Each round adds a hash
    of one digit to the other, which can be undone, so that all of it is a bijection (a Feistel network over
    two digits: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). What lands in the less than
    a values from n to a·b is sent through again until it does not.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        a = int(np.ceil(np.sqrt(n))) or 1
        self._digits = (np.uint64(a), np.uint64(-(-n // a) or 1))
        self._keys = [np.uint64(seed_from(seed, i)) for i in range(_ROUNDS)]

    def __call__(self, places: Indices) -> Indices:
        numbers = self._once(places.astype(np.uint64))
        while (beyond := np.flatnonzero(numbers >= self.n)).size:
            numbers[beyond] = self._once(numbers[beyond])
        return numbers.astype(np.int64)

    def _once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        (a, b), digits = self._digits, np.divmod(x, self._digits[1])
        this, other = digits
        for i, key in enumerate(self._keys):
            size = (a, b)[i % 2]
            # the product's upper half is a number below size
            moved = this + (((_hash(other + key) >> np.uint64(32)) * size) >> np.uint64(32))
            this, other = other, np.minimum(moved, moved - size)  # what wraps is the larger
        return this * b + other  # after an even number of rounds each has its place again


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


class MixtureSampler:
    """The order of a stream over several sources, a function of the place in the stream alone.

    The places repeat a pattern of 65,536 in which each source has its share, rounded to whole places, at even
    distances; so any stretch of the stream is mixed as the whole. A source's draws see each of its windows once
    in a random order, then each once in another, and so on: its epochs are its own. The stream has no end.

    Args:
        counts: Windows of each source.
        weights: Positive; what matters is their share of their sum.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.counts = list(counts)
        self.weights = [weight / sum(weights) for weight in weights]
        self.seed = seed
        self.shares = _whole_shares(self.weights, _PERIOD)
        self._firsts = np.cumsum([0, *counts[:-1]])
        # when each draw of each source is due, in parts of a period
        due = np.concatenate([(np.arange(share) + 0.5) / share for share in self.shares])
        order = np.argsort(due, kind="stable")
        self._source = np.repeat(np.arange(len(counts)), self.shares)[order]
        self._draw = np.concatenate([np.arange(share) for share in self.shares])[order]
        self._orders: dict[int, tuple[int, Permutation]] = {}

    def __call__(self, places: Indices) -> Indices:
        """Places in the stream → numbers of windows, as ``ConcatWindowDataset`` numbers them."""
        numbers = np.empty_like(places)
        periods, slots = np.divmod(places, _PERIOD)
        sources = self._source[slots]
        for k in np.unique(sources):
            own = np.flatnonzero(sources == k)
            draws = periods[own] * self.shares[k] + self._draw[slots[own]]
            epochs, within = np.divmod(draws, self.counts[k])
            for epoch in np.unique(epochs):
                these = epochs == epoch
                order = self._order(int(k), int(epoch))
                numbers[own[these]] = self._firsts[k] + order(within[these])
        return numbers

    def _order(self, source: int, epoch: int) -> Permutation:
        known = self._orders.get(source)
        if known is not None and known[0] == epoch:
            return known[1]
        n, seed = self.counts[source], seed_from(self.seed, source, epoch)
        order: Permutation = FeistelPermutation(n, seed) if n > MAX_IN_MEMORY else shuffled(n, seed)
        self._orders[source] = epoch, order
        return order


def _whole_shares(weights: Sequence[float], period: int) -> list[int]:
    """Places of each in ``period``, to the nearest, at least one."""
    shares = [max(1, int(weight * period)) for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * period)
    for k in by_rest[: max(0, period - sum(shares))]:
        shares[k] += 1
    shares[shares.index(max(shares))] += period - sum(shares)  # what the least ones took
    return shares
