"""The model: its logits against the book's model, causality, caching, documents, attention."""

import itertools
import math

import pytest
import torch
from torch import nn

import book
from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.tokenizer import END_OF_TEXT_ID
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.loss import cross_entropy
from helpers import (
    TINY,
    Command,
    tiny_gpt,
    tiny_gpt2_vocabulary,
)


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
    model = tiny_gpt()
    idx = torch.randint(97, (1, 20))
    changed = idx.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 97
    before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :12], after[:, :12], rtol=0, atol=0)
    assert not torch.allclose(before[:, 12], after[:, 12])


@pytest.mark.parametrize("tied", [False, True])
def test_initial_loss_is_that_of_uniform_predictions(tied: bool) -> None:
    model = tiny_gpt(vocab_size=5000, emb_dim=64, tied_embeddings=tied)
    idx = torch.randint(5000, (8, 24))
    assert cross_entropy(model(idx), idx.roll(1)).item() == pytest.approx(math.log(5000), abs=0.3)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_overfits_one_batch(tied: bool) -> None:
    model = tiny_gpt(tied_embeddings=tied).train()
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
    model = tiny_gpt(qkv_bias=True)
    idx = torch.randint(97, (3, 24))
    cache = KVCache.allocate(model.config, batch_size=3, max_length=24)
    logits = [model(chunk, cache) for chunk in idx.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(idx), rtol=1e-5, atol=1e-5)
    assert cache.length == 24


def test_tied_head_is_the_token_embedding() -> None:
    model = tiny_gpt(tied_embeddings=True)
    assert "out_head.weight" not in model.state_dict()
    features = torch.randn(2, 3, 32)
    expected = nn.functional.linear(features, model.tok_emb.weight)
    torch.testing.assert_close(model.head(features), expected, rtol=0, atol=0)


def test_too_many_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens do not fit a context_length of 24"):
        tiny_gpt()(torch.zeros(1, 25, dtype=torch.long))


def test_documents_in_one_window_equal_separate_windows() -> None:
    """Two and three documents, the first without its start, and two successive EOT delimiters."""
    model = tiny_gpt2_vocabulary()
    ids = torch.randint(0, 50256, (3, 24), generator=torch.Generator().manual_seed(2))
    for row, places in enumerate([[9], [5, 14], [3, 4, 23]]):
        ids[row, places] = END_OF_TEXT_ID
    documents = (ids == END_OF_TEXT_ID).cumsum(dim=1)
    together = model(ids, documents=documents)
    for row, bounds in enumerate([[0, 9, 24], [0, 5, 14, 24], [0, 3, 4, 23, 24]]):
        for begin, end in itertools.pairwise(bounds):
            alone = model(ids[row : row + 1, begin:end])[0]
            torch.testing.assert_close(together[row, begin:end], alone, atol=1e-5, rtol=1e-5)
    assert (together - model(ids))[:, -1].abs().max() > 1e-2  # without boundaries it is otherwise
    one = torch.zeros_like(ids)
    torch.testing.assert_close(model(ids, documents=one), model(ids), atol=1e-5, rtol=1e-5)


def test_no_gradient_crosses_a_document_boundary() -> None:
    model = tiny_gpt2_vocabulary()
    ids = torch.arange(100, 124)[None]
    ids[0, 10] = END_OF_TEXT_ID
    documents = (ids == END_OF_TEXT_ID).cumsum(dim=1)
    weights = torch.randn(16, generator=torch.Generator().manual_seed(3))
    (model.features(ids, documents=documents)[0, 10:] @ weights).sum().backward()
    assert model.tok_emb.weight.grad is not None
    moved = model.tok_emb.weight.grad.abs().sum(dim=1)
    assert torch.all(moved[100:110] == 0)
    assert torch.all(moved[111:124] > 0)


def test_attention_dropout_has_a_rate_of_its_own(fit: Command) -> None:
    config = GPTConfig(drop_rate=0.1, attn_drop_rate=0.0, emb_dim=32, n_heads=2, n_layers=1)
    assert GPTModel(config).trf_blocks[0].att.drop_rate == 0.0
    assert GPTModel(config).trf_blocks[0].drop_shortcut.p == 0.1
    assert GPTConfig(drop_rate=0.2).attention_drop_rate == 0.2
    with pytest.raises(ValueError, match="attn_drop_rate"):
        GPTConfig(attn_drop_rate=1.5)
    fit("--trainer.max_steps=1", "--model.config.attn_drop_rate=0.0")
    fit("--trainer.max_steps=2", "--model.config.attn_drop_rate=0.1", "--ckpt_path=last")
