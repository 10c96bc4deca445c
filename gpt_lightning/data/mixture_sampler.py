"""Several sources as one stream of windows, each drawn from by its weight."""

from collections.abc import Sequence

import numpy as np

from gpt_lightning.data.sampler import (
    MAX_IN_MEMORY,
    FeistelPermutation,
    Indices,
    Permutation,
    seed_from,
    shuffled,
)

_PERIOD = 1 << 16  # places in which each source has its share


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
