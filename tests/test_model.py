import math

import book
import pytest
import torch
from torch import nn

from gpt_lightning import GPTConfig, GPTModel, generate
from gpt_lightning.model import packed_linear
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.loss import cross_entropy
from gpt_lightning.model.packed_linear import PackedLinear, pack_weights

TINY = GPTConfig(vocab_size=97, context_length=24, emb_dim=32, n_heads=4, n_layers=3, drop_rate=0.0)


def tiny(seed: int = 0, **changes: object) -> GPTModel:
    torch.manual_seed(seed)
    config = GPTConfig(**{**TINY.__dict__, **changes})  # type: ignore[arg-type]
    return GPTModel(config).eval()


def parameters(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in GPTModel(config).parameters())


def test_parameter_counts() -> None:
    assert parameters(GPTConfig(context_length=256)) == 162_419_712
    assert [parameters(config) for config in GPT2_SIZES.values()] == [
        124_439_808,
        354_823_168,
        774_030_080,
        1_557_611_200,
    ]


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_model_equals_the_books_model(qkv_bias: bool) -> None:
    """The same seed gives the same initial weights, logits and dropout."""
    settings = {**TINY.__dict__, "qkv_bias": qkv_bias, "drop_rate": 0.2}
    torch.manual_seed(7)
    theirs = book.BookGPT(settings)
    torch.manual_seed(7)
    ours = GPTModel(GPTConfig(**settings))

    for block, other in zip(ours.trf_blocks, theirs.trf_blocks, strict=True):
        projections = [other.att.W_query, other.att.W_key, other.att.W_value]
        torch.testing.assert_close(
            block.att.qkv.weight,
            torch.cat([linear.weight for linear in projections]),
            rtol=0,
            atol=0,
        )
        if qkv_bias:
            torch.testing.assert_close(
                block.att.qkv.bias,
                torch.cat([linear.bias for linear in projections]),
                rtol=0,
                atol=0,
            )
    idx = torch.randint(97, (2, 24))
    for training in (False, True):
        torch.manual_seed(11)
        expected = theirs.train(training)(idx)
        torch.manual_seed(11)
        torch.testing.assert_close(ours.train(training)(idx), expected, rtol=1e-5, atol=1e-5)


def test_logits_depend_on_earlier_tokens_only() -> None:
    model = tiny()
    idx = torch.randint(97, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert not torch.allclose(before[:, 12], after[:, 12])


@pytest.mark.parametrize("tied", [False, True])
def test_initial_loss_is_that_of_uniform_predictions(tied: bool) -> None:
    model = tiny(vocab_size=5000, emb_dim=64, tied_embeddings=tied)
    idx = torch.randint(5000, (8, 24))
    assert cross_entropy(model(idx), idx.roll(1)).item() == pytest.approx(math.log(5000), abs=0.3)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_overfits_one_batch(tied: bool) -> None:
    model = tiny(tied_embeddings=tied).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.randint(97, (4, 25))
    for _ in range(150):
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 17], [10, 14], [1, 23]])
def test_cached_logits_equal_uncached_logits(chunks: list[int]) -> None:
    model = tiny(qkv_bias=True)
    idx = torch.randint(97, (3, 24))
    cache = KVCache.allocate(model.config, batch_size=3, max_length=24)
    logits = [model(chunk, cache) for chunk in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), rtol=1e-5, atol=1e-5)
    assert cache.length == 24


def test_tied_head_is_the_token_embedding() -> None:
    model = tiny(tied_embeddings=True)
    assert "out_head.weight" not in model.state_dict()
    features = torch.randn(2, 3, 32)
    expected = nn.functional.linear(features, model.tok_emb.weight)
    torch.testing.assert_close(model.head(features), expected, rtol=0, atol=0)


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit a context_length of 24"):
        tiny()(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emb_dim": 100}, "emb_dim: 100 is not divisible by n_heads 12"),
        ({"n_layers": 0}, "n_layers: 0"),
        ({"vocab_size": -5}, "vocab_size: -5"),
        ({"drop_rate": 1.0}, r"drop_rate: 1.0 is outside \[0, 1\)"),
        ({"drop_rate": math.nan}, "drop_rate: nan"),
    ],
)
def test_invalid_configs_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qkv_bias", [False, True])
@torch.inference_mode()
def test_packed_weights_give_the_same_logits_and_tokens(
    monkeypatch: pytest.MonkeyPatch, tied: bool, qkv_bias: bool
) -> None:
    monkeypatch.setattr(packed_linear, "MIN_PACKED_WEIGHTS", 0)
    plain = tiny(tied_embeddings=tied, qkv_bias=qkv_bias)
    packed = tiny(tied_embeddings=tied, qkv_bias=qkv_bias)
    assert pack_weights(packed)
    for shape in [(1, 1), (1, 24), (3, 7), (8, 1)]:
        idx = torch.randint(97, shape)
        torch.testing.assert_close(packed(idx), plain(idx), atol=1e-5, rtol=0)
    prompts = torch.randint(97, (2, 5))
    # beyond context_length too
    assert torch.equal(generate(packed, prompts, 30), generate(plain, prompts, 30))


@torch.inference_mode()
def test_small_layers_are_not_packed() -> None:
    idx = torch.randint(97, (2, 7))
    small, plain = tiny(), tiny()
    assert not pack_weights(small)
    assert torch.equal(small(idx), plain(idx))
    torch.manual_seed(1)
    large_head = tiny(vocab_size=1 << 15)
    expected = large_head(idx)
    assert pack_weights(large_head)
    packed = [name for name, m in large_head.named_modules() if isinstance(m, PackedLinear)]
    assert packed == ["out_head"]
    torch.testing.assert_close(large_head(idx), expected, atol=1e-5, rtol=0)


def test_float64_weights_are_not_packed() -> None:
    model = tiny().to(torch.float64)
    before = model(torch.tensor([[1, 2]]))
    assert not pack_weights(model)
    assert torch.equal(model(torch.tensor([[1, 2]])), before)
