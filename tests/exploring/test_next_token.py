"""The distribution of the next token: equal to report sampling's, draws, what is cut off."""

import math

import pytest
import torch

from gpt_lightning import GPTModel
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.exploring.next_token import (
    MAX_BARS,
    NextToken,
    NextTokenReader,
    chosen_token_json,
    distribution_json,
    draw_counts,
)
from gpt_lightning.generation.sampling import SamplingParams, probabilities
from gpt_lightning.model.kv_cache import KVCache
from helpers import tiny_gpt

IDS = GPT2.encode_prompt("Every effort moves you")
ALL_SETTINGS = SamplingParams(
    temperature=0.7, top_k=60, top_p=0.9, min_p=0.01, repetition_penalty=1.3
)


def next_tokens(model: GPTModel, ids: list[int], lengths: list[int]) -> list[NextToken]:
    reader = NextTokenReader(model)
    if max(lengths) > model.config.context_length:  # such texts are read one by one
        return [token for length in lengths for token in reader.read(ids, [length])]
    return reader.read(ids, lengths)


@torch.inference_mode()
def reference(model: GPTModel, ids: list[int], sampling: SamplingParams) -> torch.Tensor:
    window = torch.tensor([ids[-model.config.context_length :]])
    logits = model.head(model.features(window)[:, -1])  # of one row: more rows round differently
    return probabilities(logits.float(), sampling, torch.tensor([ids]))[0]


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=7),
        SamplingParams(temperature=2.0, top_p=0.5),
        ALL_SETTINGS,
    ],
    ids=str,
)
@pytest.mark.parametrize("ids", [IDS, IDS * 8], ids=["short", "cropped"])
def test_bars_and_rest_are_the_distribution(
    tiny: GPTModel, ids: list[int], sampling: SamplingParams
) -> None:
    expected, own = (reference(tiny, ids, s) for s in (sampling, SamplingParams(temperature=1.0)))
    (next_token,) = next_tokens(tiny, ids, [len(ids)])
    answer = distribution_json(next_token, GPT2, ids, sampling, bars=30)
    order = own.sort(descending=True, stable=True).indices
    assert [bar["id"] for bar in answer["bars"]] == order[:30].tolist()
    assert [bar["rank"] for bar in answer["bars"]] == list(range(1, 31))
    for bar in answer["bars"]:
        assert bar["probability"] == pytest.approx(float(expected[bar["id"]]), abs=1e-6)
        assert bar["model_probability"] == pytest.approx(float(own[bar["id"]]), abs=1e-6)
        assert bar["text"] == GPT2.decode([bar["id"]])
    rest = answer["rest"]
    assert rest["count"] == 50257 - 30
    for name in ("probability", "model_probability"):
        total = rest[name] + math.fsum(bar[name] for bar in answer["bars"])
        assert total == pytest.approx(1, abs=1e-5)
    assert answer["num_kept"] == int((expected > 0).sum())
    nats = float(torch.special.entr(expected.double()).sum())
    assert answer["entropy"] == pytest.approx(nats, abs=1e-6)
    assert answer["effective_vocabulary"] == pytest.approx(math.exp(nats), rel=1e-6)


def test_no_bars(tiny: GPTModel) -> None:
    (next_token,) = next_tokens(tiny, IDS, [len(IDS)])
    answer = distribution_json(next_token, GPT2, IDS, ALL_SETTINGS, bars=0, draws=5)
    assert answer["bars"] == []
    assert answer["rest"]["drawn"] == 5
    assert answer["rest"]["probability"] == pytest.approx(1, abs=1e-5)


def test_a_vocabulary_smaller_than_the_bars() -> None:
    model = tiny_gpt()
    (next_token,) = next_tokens(model, [1, 2], [2])
    answer = distribution_json(
        next_token, GPT2, [1, 2], SamplingParams(temperature=1.0), bars=MAX_BARS
    )
    assert len(answer["bars"]) == 97
    assert answer["rest"] == {"count": 0, "model_probability": 0, "probability": 0, "drawn": 0}


@pytest.mark.parametrize("length", [6, 30], ids=["fits", "cropped"])
def test_all_lengths_at_once_are_each_length_alone(tiny: GPTModel, length: int) -> None:
    ids = (IDS * 9)[:length]
    lengths = [1, length - 1, length]
    for one, n in zip(next_tokens(tiny, ids, lengths), lengths, strict=True):
        (alone,) = next_tokens(tiny, ids[:n], [n])
        torch.testing.assert_close(one.logits, alone.logits, atol=1e-5, rtol=0)
        expected = reference(tiny, ids[:n], SamplingParams(temperature=1.0))
        torch.testing.assert_close(one.probabilities, expected, atol=1e-6, rtol=0)


def test_a_reader_computes_only_what_is_new(
    tiny: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    features = tiny.features

    def count(idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        computed.append(idx.shape[1])
        return features(idx, cache)

    monkeypatch.setattr(tiny, "features", count)
    reader = NextTokenReader(tiny)
    ids = IDS * 8
    for sequence, lengths, expected in [
        (ids[:4], [4], 4),
        (ids[:5], [5], 1),  # one token more
        (ids[:5], [5], 1),  # the same: the features of its last token are not kept
        ([*ids[:3], 9, 9], [5], 2),  # another branch
        (ids[:2], [2], 1),  # back
        (ids[:9], [3, 6, 9], 7),
        ([7, *ids[:9]], [10], 10),
        (ids[:24], [24], 24),
        (ids[:25], [25], 24),  # the window slides
        (ids[:12], [11, 12], 12),
    ]:
        read = reader.read(sequence, lengths)
        assert computed.pop() == expected
        for one, length in zip(read, lengths, strict=True):
            sampling = SamplingParams(temperature=1.0)
            with monkeypatch.context() as patch:
                patch.setattr(tiny, "features", features)
                p = reference(tiny, sequence[:length], sampling)
            torch.testing.assert_close(one.probabilities, p, atol=1e-6, rtol=0)


def test_a_reader_after_a_failure(tiny: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = NextTokenReader(tiny)
    reader.read(IDS, [4])
    with monkeypatch.context() as patch:

        def fail(*_: object) -> None:
            raise RuntimeError

        patch.setattr(tiny.trf_blocks[1], "forward", fail)
        with pytest.raises(RuntimeError):
            reader.read([1, 2, *IDS], [6])
    (again,) = reader.read([*IDS, 5], [5])
    p = reference(tiny, [*IDS, 5], SamplingParams(temperature=1.0))
    torch.testing.assert_close(again.probabilities, p, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype)
    (next_token,) = next_tokens(model, [3, 4, 5], [3])
    assert next_token.logits.dtype == torch.float32
    with torch.inference_mode():
        torch.testing.assert_close(
            next_token.logits, model(torch.tensor([[3, 4, 5]]))[0, -1].float()
        )


def test_draws_follow_the_distribution(tiny: GPTModel) -> None:
    p = reference(tiny, IDS, SamplingParams(temperature=0.5, top_k=5))
    counts = draw_counts(p, 10_000, seed=1)
    assert int(counts.sum()) == 10_000
    assert set(counts.nonzero().flatten().tolist()) <= set(p.nonzero().flatten().tolist())
    for token in p.nonzero().flatten().tolist():
        deviation = math.sqrt(10_000 * float(p[token] * (1 - p[token])))
        assert abs(int(counts[token]) - 10_000 * float(p[token])) < 5 * deviation
    assert torch.equal(counts, draw_counts(p, 10_000, seed=1))
    assert not torch.equal(counts, draw_counts(p, 10_000, seed=2))
    assert int(draw_counts(p, 0, seed=1).sum()) == 0


def test_a_chosen_token_has_the_figures_of_its_bar(tiny: GPTModel) -> None:
    (next_token,) = next_tokens(tiny, IDS, [len(IDS)])
    bars = distribution_json(next_token, GPT2, IDS, ALL_SETTINGS, bars=100)["bars"]
    for bar in bars[::9]:
        chosen = chosen_token_json(next_token, GPT2, IDS, bar["id"], ALL_SETTINGS)
        assert chosen == {key: bar[key] for key in chosen}
        assert set(chosen) == {
            "id", "text", "bytes", "rank", "model_probability", "probability",
        }  # fmt: skip


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    model = tiny_gpt()
    assert model.out_head is not None
    with torch.no_grad():
        model.out_head.weight.zero_()  # type: ignore[union-attr, operator]
    (next_token,) = next_tokens(model, [1], [1])
    assert next_token.top.tolist() == list(range(97))
    assert chosen_token_json(next_token, GPT2, [1], 50, SamplingParams())["rank"] == 51


def test_damaged_weights() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.final_norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="the model's weights are damaged"):
        next_tokens(model, [1], [1])
