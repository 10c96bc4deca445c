"""The logit lens and attention weights, compared with the model and with transformers."""

from pathlib import Path

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.tokenizer import GPT2
from gpt_lightning.exploring.inside import (
    attention_weights,
    hidden_states,
    layer_names,
    lens_json,
    lens_logits,
)
from gpt_lightning.model.packed_linear import pack_weights
from gpt_lightning.pretrained.convert import save_model
from helpers import tiny_gpt

IDS = [5, 1, 96, 40, 2, 2, 71, 8, 33]


def lens(model: GPTModel, ids: list[int], positions: int) -> list[torch.Tensor]:
    """Logits of each layer."""
    return [lens_logits(model, hidden) for hidden in hidden_states(model, ids, positions)]


def small_gpt(*, tied: bool, pack: bool = False) -> GPTModel:
    """A model whose layers are large enough to be packed."""
    torch.manual_seed(2)
    config = GPTConfig(
        vocab_size=5000, context_length=32, emb_dim=384, n_heads=6, n_layers=2,
        qkv_bias=True, tied_embeddings=tied,
    )  # fmt: skip
    model = GPTModel(config).eval()
    if pack:
        assert pack_weights(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_the_last_layer_of_the_lens_is_the_model(dtype: torch.dtype, *, tied: bool) -> None:
    model = tiny_gpt(tied_embeddings=tied).to(dtype)
    layers = lens(model, IDS, len(IDS))
    assert len(layers) == 1 + model.config.n_layers
    assert torch.equal(layers[-1], model(torch.tensor([IDS]))[0])


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_packed_weights(*, tied: bool) -> None:
    model, packed = small_gpt(tied=tied), small_gpt(tied=tied, pack=True)
    layers = lens(packed, IDS, len(IDS))
    assert torch.equal(layers[-1], packed(torch.tensor([IDS]))[0])
    for layer, expected in zip(layers, lens(model, IDS, len(IDS)), strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-5, rtol=1e-5)
    weights = attention_weights(packed, IDS, 1, len(IDS))
    torch.testing.assert_close(
        weights, attention_weights(model, IDS, 1, len(IDS)), atol=1e-5, rtol=0
    )


@torch.inference_mode()
def test_layers_of_the_lens_are_hidden_states_under_the_head() -> None:
    model = tiny_gpt()
    x = model.tok_emb(torch.tensor(IDS)) + model.pos_emb(torch.arange(len(IDS)))
    expected = [model.head(model.final_norm(x))]
    for block in model.trf_blocks:
        x = block(x[None])[0]
        expected.append(model.head(model.final_norm(x)))
    for layer, logits in zip(lens(model, IDS, 4), expected, strict=True):
        torch.testing.assert_close(layer, logits[-4:], atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_lens_as_the_page_shows_it(tiny: GPTModel) -> None:
    ids = GPT2.encode_prompt("Every effort moves you forward")
    layers = [
        lens_json(tiny, GPT2, name, hidden)
        for name, hidden in zip(layer_names(tiny), hidden_states(tiny, ids, 3), strict=True)
    ]
    assert [layer["name"] for layer in layers] == ["embedding", "block 1", "block 2"]
    p = tiny(torch.tensor([ids]))[0, -3:].softmax(dim=-1)
    for position, row in zip(layers[-1]["positions"], p, strict=True):
        best = row.topk(5)
        assert [token["id"] for token in position["top"]] == best.indices.tolist()
        shown = [token["probability"] for token in position["top"]]
        assert shown == pytest.approx(best.values.tolist(), abs=1e-7)
        nats = float(torch.special.entr(row.double()).sum())
        assert position["entropy"] == pytest.approx(nats, abs=1e-6)


def test_a_long_prompt_is_cropped() -> None:
    model = tiny_gpt()
    ids = [i % 97 for i in range(60)]
    for long, window in zip(lens(model, ids, 24), lens(model, ids[-24:], 24), strict=True):
        assert torch.equal(long, window)
    assert torch.equal(
        attention_weights(model, ids, 0, 24), attention_weights(model, ids[-24:], 0, 24)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_attention_sum_to_1(dtype: torch.dtype) -> None:
    model = tiny_gpt().to(dtype)
    for layer in range(model.config.n_layers):
        weights = attention_weights(model, IDS, layer, len(IDS))
        assert weights.shape == (4, len(IDS), len(IDS))
        assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(weights, weights.tril())
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(4, len(IDS)).to(weights))


def test_the_last_rows_of_attention_are_those_of_all() -> None:
    model = tiny_gpt()
    all_rows = attention_weights(model, IDS, 2, len(IDS))
    last = attention_weights(model, IDS, 2, 3)
    torch.testing.assert_close(last, all_rows[:, -3:])


@pytest.mark.parametrize("pack", [False, True])
def test_attention_equals_transformers(tmp_path: Path, *, pack: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_gpt(tied=True)
    with torch.no_grad():  # larger weights than at the start of training: attention is not uniform
        for block in model.trf_blocks:
            block.att.qkv.weight.mul_(8)  # type: ignore[union-attr]
    save_model(model, tmp_path / "hf", "hf")
    if pack:
        assert pack_weights(model)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "hf", attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        answer = theirs(torch.tensor([IDS]), output_attentions=True)
    for layer, expected in enumerate(answer.attentions):
        weights = attention_weights(model, IDS, layer, len(IDS))
        assert float(weights[:, -1].std()) > 0.05
        torch.testing.assert_close(weights, expected[0], atol=1e-5, rtol=0)


def test_damaged_weights() -> None:
    model = tiny_gpt()
    with torch.no_grad():
        model.trf_blocks[1].norm1.weight[0] = torch.nan  # type: ignore[union-attr, index]
    attention_weights(model, IDS, 0, 2)
    with pytest.raises(ValueError, match="the model's weights are damaged"):
        attention_weights(model, IDS, 1, 2)
    embedding, *blocks = hidden_states(model, IDS, 2)
    lens_json(model, GPT2, "embedding", embedding)
    with pytest.raises(ValueError, match="the model's weights are damaged"):
        lens_json(model, GPT2, "block 2", blocks[1])


def test_no_hook_stays(tiny: GPTModel) -> None:
    attention_weights(tiny, [1, 2], 0, 2)
    hidden_states(tiny, [1, 2], 2)
    with pytest.raises(IndexError):
        hidden_states(tiny, [50257], 1)  # fails while hooks are there
    assert not any(module._forward_hooks for module in tiny.modules())
