"""Exercise 5.1: token frequencies under temperature, drawn and exact.

V is the number of tokens, S the number of draws.
"""

import math
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import SamplingParams, entropy, make_generator, probabilities
from gpt_lightning.palette import INK, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
class TokenFrequency:
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
class DistributionStats:
    """One setting: the entropy in nats, and exp(entropy), as how many equal tokens it is to choose from."""

    temperature: float
    top_k: int | None
    top_p: float | None
    entropy: float
    effective_vocabulary: float
    tokens_left: int


@dataclass(frozen=True)
class EstimatorTiming:
    """How long it took to know the frequencies, and the largest error of one of them."""

    name: str
    seconds: float
    largest_error: float


def draw_counts(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """How often each token of ``p`` ``(V,)`` comes in S draws, ``(V,)``.

    All draws at once, with the very results of S successive ``torch.multinomial(p, 1)`` after
    ``torch.manual_seed(seed)``: each of them takes V exponential random numbers.
    """
    generator = make_generator(seed)
    counts = torch.zeros(len(p), dtype=torch.int64)
    rows = max(1, _MAX_CELLS // len(p))
    for start in range(0, num_samples, rows):
        part = p.expand(min(rows, num_samples - start), -1)
        drawn = torch.multinomial(part, 1, generator=generator).squeeze(1)
        counts += torch.bincount(drawn, minlength=len(p))
    return counts


def draw_counts_one_by_one(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """The book's way: a loop of single draws. For comparison."""
    generator = make_generator(seed)
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
    settings: Sequence[SamplingParams],
    num_samples: int = 1000,
    seed: int = 123,
    shown: Sequence[int] | None = None,
) -> tuple[list[TokenFrequency], list[DistributionStats]]:
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
        distributions.append(DistributionStats(*setting, nats, math.exp(nats), int((p > 0).sum())))
        for i in range(len(tokens)) if shown is None else shown:
            probability, count = float(p[i]), int(counts[i])
            expected = num_samples * probability
            deviation = math.sqrt(num_samples * probability * max(0.0, 1 - probability))
            low, high = binomial_interval(num_samples, probability)
            z = (count - expected) / deviation if deviation else 0.0
            rows.append(
                TokenFrequency(*setting, tokens[i], probability, expected, count, low, high, z)
            )
    return rows, distributions


def compare_estimators(
    logits: Tensor, temperature: float, num_samples: int, seed: int
) -> list[EstimatorTiming]:
    """The exercise's second half: the book's loop, the same draws at once, and no draws at all."""

    def exact() -> Tensor:
        return probabilities(logits[None], SamplingParams(temperature))[0]

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
        methods.append(EstimatorTiming(name, seconds, float((found - p).abs().max())))
    return methods


def sampling_figure(rows: Sequence[TokenFrequency], num_samples: int, caption: str) -> "Figure":
    """A panel for each setting: each token's exact probability as a bar, its share of the draws as a cross.

    The line through a cross's place is where 99 % of all runs have theirs.
    """
    from matplotlib.figure import Figure

    by_setting: dict[tuple[float, int | None, float | None], list[TokenFrequency]] = {}
    for row in rows:
        by_setting.setdefault((row.temperature, row.top_k, row.top_p), []).append(row)
    tokens = len(rows) // len(by_setting)
    across = 2 if tokens <= 12 and len(by_setting) > 4 else 1
    down = math.ceil(len(by_setting) / across)
    width = max(7.0, across * (0.55 * tokens + 1.2))
    figure = Figure(figsize=(width, 2.1 * down + 1.6), layout="constrained")
    panels = list(figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (setting, own) in zip(panels, by_setting.items(), strict=False):
        _panel(axes, own, num_samples)
        axes.set_title(_name(*setting), fontsize=11)
    for i in range(len(by_setting), len(panels)):
        panels[i].set_visible(False)
        panels[i - across].tick_params(labelbottom=True)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center", ncols=3, fontsize=10, frameon=False,
    )  # fmt: skip
    figure.supylabel("Probability of the next token", fontsize=11)
    add_caption(figure, caption)
    return figure


def _panel(axes: "Axes", rows: Sequence[TokenFrequency], num_samples: int) -> None:
    places = range(len(rows))
    exact = [row.probability for row in rows]
    axes.bar(places, exact, 0.7, color=SERIES[0], label="exact")
    shares = [row.count / num_samples for row in rows]
    label = f"share of {num_samples:,} draws"
    axes.plot(places, shares, "X", color=SERIES[1], markeredgecolor=INK, markersize=8, label=label)
    low = [max(0.0, row.probability - row.low / num_samples) for row in rows]
    high = [max(0.0, row.high / num_samples - row.probability) for row in rows]
    axes.errorbar(
        places, exact, [low, high],
        fmt="none", ecolor=INK, elinewidth=1, capsize=4, label="where 99 % of runs lie",
    )  # fmt: skip
    # above bar, line and cross; a zero and a small number look the same without it
    heights = [max(p, p + up, share) for p, up, share in zip(exact, high, shares, strict=True)]
    for place, (p, height) in enumerate(zip(exact, heights, strict=True)):
        axes.annotate(
            _percent(p), (place, height), (0, 6), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xticks(
        places, [in_any_font(row.token) for row in rows], rotation=45, ha="right",
        rotation_mode="anchor", parse_math=False,
    )  # fmt: skip
    axes.grid(axis="y", color=INK, alpha=0.15)
    axes.set_axisbelow(True)


def _percent(share: float) -> str:
    """``57 %``, ``4.3 %``, ``0.01 %``; below that it says so, and a token that is left out is 0."""
    if share == 0.0:
        return "0"
    if share < 0.0001:
        return "<0.01 %"
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def add_caption(figure: "Figure", caption: str) -> None:
    """The settings of a report under its figure, in as many lines as its width needs."""
    characters = int(13 * figure.get_figwidth())  # of 9 points
    text = textwrap.fill(in_any_font(caption), characters)
    figure.supxlabel(text, fontsize=9, parse_math=False)


def in_any_font(text: str) -> str:
    """The text with what matplotlib's font cannot draw as escapes; it would draw boxes, with a warning."""
    drawn = _drawn_by_font()
    return "".join(
        c if ord(c) in drawn and c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


@cache
def _drawn_by_font() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def as_dict(
    rows: Sequence[TokenFrequency],
    distributions: Sequence[DistributionStats],
    methods: Sequence[EstimatorTiming],
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
