"""Kernels of our own: what they compute, in Triton's interpreter here and on a GPU where there is one."""

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import ROOT, python
from torch import Tensor

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation import cuda_graph as decoding_step
from gpt_lightning.generation import engine as generate_module
from gpt_lightning.generation.cuda_graph import GraphedDecodeStep, fused_decode_unsupported_reason
from gpt_lightning.generation.engine import fastest_backend
from gpt_lightning.kernels import support
from gpt_lightning.model import loss
from gpt_lightning.model.kv_cache import KVCache

# Triton's interpreter computes in numpy, which warns of what is no number
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def kernels_run() -> Iterator[None]:
    """On a GPU if there is one, where the test's tensors then are; else in Python, for which conftest.py asks Triton."""
    pytest.importorskip("triton", reason="Triton, of the extra 'test', is for Linux on x86-64")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


@pytest.fixture
def fused(kernels_run: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not torch.cuda.is_available():
        monkeypatch.setattr(
            decoding_step, "fused_decode_unsupported_reason", lambda model, rows: None
        )
    return importlib.import_module("gpt_lightning.generation.fused_decode")


# --- the loss ---------------------------------------------------------------------------------------


def plain_loss(logits: Tensor, targets: Tensor, vocab_size: int, by: float) -> tuple[float, Tensor]:
    logits = logits.double().requires_grad_()
    sum_of_all = torch.nn.functional.cross_entropy(logits[:, :vocab_size], targets, reduction="sum")
    (grad,) = torch.autograd.grad(sum_of_all * by, logits)
    return float(sum_of_all.detach()), grad


def check_loss(kernel: ModuleType, vocab_size: int, width: int, dtype: torch.dtype) -> None:
    generator = make_generator(vocab_size)
    logits = 4 * torch.randn(5, width, generator=generator)
    logits[0] += 300  # whose powers of e float32 does not hold
    logits = logits.to(dtype)
    targets = torch.randint(vocab_size, (5,), generator=generator)
    targets[:2] = torch.tensor([0, vocab_size - 1])
    expected, expected_grad = plain_loss(logits, targets, vocab_size, by=0.25)
    found = kernel.loss_and_gradient_(logits, targets, vocab_size, 0.25)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    exact = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(logits.double(), expected_grad, atol=exact, rtol=exact)
    assert not logits[:, vocab_size:].any()


@pytest.mark.parametrize(("vocab_size", "width"), [(101, 128), (100, 100), (64, 64), (300, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient(
    kernels_run: None,
    monkeypatch: pytest.MonkeyPatch,
    vocab_size: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """With whole blocks, a part of one, and columns that are no tokens."""
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    monkeypatch.setattr(kernel, "BLOCK", 64)
    check_loss(kernel, vocab_size, width, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("vocab_size", "width"), [(101, 128), (50257, 50304), (50257, 50257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradient_of_many_tokens(
    kernels_run: None, vocab_size: int, width: int, dtype: torch.dtype
) -> None:
    """With the blocks that ``fit`` has, which the interpreter takes long for."""
    check_loss(
        importlib.import_module("gpt_lightning.kernels.cross_entropy"), vocab_size, width, dtype
    )


def test_targets_that_are_no_tokens_make_the_loss_no_number(kernels_run: None) -> None:
    """And nothing outside their rows is written."""
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    for target in (-100, -1, 13, 16, 10**9):
        logits = torch.zeros(5, 16)
        found = kernel.loss_and_gradient_(logits[1:4], torch.tensor([1, target, 3]), 13, 1.0)
        assert found.isnan()
        assert not logits[[0, 4]].any()
        assert logits[[1, 3], [1, 3]].lt(0).all()
        torch.testing.assert_close(logits[2, :13], torch.full((13,), 1 / 13))


def test_targets_may_be_strided_and_the_gradient_left_out(kernels_run: None) -> None:
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    targets = torch.arange(12).view(3, 4)[:, 1]
    logits = torch.randn(3, 16, generator=make_generator(1))
    expected, _ = plain_loss(logits, targets, 13, by=1.0)
    before = logits.clone()
    found = kernel.loss_and_gradient_(logits, targets, 13, 1.0, gradient=False)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_logit_makes_the_loss_no_number(kernels_run: None, damage: float) -> None:
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    logits = torch.zeros(3, 16)
    logits[1, 5] = damage
    assert not kernel.loss_and_gradient_(logits, torch.tensor([1, 2, 3]), 16, 1.0).isfinite()


def gradients(pad: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = make_generator(3)
    features = torch.randn(2, 7, 16, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(101, 16, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(101, (2, 7), generator=generator)
    mean = loss.chunked_cross_entropy(features, weight, targets, 4, pad_vocabulary=pad)
    return [mean.detach(), *torch.autograd.grad(mean, (features, weight))]


@pytest.mark.parametrize("pad", [False, True])
def test_the_loss_by_chunks_is_the_same_with_the_kernel(
    kernels_run: None, monkeypatch: pytest.MonkeyPatch, pad: bool
) -> None:
    monkeypatch.setattr(loss, "_kernel", lambda device: None)
    expected = gradients(pad)
    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy").loss_and_gradient_
    monkeypatch.setattr(loss, "_kernel", lambda device: kernel)
    for found, before in zip(gradients(pad), expected, strict=True):
        torch.testing.assert_close(found, before, atol=1e-6, rtol=1e-5)


def test_the_kernel_is_not_asked_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = gradients(True, torch.float64)
    monkeypatch.setattr(loss, "_kernel", lambda device: pytest.fail("it adds in float32"))
    assert all(map(torch.equal, gradients(True, torch.float64), expected))


@pytest.mark.usefixtures("messages")
def test_a_kernel_that_cannot_be_compiled_is_done_without(
    kernels_run: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    kernel = importlib.import_module("gpt_lightning.kernels.cross_entropy")
    monkeypatch.setattr(kernel, "loss_and_gradient_", fails)
    monkeypatch.setattr(loss, "kernels_unsupported_reason", lambda device: None)
    with monkeypatch.context() as without:
        without.setattr(loss, "_kernel", lambda device: None)
        expected = gradients(True)
    loss._kernel.cache_clear()
    try:
        capsys.readouterr()
        for _ in range(2):
            assert all(map(torch.equal, gradients(True), expected))
    finally:
        loss._kernel.cache_clear()
    assert capsys.readouterr().err == (
        "gpt_lightning: loss_chunk_size: the kernel of a chunk could not be compiled "
        "(Failed to find C compiler.); the loss is computed without, slower\n"
    )


# --- a step of decoding -----------------------------------------------------------------------------


def model_of(
    n_heads: int = 2,
    emb_dim: int = 32,
    n_layers: int = 2,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> GPTModel:
    """With weights of norms and biases that are not what they begin as."""
    torch.manual_seed(1)
    model = GPTModel(
        GPTConfig(vocab_size=101, context_length=48, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers,
                  qkv_bias=tied, tied_embeddings=tied)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def steps(model: GPTModel, lengths: list[int], count: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of ``count`` steps after prompts of these lengths: the plain path's, and our own kernels'."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(101, (rows, 48), generator=make_generator(7))
    padding = None if len(set(lengths)) == 1 else torch.tensor([width - n for n in lengths])
    dtype = model.tok_emb.weight.dtype
    caches = [KVCache.allocate(model.config, rows, 48, dtype=dtype) for _ in range(2)]
    for cache in caches:
        model.features(ids[:, :width], cache, padding)
    plain, own = caches
    step = GraphedDecodeStep(model, own, padding, fused=True)
    assert step.is_fused
    expected, found = [], []
    for at in range(width, width + count):
        expected.append(model.head(model.features(ids[:, at : at + 1], plain, padding)[:, -1]))
        found.append(step(ids[:, at]).clone())
        assert torch.equal(step.largest, found[-1].amax(dim=-1))
        assert torch.equal(step.likeliest, found[-1].argmax(dim=-1))
        assert own.length == plain.length == at + 1
    return expected, found


SHAPES = [
    ({}, [1], torch.float32),
    ({}, [45], torch.bfloat16),
    ({"n_layers": 1}, [20, 37, 3], torch.float32),
    # sizes that are no powers of 2, no biases, a head of its own
    ({"n_heads": 3, "emb_dim": 36, "n_layers": 1, "tied": False}, [30, 30], torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "lengths", "dtype"), SHAPES)
@torch.inference_mode()
def test_the_steps_logits_are_the_plain_paths(
    fused: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, int],
    lengths: list[int],
    dtype: torch.dtype,
) -> None:
    """Over one span of positions and several, in several blocks each."""
    monkeypatch.setattr(fused, "ATTENTION_SPAN", 16)
    monkeypatch.setattr(fused, "ATTENTION_BLOCK", 8)
    exact = {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
    for expected, found in zip(*steps(model_of(**shape, dtype=dtype), lengths, 2), strict=True):
        torch.testing.assert_close(found, expected, atol=exact, rtol=exact)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@torch.inference_mode()
def test_rows_far_from_zero_are_normalised(fused: ModuleType, mean: float) -> None:
    model = model_of()
    model.pos_emb.weight += mean
    for expected, found in zip(*steps(model, [9], 1), strict=True):
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[700], [900], [600, 890, 300]])
@torch.inference_mode()
def test_many_positions_on_a_gpu(lengths: list[int]) -> None:
    """Over several spans, whose programs end in any order; and with the same bits again."""
    torch.manual_seed(2)
    config = GPTConfig(vocab_size=101, context_length=1024, emb_dim=256, n_heads=4, n_layers=4,
                       qkv_bias=True, tied_embeddings=True)  # fmt: skip
    model = GPTModel(config).cuda().to(torch.bfloat16).eval()
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(101, (rows, width + 8)).cuda()
    padding = None if rows == 1 else torch.tensor([width - n for n in lengths]).cuda()

    def logits(fused: bool) -> Tensor:
        cache = KVCache.allocate(config, rows, 1024, ids.device, torch.bfloat16)
        model.features(ids[:, :width], cache, padding)
        step = GraphedDecodeStep(model, cache, padding, fused=fused)
        assert step.is_fused == fused
        found = torch.stack([step(ids[:, at]).clone() for at in range(width, width + 8)])
        step.close()
        return found

    found = logits(True)
    torch.testing.assert_close(found, logits(False), atol=8e-2, rtol=8e-2)
    for _ in range(20):
        assert torch.equal(logits(True), found)


@torch.inference_mode()
def test_the_step_reads_its_own_likeliest(fused: ModuleType) -> None:
    model = model_of()
    made = []
    for given in (True, False):
        cache = KVCache.allocate(model.config, 1, 48)
        model.features(torch.tensor([[3, 1, 4]]), cache)
        step = GraphedDecodeStep(model, cache, None, fused=True)
        step(torch.tensor([1]))
        for _ in range(3):
            step(step.likeliest.clone() if given else None)
        made.append(step._likeliest[:, 3:7].tolist())
    assert made[0] == made[1]


@torch.inference_mode()
def test_damaged_logits_are_seen(fused: ModuleType) -> None:
    """And the id beside them is one of the vocabulary, which the next step may read."""
    model = model_of()
    model.tok_emb.weight[50] = torch.nan
    cache = KVCache.allocate(model.config, 1, 48)
    model.features(torch.tensor([[3, 1, 4]]), cache)
    step = GraphedDecodeStep(model, cache, None, fused=True)
    logits = step(torch.tensor([1]))
    assert logits.isnan().sum() == 1
    assert step.largest.isnan().all()
    assert 0 <= int(step.likeliest) < 101


@torch.inference_mode()
@pytest.mark.usefixtures("messages")
def test_kernels_that_cannot_be_compiled_are_done_without(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    model = model_of()
    monkeypatch.setattr(fused.FusedDecodeForward, "__call__", fails)
    decoding_step._say_once.cache_clear()
    cache, plain = (KVCache.allocate(model.config, 1, 48) for _ in range(2))
    for each in (cache, plain):
        model.features(torch.tensor([[3, 1, 4]]), each)
    step = GraphedDecodeStep(model, cache, None, fused=True)
    expected = model.head(model.features(torch.tensor([[1]]), plain)[:, -1])
    torch.testing.assert_close(step(torch.tensor([1])), expected)
    assert not step.is_fused
    assert (
        "generate: our own kernels could not be compiled (Failed to find C compiler.); "
        "it runs without, slower\n"
    ) in capsys.readouterr().err


def test_where_there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    assert fused_decode_unsupported_reason(model, 1) == "the model is on cpu"
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert support.kernels_unsupported_reason(cuda) == "Triton is not installed"
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    assert "older than NVIDIA's Ampere" in str(support.kernels_unsupported_reason(cuda))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert support.kernels_unsupported_reason(cuda) is None

    monkeypatch.setattr(decoding_step, "kernels_unsupported_reason", lambda device: None)
    assert (
        fused_decode_unsupported_reason(model, 4) == "the model is on cpu"
    )  # which no graph captures
    monkeypatch.setattr(decoding_step, "cuda_graph_unsupported_reason", lambda model: None)
    assert fused_decode_unsupported_reason(model, 4) is None
    assert fused_decode_unsupported_reason(model, 5) == "5 rows are more than 4"
    monkeypatch.setattr(generate_module, "cuda_graph_unsupported_reason", lambda model: None)
    monkeypatch.setattr(generate_module, "FUSED_MIN_NEW_TOKENS", 30)
    assert fastest_backend(model, 1, 18, 1000) == "fused"
    assert fastest_backend(model, 5, 18, 1000) == "cuda_graph"
    assert fastest_backend(model, 1, 18, 29) == "cuda_graph"  # too few to pay for loading kernels
    assert fastest_backend(model, 1, 19, 1000) == "cuda_graph"  # before the context is full
    assert fused_decode_unsupported_reason(model_of(1, 512), 1) == "its heads are wider than 256"
    model.trf_blocks[0].att.out_proj = torch.nn.Identity()
    assert fused_decode_unsupported_reason(model, 1) == "its layers are not the model's own"
    mixed = model_of()
    mixed.pos_emb.to(torch.bfloat16)
    assert fused_decode_unsupported_reason(mixed, 1) == "its weights are not all alike"
    assert (
        fused_decode_unsupported_reason(model_of(dtype=torch.float64), 1)
        == "its weights are float64"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "size", "rows"),
    [(80, "gpt2-124M", 1), (90, "gpt2-124M", 4), (90, "gpt2-1558M", 1), (120, "gpt2-124M", 1)],
)
def test_kernels_compile_for_gpus(capability: int, size: str, rows: int, tmp_path: Path) -> None:
    """What the interpreter takes a compiler may not; and of one row all that a thread holds is in registers."""
    pytest.importorskip("triton", reason="Triton, of the extra 'test', is for Linux on x86-64")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = python(str(ROOT / "tests" / "compile_kernels.py"), str(capability), size, str(rows), cwd=ROOT,
                  env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    names = [name for name, _ in found]
    # qkv, out_proj and two of the feed-forward network; attention over one span and over several, with padding
    counts = {"linear": 4, "attention": 2, "head": 1, "embed": 2, "_loss_and_gradient": 1}
    assert {name: names.count(name) for name in counts} == counts
    if rows == 1:
        assert [kernel for kernel in found if kernel[1]] == []
