"""The order in which a pass sees its windows: a function of a seed and the place in the pass."""

from collections.abc import Callable
from hashlib import blake2b

import numpy as np
import torch
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Permutation = Callable[[Indices], Indices]  # places in a pass → numbers of windows

MAX_IN_MEMORY = 1 << 20  # windows whose order is an array: 8 MB, 20 ms
_ROUNDS = 8
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
