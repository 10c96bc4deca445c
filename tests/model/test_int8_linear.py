"""Int8 weights: close to the float model, also where channels have a large gain; refused where no kernel is."""

import copy

import pytest
import torch
import torch.nn.functional as F

from gpt_lightning import GPTConfig, GPTModel, generate, generate_simple
from gpt_lightning.model import int8_linear
from gpt_lightning.model.int8_linear import Int8Linear, int8_unsupported_reason, quantize_int8
from helpers import Command, assert_refused, json_of, make_generator

pytestmark = pytest.mark.skipif(
    int8_unsupported_reason(torch.device("cpu")) is not None, reason="no int8 kernel for this CPU"
)
CONFIG = GPTConfig(vocab_size=61, context_length=32, emb_dim=64, n_heads=4, n_layers=3, qkv_bias=True)  # fmt: skip


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The product of the rounded numbers in float64: a scale per row of the weights, and per token."""
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    rounded = (weight / scales).round() * scales
    return (x.double() @ rounded.double().T + bias.double()).float()


@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48), (1, 1, 48)])
def test_layer_is_the_product_of_rounded_weights(shape: tuple[int, ...]) -> None:
    """What remains is the rounding of the activations, which is a 255th of a token's range."""
    generator = make_generator(1)
    weight, bias = torch.randn(40, 48, generator=generator), torch.randn(40, generator=generator)
    x = torch.randn(shape, generator=generator)
    x[..., -1, :] *= 1000  # one token with large activations does not take the bits of the others
    found, expected = Int8Linear(weight, bias)(x), reference(x, weight, bias)
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=-1)
    step = 2 * x.abs().amax(dim=-1) / 255
    # the error of a sum of 48 roundings, each at most half a step
    assert (error <= step * weight.norm()).all()


def test_zeros_are_exact() -> None:
    layer = Int8Linear(torch.zeros(3, 8), torch.ones(3))
    assert torch.equal(layer(torch.zeros(2, 8)), torch.ones(2, 3))


def with_outliers(model: GPTModel, factor: float) -> GPTModel:
    """The same function: some gains of the norms times ``factor``, the matrices after them divided."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block in model.trf_blocks:
            for norm, layer in ((block.norm1, block.att.qkv), (block.norm2, block.ff.layers[0])):
                norm.weight[::9] *= factor
                norm.bias[::9] *= factor
                layer.weight[:, ::9] /= factor
    return model


def losses(model: GPTModel, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return float(F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))


@pytest.fixture(scope="module")
def trained() -> tuple[GPTModel, torch.Tensor]:
    """A model that has learned a text with patterns, and more of that text ``(B, T)``."""
    torch.manual_seed(2)
    model = GPTModel(GPTConfig(**{**vars(CONFIG), "drop_rate": 0.0}))
    start = torch.randint(61, (130, 1), generator=make_generator(3))
    step = torch.randint(1, 4, (130, 1), generator=make_generator(4))
    ids = (start + step * torch.arange(33)) % 61
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = F.cross_entropy(model(ids[:100, :-1]).flatten(0, 1), ids[:100, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), ids[100:]


@pytest.mark.parametrize("tied", [True, False])
def test_loss_stays_that_of_the_float_model(
    trained: tuple[GPTModel, torch.Tensor], tied: bool
) -> None:
    """Perplexity within 1 %, also for the same function with outlier channels."""
    model, ids = trained
    if tied:
        model = GPTModel(GPTConfig(**{**vars(model.config), "tied_embeddings": True})).eval()
    before = losses(model, ids)
    for factor in (1.0, 20.0):
        changed = with_outliers(model, factor)
        assert losses(changed, ids) == pytest.approx(before, abs=1e-4)
        quantize_int8(changed)
        assert losses(changed, ids) == pytest.approx(before, abs=0.01)


def test_text_is_that_of_the_plain_loop(trained: tuple[GPTModel, torch.Tensor]) -> None:
    """Greedy decoding with the cache and without, over the same quantized weights."""
    model, ids = copy.deepcopy(trained[0]), trained[1]
    quantize_int8(model)
    prompt = ids[:4, :9]
    assert torch.equal(generate(model, prompt, 15), generate_simple(model, prompt, 15))


def test_commands_take_int8(fit: Command, command: Command) -> None:
    fit("--trainer.max_steps=4")
    generate = ("generate", "--from=checkpoints/quickstart", "--prompt=the", "--json")
    result = command(*generate, "--dtype=int8", "--max_new_tokens=5")
    generated = json_of(result)
    assert "Warning" not in result.err
    assert generated["settings"]["dtype"] == "int8"
    assert len(generated["token_ids"]) == 6


def test_cpu_without_a_kernel_is_refused(
    command: Command, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps=1")
    monkeypatch.setattr(int8_linear, "_ENGINES", ())
    result = command("generate", "--from=checkpoints/quickstart", "--prompt=a", "--dtype=int8")
    assert_refused(result, "dtype: int8 has no kernel for this CPU; give bfloat16")
    assert int8_unsupported_reason(torch.device("cuda")) == "int8 has no kernel for cuda"
