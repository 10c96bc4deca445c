"""Matrices in 8 or 4 bits: close to the float model, also where channels have a large gain."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gpt_lightning import GPTConfig, GPTModel, generate, generate_simple, save_model
from gpt_lightning.kernels.c_compiler import compiler_unsupported_reason
from gpt_lightning.model import cpu_decode, int8_linear, quantize
from gpt_lightning.model.cpu_decode import CpuDecodeStep
from gpt_lightning.model.int8_linear import has_int8_kernel
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.model.quantize import quantize_unsupported_reason, quantize_weights
from gpt_lightning.pretrained import load
from helpers import SMALL_QUICKSTART, Command, assert_refused, json_of, make_generator

pytestmark = pytest.mark.skipif(not has_int8_kernel(), reason="no int8 kernel for this CPU")
CONFIG = GPTConfig(vocab_size=61, context_length=32, emb_dim=64, n_heads=4, n_layers=3, qkv_bias=True)  # fmt: skip
DTYPES = (torch.int8, torch.int4)
TOLERANCES = {torch.int8: 0.01, torch.int4: 0.05}  # of the loss


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [True, False])
def test_loss_stays_that_of_the_float_model(
    trained: tuple[GPTModel, torch.Tensor], tied: bool, dtype: torch.dtype
) -> None:
    """Perplexity within 1 % (int8) and 5 % (int4), also for the same function with outlier channels."""
    model, ids = trained
    if tied:
        model = GPTModel(GPTConfig(**{**vars(model.config), "tied_embeddings": True})).eval()
    before = losses(model, ids)
    for factor in (1.0, 20.0):
        changed = with_outliers(model, factor)
        assert losses(changed, ids) == pytest.approx(before, abs=1e-4)
        quantize_weights(changed, dtype)
        assert losses(changed, ids) == pytest.approx(before, abs=TOLERANCES[dtype])


@pytest.mark.skipif(compiler_unsupported_reason() is not None, reason="no C compiler")
@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_loss_of_the_step_in_c_stays_that_of_the_float_model(
    trained: tuple[GPTModel, torch.Tensor], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, token by token, with and without outlier channels."""
    monkeypatch.setattr(cpu_decode, "MIN_WEIGHTS", 0)
    model, ids = copy.deepcopy(trained[0]).requires_grad_(False), trained[1][:12]
    before = losses(model, ids)
    for factor in (1.0, 20.0):
        changed = with_outliers(model, factor)
        quantize_weights(changed, dtype, keep_codes=True)
        steps = []
        for row in ids:
            cache = KVCache.allocate(CONFIG, 1, 32)
            step = CpuDecodeStep(changed, cache)
            logits = torch.cat([step(token[None]).clone() for token in row[:-1]])
            steps.append(F.cross_entropy(logits, row[1:]))
        assert float(torch.stack(steps).mean()) == pytest.approx(before, abs=TOLERANCES[dtype])


@pytest.mark.parametrize(("dtype", "error"), [(torch.int8, 0.02), (torch.int4, 0.15)])
def test_logits_are_close(
    trained: tuple[GPTModel, torch.Tensor], dtype: torch.dtype, error: float
) -> None:
    model, ids = trained
    quantized = copy.deepcopy(model)
    quantize_weights(quantized, dtype)
    with torch.inference_mode():
        expected, found = model(ids[:, :-1]), quantized(ids[:, :-1])
    expected = expected - expected.mean(dim=-1, keepdim=True)
    found = found - found.mean(dim=-1, keepdim=True)
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_is_that_of_the_plain_loop(
    trained: tuple[GPTModel, torch.Tensor], dtype: torch.dtype
) -> None:
    """Greedy decoding with the cache and without, over the same quantized weights."""
    model, ids = copy.deepcopy(trained[0]), trained[1]
    quantize_weights(model, dtype)
    prompt = ids[:4, :9]
    assert torch.equal(generate(model, prompt, 15), generate_simple(model, prompt, 15))


def test_cpu_without_an_int4_kernel_computes_in_float32(
    trained: tuple[GPTModel, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same rounded weights, so with nearly the same loss."""
    models = [copy.deepcopy(trained[0]) for _ in range(2)]
    quantize_weights(models[0], torch.int4)
    monkeypatch.setattr(quantize, "has_int4_kernel", lambda: False)
    quantize_weights(models[1], torch.int4)
    assert type(models[1].trf_blocks[0].att.qkv) is nn.Linear
    one, other = (losses(model, trained[1]) for model in models)
    assert one == pytest.approx(other, abs=0.01)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_commands_take_it(fit: Command, command: Command, dtype: str) -> None:
    fit("--trainer.max_steps=4")
    generate = ("generate", "--from=checkpoints/quickstart", "--prompt=the", "--json")
    result = command(*generate, f"--dtype={dtype}", "--max_new_tokens=5")
    generated = json_of(result)
    assert "Warning" not in result.err
    assert generated["settings"]["dtype"] == dtype
    assert len(generated["token_ids"]) == 6


def test_cpu_without_a_kernel(
    command: Command, fit: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit("--trainer.max_steps=1")
    generate = ("generate", "--from=checkpoints/quickstart", "--prompt=a", "--max_new_tokens=3")
    monkeypatch.setattr(load, "has_int4_kernel", lambda: False)
    monkeypatch.setattr(quantize, "has_int4_kernel", lambda: False)
    result = command(*generate, "--dtype=int4")
    assert result.code == 0
    assert "gpt_lightning: dtype: torch has no fast kernel for int4 on this CPU; " in result.err
    monkeypatch.setattr(int8_linear, "_ENGINES", ())
    assert command(*generate, "--dtype=int4").code == 0
    result = command(*generate, "--dtype=int8")
    assert_refused(result, "dtype: int8 has no kernel for this CPU; give bfloat16")


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_other_devices_and_training_refuse_it(command: Command, dtype: str) -> None:
    found = quantize_unsupported_reason(getattr(torch, dtype), torch.device("cuda"))
    assert found == f"{dtype} has no kernel for cuda"
    result = command("fit", *SMALL_QUICKSTART, f"--trainer.precision={dtype}")
    assert result.code == 2
    assert result.error.startswith("gpt_lightning: error: trainer.precision: ")
    assert result.error.count("\n") == 1


@pytest.mark.parametrize("name", ["trf_blocks.1.norm1", "trf_blocks.1.ff.layers.0", "final_norm"])
def test_damaged_weights_are_noticed(command: Command, name: str) -> None:
    """As in float32: in a prompt of one token and in a longer one."""
    model = GPTModel(GPTConfig(**{**vars(CONFIG), "vocab_size": 50257, "n_layers": 2}))
    with torch.no_grad():
        model.get_parameter(f"{name}.weight")[-1] = torch.nan
    save_model(model, "damaged.ckpt", "lightning")
    for prompt in ("!", "!!!"):
        for dtype in ("float32", "int8", "int4"):
            result = command(
                "generate", "--from=damaged.ckpt", f"--prompt={prompt}", f"--dtype={dtype}"
            )
            assert_refused(result, "logits: a row has NaN", "the model's weights are damaged")
