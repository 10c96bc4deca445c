"""Exercise 5.1: how often each next token is drawn at several temperatures, beside its exact probability.

V is the size of the vocabulary, S the number of samples.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gpt_lightning.generation.sampling import SamplingParams, entropy, make_generator, probabilities
from gpt_lightning.palette import INK, SERIES
from gpt_lightning.reports.plotting import (
    add_caption,
    escape_undrawable,
    format_percent,
)
from gpt_lightning.table import Table, value_or_all

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gpt_lightning.figure import Figure

# the book's small vocabulary, with its logits after "every effort moves you"
BOOK_TOKENS = (
    "closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you",
)  # fmt: skip
BOOK_LOGITS = (4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79)
BOOK_TEMPERATURES = (1.0, 0.1, 5.0)

INTERVAL = 0.99
_MAX_RANDOM_NUMBERS = 1 << 23  # in one call: 32 MB


@dataclass(frozen=True)
class TokenFrequency:
    """One token under one setting.

    Attributes:
        expected: The expected count in S samples.
        count: How often the token was sampled.
        low, high: 99 % of all runs count from ``low`` to ``high``.
        z: The difference of ``count`` and ``expected`` in standard deviations.
    """

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

    def as_text(self) -> dict[str, str]:
        return {
            "temperature": f"{self.temperature:g}",
            "top_k": value_or_all(self.top_k),
            "top_p": value_or_all(self.top_p),
            "token": self.token,
            "probability": f"{self.probability:.4%}",
            "expected": f"{self.expected:.1f}",
            "count": f"{self.count}",
            "99 % of runs": f"{self.low} – {self.high}",
            "z": f"{self.z:+.2f}",
        }


@dataclass(frozen=True)
class DistributionStats:
    """The distribution under one setting.

    Attributes:
        entropy: In nats.
        effective_vocabulary: exp(entropy): so many equally likely tokens have the same entropy.
        tokens_left: Tokens with a probability above 0.
    """

    temperature: float
    top_k: int | None
    top_p: float | None
    entropy: float
    effective_vocabulary: float
    tokens_left: int

    def as_text(self) -> dict[str, str]:
        return {
            "temperature": f"{self.temperature:g}",
            "top_k": value_or_all(self.top_k),
            "top_p": value_or_all(self.top_p),
            "entropy (nats)": f"{self.entropy:.4f}",
            "effective vocabulary": f"{self.effective_vocabulary:.2f}",
            "tokens left": f"{self.tokens_left}",
        }


@dataclass(frozen=True)
class EstimatorTiming:
    """The time of one method to estimate the probabilities, and its largest error."""

    name: str
    seconds: float
    largest_error: float

    def as_text(self) -> dict[str, str]:
        return {
            "method": self.name,
            "time": f"{self.seconds * 1e3:.3f} ms",
            "largest error of a probability": f"{self.largest_error:.4f}",
        }


def draw_counts(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """The counts ``(V,)`` of each token in S samples from the probabilities ``p`` ``(V,)``.

    One call draws many samples. The result equals that of S single ``torch.multinomial(p, 1)`` calls after
    ``torch.manual_seed(seed)``, because each sample uses V exponential random numbers in both cases.
    """
    generator = make_generator(seed)
    counts = torch.zeros(len(p), dtype=torch.int64)
    rows = max(1, _MAX_RANDOM_NUMBERS // len(p))
    for start in range(0, num_samples, rows):
        batch = p.expand(min(rows, num_samples - start), -1)
        samples = torch.multinomial(batch, 1, generator=generator).squeeze(1)
        counts += torch.bincount(samples, minlength=len(p))
    return counts


def draw_counts_one_by_one(p: Tensor, num_samples: int, seed: int) -> Tensor:
    """The same counts by the book's loop of single samples, for comparison."""
    generator = make_generator(seed)
    samples = [torch.multinomial(p, 1, generator=generator).item() for _ in range(num_samples)]
    return torch.bincount(torch.tensor(samples), minlength=len(p))


def binomial_interval(num_samples: int, p: float, share: float = INTERVAL) -> tuple[int, int]:
    """The exact central interval of a count in S samples: each tail has a probability of (1 - share) / 2 at most."""
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
    row_ids: Sequence[int] | None = None,
) -> tuple[Table[TokenFrequency], Table[DistributionStats]]:
    """Exact and sampled frequencies of next tokens under each setting, each with the same seed.

    Args:
        logits: ``(V,)``.
        tokens: The names of the V tokens.
        row_ids: The token ids that get a row. ``None``: all.

    Raises:
        ValueError: The logits do not give a distribution, their number differs from that of the tokens, or
            ``num_samples`` is below 1.
    """
    if len(logits) != len(tokens):
        raise ValueError(f"logits: {len(logits)} for {len(tokens)} tokens; give one for each")
    if not len(logits):
        raise ValueError("logits: is an empty list; give one for each token")
    if not torch.isfinite(logits.max()):
        raise ValueError("logits: contain NaN or +inf, or are all -inf; give finite ones")
    if num_samples < 1:
        raise ValueError(f"num_samples: {num_samples} is too small; give 1 or more")
    rows: Table[TokenFrequency] = Table()
    distributions: Table[DistributionStats] = Table()
    for sampling in settings:
        sampling.check_vocabulary(len(tokens))
        p = probabilities(logits[None], sampling)[0]
        counts = draw_counts(p, num_samples, seed)
        setting = (sampling.temperature, sampling.top_k, sampling.top_p)
        nats = float(entropy(p))
        distributions.append(DistributionStats(*setting, nats, math.exp(nats), int((p > 0).sum())))
        for i in range(len(tokens)) if row_ids is None else row_ids:
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
) -> Table[EstimatorTiming]:
    """The exercise's second half: the book's loop, the same samples in one call, and the exact probabilities."""

    def exact() -> Tensor:
        return probabilities(logits[None], SamplingParams(temperature))[0]

    p = exact()
    estimators = [
        ("the book's loop", lambda draws: draw_counts_one_by_one(p, draws, seed) / draws),
        ("all draws at once", lambda draws: draw_counts(p, draws, seed) / draws),
        ("exact", lambda draws: exact()),
    ]
    timings: Table[EstimatorTiming] = Table()
    for name, estimate in estimators:
        estimate(10)  # warm-up
        start = time.perf_counter()
        estimated = estimate(num_samples)
        seconds = time.perf_counter() - start
        timings.append(EstimatorTiming(name, seconds, float((estimated - p).abs().max())))
    return timings


def sampling_figure(
    rows: Sequence[TokenFrequency], num_samples: int, caption: str = ""
) -> "Figure":
    """A panel for each setting: each token's exact probability as a bar, its share of the samples as a cross.

    The vertical line shows where 99 % of all runs have their cross.
    """
    from gpt_lightning.figure import Figure

    by_setting: dict[tuple[float, int | None, float | None], list[TokenFrequency]] = {}
    for row in rows:
        by_setting.setdefault((row.temperature, row.top_k, row.top_p), []).append(row)
    tokens = len(rows) // len(by_setting)
    n_columns = 2 if tokens <= 12 and len(by_setting) > 4 else 1
    n_rows = math.ceil(len(by_setting) / n_columns)
    width = max(7.0, n_columns * (0.55 * tokens + 1.2))
    figure = Figure(figsize=(width, 2.1 * n_rows + 1.6), layout="constrained")
    panels = list(figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flat)
    for axes, (setting, setting_rows) in zip(panels, by_setting.items(), strict=False):
        _panel(axes, setting_rows, num_samples)
        axes.set_title(_setting_name(*setting), fontsize=11)
    for i in range(len(by_setting), len(panels)):
        panels[i].set_visible(False)
        panels[i - n_columns].tick_params(labelbottom=True)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center", ncols=3, fontsize=10, frameon=False,
    )  # fmt: skip
    figure.supylabel("Probability of the next token", fontsize=11)
    add_caption(figure, caption)
    return figure


def _panel(axes: "Axes", rows: Sequence[TokenFrequency], num_samples: int) -> None:
    positions = range(len(rows))
    exact = [row.probability for row in rows]
    axes.bar(positions, exact, 0.7, color=SERIES[0], label="exact")
    shares = [row.count / num_samples for row in rows]
    label = f"share of {num_samples:,} draws"
    axes.plot(
        positions, shares, "X", color=SERIES[1], markeredgecolor=INK, markersize=8, label=label
    )
    low = [max(0.0, row.probability - row.low / num_samples) for row in rows]
    high = [max(0.0, row.high / num_samples - row.probability) for row in rows]
    axes.errorbar(
        positions, exact, [low, high],
        fmt="none", ecolor=INK, elinewidth=1, capsize=4, label="where 99 % of runs lie",
    )  # fmt: skip
    # a number above bar, line and cross: without it, 0 and a small probability look the same
    heights = [max(p, p + up, share) for p, up, share in zip(exact, high, shares, strict=True)]
    for position, (p, height) in enumerate(zip(exact, heights, strict=True)):
        axes.annotate(
            format_percent(p), (position, height), (0, 6), textcoords="offset points",
            ha="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.5, 1])
    axes.set_xticks(
        positions, [escape_undrawable(row.token) for row in rows], rotation=45, ha="right",
        rotation_mode="anchor", parse_math=False,
    )  # fmt: skip
    axes.grid(axis="y", color=INK, alpha=0.15)
    axes.set_axisbelow(True)


def as_dict(
    rows: Sequence[TokenFrequency],
    distributions: Sequence[DistributionStats],
    timings: Sequence[EstimatorTiming],
) -> dict[str, list[dict[str, object]]]:
    """The report as JSON."""
    return {
        "rows": [asdict(row) for row in rows],
        "distributions": [asdict(distribution) for distribution in distributions],
        "methods": [asdict(timing) for timing in timings],
    }


def _setting_name(temperature: float, top_k: int | None, top_p: float | None) -> str:
    parts = [f"temperature {temperature:g}"]
    parts += [f"top_k {top_k}"] if top_k is not None else []
    parts += [f"top_p {top_p:g}"] if top_p is not None else []
    return ", ".join(parts)
