"""Order in which an epoch sees its windows: a function of a seed and the position in the epoch.

A position counts windows from the start of an epoch (or of a mixture's stream); an index names a window.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Permutation = Callable[[Indices], Indices]  # positions in an epoch → indices of windows

MAX_IN_MEMORY = 1 << 20  # windows whose permutation is an array: 8 MB, 20 ms
_ROUNDS = 8
_PERIOD = 1 << 16  # positions after which the pattern of a mixture repeats
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64's


def seed_from(*key: int) -> int:
    """A 63-bit seed that is a pure function of ``key``; any change in any part gives an unrelated one."""
    digest = blake2b(",".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def sequential(positions: Indices) -> Indices:
    """The order 0, 1, 2, …"""
    return positions


def shuffled(n: int, seed: int) -> Permutation:
    """``torch.randperm``, as a ``DataLoader`` draws it. Takes 8 n bytes."""
    indices = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    return lambda positions: indices[positions]


class FeistelPermutation:
    """Permutation of 0, …, n - 1 that is computed position by position and needs no memory.

    A position is written as two digits, the first of a and the second of b values, a ≈ b ≈ √n. Each round adds
    a hash of one digit to the other. That can be undone, so all rounds together are a bijection (a Feistel network over
    two digits: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). A result from n to a·b - 1, of
    which there are fewer than a, is permuted again until it is below n.
    """

    def __init__(self, n: int, seed: int) -> None:
        self.n = n
        a = int(np.ceil(np.sqrt(n))) or 1
        self._digits = (np.uint64(a), np.uint64(-(-n // a) or 1))
        self._keys = [np.uint64(seed_from(seed, i)) for i in range(_ROUNDS)]

    def __call__(self, positions: Indices) -> Indices:
        indices = self._permute_once(positions.astype(np.uint64))
        while (beyond := np.flatnonzero(indices >= self.n)).size:
            indices[beyond] = self._permute_once(indices[beyond])
        return indices.astype(np.int64)

    def _permute_once(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        (a, b), digits = self._digits, np.divmod(x, self._digits[1])
        this, other = digits
        for i, key in enumerate(self._keys):
            size = (a, b)[i % 2]
            # the upper half of the product is below size
            moved = this + (((_hash(other + key) >> np.uint64(32)) * size) >> np.uint64(32))
            this, other = other, np.minimum(moved, moved - size)  # where it wraps, it is the larger
        return this * b + other  # after an even number of rounds the digits are not swapped


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


class MixtureSampler:
    """Endless stream of windows of several texts, each drawn by its weight; a function of the position alone.

    A pattern of 65,536 positions repeats. Each text has its share of it, rounded to whole positions, at even
    distances; so any part of the stream has the same proportions. Each text has its own epochs: its draws
    see each of its windows once in a random order, then each once in another order, and so on.

    Args:
        counts: Windows of each text.
        weights: Positive; only their ratios matter.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[float], seed: int) -> None:
        self.counts = list(counts)
        self.weights = [weight / sum(weights) for weight in weights]
        self.seed = seed
        self.shares = _integer_shares(self.weights, _PERIOD)
        self._offsets = np.cumsum([0, *counts[:-1]], dtype=np.int64)
        # when each draw of each text is due, as a fraction of a period
        due = np.concatenate([(np.arange(share) + 0.5) / share for share in self.shares])
        by_due = np.argsort(due, kind="stable")
        self._text = np.repeat(np.arange(len(counts)), self.shares)[by_due]
        self._draw = np.concatenate([np.arange(share) for share in self.shares])[by_due]
        self._permutations: dict[int, tuple[int, Permutation]] = {}

    def __call__(self, positions: Indices) -> Indices:
        """Positions in the stream → indices of windows in a ``ConcatWindowDataset`` of the texts."""
        indices = np.empty_like(positions)
        periods, slots = np.divmod(positions, _PERIOD)
        texts = self._text[slots]
        for k in np.unique(texts):
            of_text = np.flatnonzero(texts == k)
            draws = periods[of_text] * self.shares[k] + self._draw[slots[of_text]]
            epochs, within = np.divmod(draws, self.counts[k])
            for epoch in np.unique(epochs):
                in_epoch = epochs == epoch
                permutation = self._permutation(int(k), int(epoch))
                indices[of_text[in_epoch]] = self._offsets[k] + permutation(within[in_epoch])
        return indices

    def _permutation(self, text: int, epoch: int) -> Permutation:
        cached = self._permutations.get(text)
        if cached is not None and cached[0] == epoch:
            return cached[1]
        n, seed = self.counts[text], seed_from(self.seed, text, epoch)
        permutation: Permutation = (
            FeistelPermutation(n, seed) if n > MAX_IN_MEMORY else shuffled(n, seed)
        )
        self._permutations[text] = epoch, permutation
        return permutation


def _integer_shares(weights: Sequence[float], period: int) -> list[int]:
    """Positions of each text in ``period``: the nearest integers with that sum, at least one each."""
    shares = [max(1, int(weight * period)) for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda k: shares[k] - weights[k] * period)
    for k in by_remainder[: max(0, period - sum(shares))]:
        shares[k] += 1
    shares[shares.index(max(shares))] += period - sum(shares)  # minus what rounding up to 1 took
    return shares
