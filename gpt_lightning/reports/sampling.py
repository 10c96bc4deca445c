"""Exercise 5.1: token frequencies under temperature, drawn and exact.

V is the number of tokens, S the number of draws.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import Sampling, entropy, probabilities, seeded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the book's small vocabulary with the logits that follow "every effort moves you"
BOOK_TOKENS = (
    "closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you",
)  # fmt: skip
BOOK_LOGITS = (4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79)
BOOK_TEMPERATURES = (1.0, 0.1, 5.0)

INTERVAL = 0.99
_MAX_CELLS = 1 << 23  # random numbers at a time: 32 MB


@dataclass(frozen=True)
class Frequency:
    """One token under one setting. ``low`` to ``high`` is where 99 % of all runs would count."""

    temperature: float
    top_k: int | None
    top_p: float | None
    token: str
    probability: float
    expected: float
    count: int
    low: int
    high: int
    z: float


@dataclass(frozen=True)
class Distribution:
    """One setting: the entropy in nats, and exp(entropy), as how many equal tokens it is to choose from."""

    temperature: float
    top_k: int | None
    top_p: float | None
    entropy: float
    effective_vocabulary: float
    tokens_left: int


@dataclass(frozen=True)
class Method:
    """How long it took to know the frequencies, and the largest error of one of them."""

    name: str
    seconds: float
    largest_error: float


def draw_counts(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """How often each token of ``p`` ``(V,)`` comes in S draws, ``(V,)``.

    All draws at once, with the very results of S successive ``torch.multinomial(p, 1)`` after
    ``torch.manual_seed(seed)``: each of them takes V exponential random numbers.
    """
    generator = seeded(seed)
    counts = torch.zeros(len(p), dtype=torch.int64)
    rows = max(1, _MAX_CELLS // len(p))
    for start in range(0, num_samples, rows):
        part = p.expand(min(rows, num_samples - start), -1)
        drawn = torch.multinomial(part, 1, generator=generator).squeeze(1)
        counts += torch.bincount(drawn, minlength=len(p))
    return counts


def draw_counts_one_by_one(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """The book's way: a loop of single draws. For comparison."""
    generator = seeded(seed)
    drawn = [torch.multinomial(p, 1, generator=generator).item() for _ in range(num_samples)]
    return torch.bincount(torch.tensor(drawn), minlength=len(p))


def binomial_interval(num_samples: int, p: float, share: float = INTERVAL) -> tuple[int, int]:
    """The exact central interval of a count in S draws: each tail beyond it has at most (1 - share) / 2."""
    if p <= 0.0 or p >= 1.0:
        return (0, 0) if p <= 0.0 else (num_samples, num_samples)
    mean, width = num_samples * p, 40 + 12 * math.sqrt(num_samples * p * (1 - p))
    k = torch.arange(
        max(0, math.floor(mean - width)),
        min(num_samples, math.ceil(mean + width)) + 1,
        dtype=torch.float64,
    )
    n = torch.tensor(float(num_samples), dtype=torch.float64)
    log_pmf = (
        torch.lgamma(n + 1)
        - torch.lgamma(k + 1)
        - torch.lgamma(n - k + 1)
        + k * math.log(p)
        + (n - k) * math.log1p(-p)
    )
    cdf = log_pmf.exp().cumsum(0)
    tail = (1 - share) / 2
    low = int((cdf < tail).sum())
    high = min(int((cdf < 1 - tail).sum()), len(k) - 1)
    return int(k[low]), int(k[high])


def frequencies(
    logits: Tensor,
    tokens: Sequence[str],
    settings: Sequence[Sampling],
    num_samples: int = 1000,
    seed: int = 123,
    shown: Sequence[int] | None = None,
) -> tuple[list[Frequency], list[Distribution]]:
    """Exact and drawn frequencies of next tokens under each setting, the draws reseeded for each.

    Args:
        logits: ``(V,)``.
        tokens: The V tokens' names.
        shown: Which token ids get a row; none: all.

    Raises:
        ValueError: Logits that are no distribution, or not as many as tokens; too few draws.
    """
    if len(logits) != len(tokens):
        raise ValueError(f"logits: {len(logits)} for {len(tokens)} tokens; give one for each")
    if not len(logits):
        raise ValueError("logits: are none; give one for each token")
    if not torch.isfinite(logits.max()):
        raise ValueError("logits: hold NaN or +inf, or are all -inf; give finite ones")
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is too small; give 1 or more")
    rows, distributions = [], []
    for sampling in settings:
        sampling.check_vocabulary(len(tokens))
        p = probabilities(logits[None], sampling)[0]
        counts = draw_counts(p, num_samples, seed)
        setting = (sampling.temperature, sampling.top_k, sampling.top_p)
        nats = float(entropy(p))
        distributions.append(Distribution(*setting, nats, math.exp(nats), int((p > 0).sum())))
        for i in range(len(tokens)) if shown is None else shown:
            probability, count = float(p[i]), int(counts[i])
            expected = num_samples * probability
            deviation = math.sqrt(num_samples * probability * max(0.0, 1 - probability))
            low, high = binomial_interval(num_samples, probability)
            z = (count - expected) / deviation if deviation else 0.0
            rows.append(Frequency(*setting, tokens[i], probability, expected, count, low, high, z))
    return rows, distributions


def compare_methods(
    logits: Tensor, temperature: float, num_samples: int, seed: int
) -> list[Method]:
    """The exercise's second half: the book's loop, the same draws at once, and no draws at all."""

    def exact() -> Tensor:
        return probabilities(logits[None], Sampling(temperature))[0]

    p = exact()
    ways = [
        ("the book's loop", lambda draws: draw_counts_one_by_one(p, draws, seed) / draws),
        ("all draws at once", lambda draws: draw_counts(p, draws, seed) / draws),
        ("exact", lambda draws: exact()),
    ]
    methods = []
    for name, estimate in ways:
        estimate(10)  # warm
        began = time.perf_counter()
        found = estimate(num_samples)
        seconds = time.perf_counter() - began
        methods.append(Method(name, seconds, float((found - p).abs().max())))
    return methods


def sampling_figure(rows: Sequence[Frequency], num_samples: int, caption: str) -> "Figure":
    """Bars: each token's exact probability under each setting; crosses: its share of the draws."""
    from matplotlib.figure import Figure

    settings = list(dict.fromkeys((row.temperature, row.top_k, row.top_p) for row in rows))
    # each setting has the same tokens in the same order; two may have one name
    tokens = [r.token for r in rows if (r.temperature, r.top_k, r.top_p) == settings[0]]
    figure = Figure(figsize=(max(6.0, 0.75 * len(tokens) + 2), 4.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(settings)
    for i, setting in enumerate(settings):
        own = [r for r in rows if (r.temperature, r.top_k, r.top_p) == setting]
        places = [place + (i - (len(settings) - 1) / 2) * width for place in range(len(own))]
        grey = f"{0.3 + 0.6 * i / max(1, len(settings) - 1):.2f}"
        exact = [r.probability for r in own]
        axes.bar(places, exact, width, color=grey, edgecolor="0", label=_name(*setting))
        axes.plot(places, [r.count / num_samples for r in own], "x", color="0", markersize=5)
    axes.plot([], [], "x", color="0", label=f"share of {num_samples:,} draws")
    names = [in_any_font(token) for token in tokens]
    axes.set_xticks(range(len(tokens)), names, rotation=45, ha="right", parse_math=False)
    axes.set_xlabel("Next token")
    axes.set_ylabel("Probability")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.supxlabel(in_any_font(caption), fontsize=7, parse_math=False)
    return figure


def in_any_font(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def as_dict(
    rows: Sequence[Frequency], distributions: Sequence[Distribution], methods: Sequence[Method]
) -> dict[str, list[dict[str, object]]]:
    return {
        "rows": [asdict(row) for row in rows],
        "distributions": [asdict(distribution) for distribution in distributions],
        "methods": [asdict(method) for method in methods],
    }


def _name(temperature: float, top_k: int | None, top_p: float | None) -> str:
    parts = [f"temperature {temperature:g}"]
    parts += [f"top_k {top_k}"] if top_k is not None else []
    parts += [f"top_p {top_p:g}"] if top_p is not None else []
    return ", ".join(parts)
