"""How varied generated texts are, counted in tokens."""

from collections.abc import Sequence

Rows = Sequence[Sequence[int]]


def distinct_n(rows: Rows, n: int) -> float:
    """Number of different n-grams over the number of n-grams, in all texts together (Li et al. 2016); 0 without n-grams.

    Args:
        rows: New tokens of each text.
    """
    grams = [gram for row in rows for gram in _ngrams(row, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def seq_rep_n(rows: Rows, n: int) -> float | None:
    """Share of the n-grams of a text that occur earlier in the same text, as a mean over the texts (Welleck et al. 2019).

    ``None`` if no text has an n-gram.
    """
    shares = [1 - len(set(grams)) / len(grams) for row in rows if (grams := _ngrams(row, n))]
    return sum(shares) / len(shares) if shares else None


def _ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
