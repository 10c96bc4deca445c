"""The sampling filters and draws."""

import math

import pytest
import torch

from gpt_lightning import GPTModel, generate
from gpt_lightning.generation.sampling import SamplingParams, probabilities, sample, top_k_filter
from gpt_lightning.reports.sampling import (
    binomial_interval,
    draw_counts,
    draw_counts_one_by_one,
    frequencies,
)
from helpers import (
    make_generator,
)


def test_top_k_keeps_exactly_k_and_the_lower_ids_of_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    for k in range(1, 6):
        assert torch.isfinite(top_k_filter(logits, k)).sum(dim=-1).tolist() == [k, k]
    assert torch.isfinite(top_k_filter(logits, 2)).nonzero()[:, 1].tolist() == [1, 2, 0, 1]


def test_top_k_1_agrees_with_greedy_on_ties() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]]).repeat(50, 1)
    drawn = sample(logits, SamplingParams(temperature=1.0, top_k=1), generator=make_generator(0))
    assert drawn.tolist() == sample(logits, SamplingParams()).tolist() == [1] * 50


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-8, 1.0, 1e6])
def test_probabilities_are_finite_at_any_temperature(temperature: float) -> None:
    p = probabilities(torch.tensor([[80.0, -80.0, 79.0]]), SamplingParams(temperature))
    assert torch.isfinite(p).all()
    assert p.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": 0}, "top_k: 0"),
        ({"top_k": 102}, "top_k: 102 is outside the vocabulary; give 1 to 101"),
    ],
)
def test_invalid_sampling_settings_are_refused(
    model: GPTModel, idx: torch.Tensor, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, idx, 3, **settings)  # type: ignore[arg-type]


def test_top_p_1_keeps_all_tokens() -> None:
    logits = torch.randn(1, 50257, generator=make_generator(1)) * 8
    assert (probabilities(logits, SamplingParams(1.0, top_p=1.0)) > 0).sum() == (
        probabilities(logits, SamplingParams(1.0)) > 0
    ).sum()


def test_filters_do_not_depend_on_the_models_precision() -> None:
    logits = torch.randn(1, 50257, generator=make_generator(1)).bfloat16()
    settings = SamplingParams(1.0, top_p=0.9)
    p = probabilities(logits, settings)
    torch.testing.assert_close(p, probabilities(logits.float(), settings), rtol=0, atol=0)


PROCESSORS = {
    "temperature": ({"temperature": 0.7}, "TemperatureLogitsWarper", (0.7,)),
    "top_k": ({"temperature": 1.0, "top_k": 7}, "TopKLogitsWarper", (7,)),
    "top_p": ({"temperature": 1.0, "top_p": 0.6}, "TopPLogitsWarper", (0.6,)),
    "min_p": ({"temperature": 1.0, "min_p": 0.2}, "MinPLogitsWarper", (0.2,)),
    "repetition_penalty": (
        {"temperature": 1.0, "repetition_penalty": 1.7},
        "RepetitionPenaltyLogitsProcessor",
        (1.7,),
    ),
}


@pytest.mark.parametrize("names", [[name] for name in PROCESSORS] + [list(PROCESSORS)])
def test_filters_equal_those_of_transformers(names: list[str]) -> None:
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(6, 101, generator=make_generator(9)) * 3
    ids = torch.randint(101, (6, 12), generator=make_generator(10))
    expected, settings = logits, {}
    for name in ["repetition_penalty", *(n for n in names if n != "repetition_penalty")]:
        if name in names:
            own_settings, class_name, arguments = PROCESSORS[name]
            settings |= {
                k: v for k, v in own_settings.items() if k == name or "temperature" not in settings
            }
            expected = getattr(processors, class_name)(*arguments)(ids, expected)
    if "temperature" in names:
        settings["temperature"] = 0.7
    p = probabilities(logits, SamplingParams(**settings), ids)
    torch.testing.assert_close(p, expected.softmax(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_logits_are_refused(bad: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 2] = bad
    for settings in (SamplingParams(), SamplingParams(1.0)):
        with pytest.raises(ValueError, match="logits: a row has NaN"):
            sample(logits, settings, generator=make_generator(0))
    with pytest.raises(ValueError, match="only -inf"):
        sample(torch.full((1, 5), -torch.inf), SamplingParams(1.0), generator=make_generator(0))


@pytest.mark.parametrize("name", ["top_p", "min_p"])
@pytest.mark.parametrize("value", [0.0, -0.5, 1.5, float("nan")])
def test_top_p_and_min_p_outside_their_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}: .* is outside \(0, 1\]"):
        SamplingParams(1.0, **{name: value})


@pytest.mark.parametrize("distributions", [pytest.param(5, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.nightly)])  # fmt: skip
def test_frequencies_lie_in_binomial_intervals(distributions: int) -> None:
    """A million draws from random distributions with every filter; 1 interval in 10⁵ fails by chance."""
    generator = make_generator(20)
    checked = failed = 0
    for i in range(distributions):
        logits = torch.randn(1, 30, generator=generator) * 2
        for settings in (
            SamplingParams(1.0),
            SamplingParams(0.5, top_k=9),
            SamplingParams(2.0, top_p=0.8),
            SamplingParams(1.0, min_p=0.1),
            SamplingParams(1.5, repetition_penalty=1.5),
        ):
            p = probabilities(logits, settings, ids=torch.tensor([[1, 2, 3]]))[0]
            counts = draw_counts(p, 1_000_000, seed=i)
            assert counts.sum() == 1_000_000
            for token in range(30):
                low, high = binomial_interval(1_000_000, float(p[token]), share=1 - 1e-5)
                checked += 1
                failed += not low <= int(counts[token]) <= high
    assert checked == 150 * distributions
    assert failed <= 1


def test_intervals_cover_the_binomial_distribution() -> None:
    def coverage(n: int, p: float) -> float:
        low, high = binomial_interval(n, p)
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(low, high + 1))

    for n, p in [(10, 0.5), (100, 0.043), (1000, 0.58), (1000, 0.0003), (50, 0.99)]:
        assert 0.99 <= coverage(n, p) <= 1.0
        low, high = binomial_interval(n, p)
        assert low <= n * p <= high + 1
        assert high - low <= 2 * 2.6 * math.sqrt(n * p * (1 - p)) + 3
    assert binomial_interval(10, 0.0) == (0, 0)
    assert binomial_interval(10, 1.0) == (10, 10)


@pytest.mark.parametrize("seed", [1, 123])
@pytest.mark.parametrize("size", [2, 9, 40, 300])
def test_vectorized_draws_equal_successive_draws(seed: int, size: int) -> None:
    p = (torch.randn(size, generator=make_generator(size)) * 2).softmax(dim=0)
    assert torch.equal(draw_counts(p, 700, seed), draw_counts_one_by_one(p, 700, seed))
    torch.manual_seed(seed)
    expected = [torch.multinomial(p, num_samples=1).item() for _ in range(700)]
    assert (
        draw_counts(p, 700, seed).tolist()
        == torch.tensor(expected).bincount(minlength=size).tolist()
    )


@pytest.mark.parametrize("shift", [-100.0, 0.0, 100.0])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 1.4, 5.0])
def test_counts_from_logits_equal_successive_draws(shift: float, temperature: float) -> None:
    """softmax(logits / temperature) is bit for bit the same: other rounding would change some draws."""
    for seed in range(12):
        logits = torch.randn(9, generator=make_generator(seed)) * 0.3 + shift
        rows, _ = frequencies(logits, list("abcdefghi"), [SamplingParams(temperature)], 1000, seed)
        torch.manual_seed(seed)
        p = torch.softmax(logits / temperature, dim=0)
        drawn = torch.tensor([torch.multinomial(p, num_samples=1).item() for _ in range(1000)])
        assert [row.count for row in rows] == drawn.bincount(minlength=9).tolist()


def test_tiny_temperature_does_not_overflow() -> None:
    for scale in (1.0, 1e30, 1e38):
        logits = torch.tensor([[1.0, 2.0, -1.0]]) * scale
        assert probabilities(logits, SamplingParams(1e-40)).tolist() == [[0.0, 1.0, 0.0]]


def test_greedy_equals_top_k_1_in_bfloat16() -> None:
    logits = torch.randn(200, 5000, generator=make_generator(1)).mul(3).sub(40).bfloat16()
    ids = logits.topk(3).indices
    greedy = SamplingParams(repetition_penalty=1.05)
    one = SamplingParams(1.0, top_k=1, repetition_penalty=1.05)
    found = sample(logits, greedy, ids=ids)
    assert torch.equal(found, sample(logits, one, ids=ids))
    assert torch.equal(found, probabilities(logits, greedy, ids).argmax(dim=-1))
