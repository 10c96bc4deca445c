"""The Triton kernels of decoding, in Triton's interpreter on a CPU and compiled on a GPU."""

import importlib
import json
import os
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation import cuda_graph, engine
from gpt_lightning.generation.cuda_graph import GraphedDecodeStep, fused_decode_unsupported_reason
from gpt_lightning.generation.engine import fastest_backend
from gpt_lightning.kernels import support
from gpt_lightning.model import loss
from gpt_lightning.model.kv_cache import KVCache
from helpers import (
    ROOT,
    make_generator,
    python,
)

# Triton's interpreter computes in numpy, which warns about NaN
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


@pytest.fixture
def fused(kernels_run: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not torch.cuda.is_available():
        monkeypatch.setattr(cuda_graph, "fused_decode_unsupported_reason", lambda model, rows: None)
    return importlib.import_module("gpt_lightning.generation.fused_decode")


def model_of(
    n_heads: int = 2,
    emb_dim: int = 32,
    n_layers: int = 2,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
) -> GPTModel:
    """Small model whose norm weights and biases differ from their initial values."""
    torch.manual_seed(1)
    model = GPTModel(
        GPTConfig(vocab_size=101, context_length=48, emb_dim=emb_dim, n_heads=n_heads, n_layers=n_layers,
                  qkv_bias=tied, tied_embeddings=tied)
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def decode_logits(
    model: GPTModel, lengths: list[int], count: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of ``count`` steps after prompts of these lengths: of the eager model, and of our kernels."""
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(101, (rows, 48), generator=make_generator(7))
    padding = None if len(set(lengths)) == 1 else torch.tensor([width - n for n in lengths])
    dtype = model.tok_emb.weight.dtype
    caches = [KVCache.allocate(model.config, rows, 48, dtype=dtype) for _ in range(2)]
    for cache in caches:
        model.features(ids[:, :width], cache, padding)
    eager_cache, fused_cache = caches
    step = GraphedDecodeStep(model, fused_cache, padding, fused=True)
    assert step.is_fused
    expected, actual = [], []
    for at in range(width, width + count):
        expected.append(
            model.head(model.features(ids[:, at : at + 1], eager_cache, padding)[:, -1])
        )
        actual.append(step(ids[:, at]).clone())
        assert torch.equal(step.max_logits, actual[-1].amax(dim=-1))
        assert torch.equal(step.argmax_ids, actual[-1].argmax(dim=-1))
        assert fused_cache.length == eager_cache.length == at + 1
    return expected, actual


CASES = [
    ({}, [1], torch.float32),
    ({}, [45], torch.bfloat16),
    ({"n_layers": 1}, [20, 37, 3], torch.float32),
    # sizes that are not powers of 2, no biases, an untied head
    ({"n_heads": 3, "emb_dim": 36, "n_layers": 1, "tied": False}, [30, 30], torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "lengths", "dtype"), CASES)
@torch.inference_mode()
def test_fused_step_logits_equal_the_models(
    fused: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, int],
    lengths: list[int],
    dtype: torch.dtype,
) -> None:
    """Over one and several spans of positions, with several blocks each."""
    monkeypatch.setattr(fused, "ATTENTION_SPAN", 16)
    monkeypatch.setattr(fused, "ATTENTION_BLOCK", 8)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
    for expected, actual in zip(
        *decode_logits(model_of(**shape, dtype=dtype), lengths, 2), strict=True
    ):
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@torch.inference_mode()
def test_rows_with_a_large_mean_are_normalized(fused: ModuleType, mean: float) -> None:
    model = model_of()
    model.pos_emb.weight += mean
    for expected, actual in zip(*decode_logits(model, [9], 1), strict=True):
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[700], [900], [600, 890, 300]])
@torch.inference_mode()
def test_fused_step_on_a_gpu_equals_torch_and_is_deterministic(lengths: list[int]) -> None:
    """Over several spans, whose programs end in any order."""
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
        actual = torch.stack([step(ids[:, at]).clone() for at in range(width, width + 8)])
        step.close()
        return actual

    actual = logits(True)
    torch.testing.assert_close(actual, logits(False), atol=8e-2, rtol=8e-2)
    for _ in range(20):
        assert torch.equal(logits(True), actual)


@torch.inference_mode()
def test_step_without_ids_reads_its_own_argmax_ids(fused: ModuleType) -> None:
    model = model_of()
    results = []
    for pass_ids in (True, False):
        cache = KVCache.allocate(model.config, 1, 48)
        model.features(torch.tensor([[3, 1, 4]]), cache)
        step = GraphedDecodeStep(model, cache, None, fused=True)
        step(torch.tensor([1]))
        for _ in range(3):
            step(step.argmax_ids.clone() if pass_ids else None)
        results.append(step._argmax_ids[:, 3:7].tolist())
    assert results[0] == results[1]


@torch.inference_mode()
def test_nan_logits_give_a_nan_maximum_and_a_valid_id(fused: ModuleType) -> None:
    """The id must be in the vocabulary because the next step reads it."""
    model = model_of()
    model.tok_emb.weight[50] = torch.nan
    cache = KVCache.allocate(model.config, 1, 48)
    model.features(torch.tensor([[3, 1, 4]]), cache)
    step = GraphedDecodeStep(model, cache, None, fused=True)
    logits = step(torch.tensor([1]))
    assert logits.isnan().sum() == 1
    assert step.max_logits.isnan().all()
    assert 0 <= int(step.argmax_ids) < 101


@pytest.mark.usefixtures("messages")
@torch.inference_mode()
def test_fused_step_that_fails_to_compile_runs_eagerly_and_warns(
    fused: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(self: object) -> Tensor:
        raise RuntimeError("Failed to find C compiler.\nmore lines")

    model = model_of()
    monkeypatch.setattr(fused.FusedDecodeForward, "__call__", fails)
    cuda_graph._warn_once.cache_clear()
    cache, plain = (KVCache.allocate(model.config, 1, 48) for _ in range(2))
    for each in (cache, plain):
        model.features(torch.tensor([[3, 1, 4]]), each)
    step = GraphedDecodeStep(model, cache, None, fused=True)
    expected = model.head(model.features(torch.tensor([[1]]), plain)[:, -1])
    torch.testing.assert_close(step(torch.tensor([1])), expected)
    assert not step.is_fused
    assert (
        "generate: the Triton kernels could not be compiled (Failed to find C compiler.); "
        "decoding continues without it, more slowly\n"
    ) in capsys.readouterr().err


def test_reasons_why_kernels_are_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(cuda_graph, "kernels_unsupported_reason", lambda device: None)
    assert fused_decode_unsupported_reason(model, 4) == "the model is on cpu"
    monkeypatch.setattr(cuda_graph, "cuda_graph_unsupported_reason", lambda model: None)
    assert fused_decode_unsupported_reason(model, 4) is None
    assert fused_decode_unsupported_reason(model, 5) == "5 rows are more than 4"
    monkeypatch.setattr(engine, "cuda_graph_unsupported_reason", lambda model: None)
    monkeypatch.setattr(engine, "FUSED_MIN_NEW_TOKENS", 30)
    assert fastest_backend(model, 1, 18, 1000) == "fused"
    assert fastest_backend(model, 5, 18, 1000) == "cuda_graph"
    assert (
        fastest_backend(model, 1, 18, 29) == "cuda_graph"
    )  # too few tokens to pay for loading the kernels
    assert (
        fastest_backend(model, 1, 19, 1000) == "cuda_graph"
    )  # 29 tokens fit before the context is full
    assert fused_decode_unsupported_reason(model_of(1, 512), 1) == "its heads are wider than 256"
    model.trf_blocks[0].att.out_proj = torch.nn.Identity()
    assert fused_decode_unsupported_reason(model, 1) == "it has layers of other types than GPTModel"
    mixed = model_of()
    mixed.pos_emb.to(torch.bfloat16)
    assert (
        fused_decode_unsupported_reason(mixed, 1)
        == "its weights differ in dtype or are not contiguous"
    )
    assert (
        fused_decode_unsupported_reason(model_of(dtype=torch.float64), 1)
        == "its weights are float64"
    )


def test_an_old_gpu_runs_no_kernel_and_says_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the compute capability of a T4; the loss and decoding ask, and only one line is logged."""
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(support, "find_spec", lambda name: name)
    support.log_unsupported_once.cache_clear()
    model = mock.Mock()
    model.tok_emb.weight.device = cuda
    with caplog.at_level("INFO"):
        assert loss._kernel.__wrapped__(cuda) is None
        for _ in range(2):
            assert "older than NVIDIA's Ampere" in str(fused_decode_unsupported_reason(model, 1))
        # a CPU runs no kernel of ours either, which needs no message
        assert loss._kernel.__wrapped__(torch.device("cpu")) is None
    (record,) = caplog.records
    assert record.message == (
        "kernels: the GPU is older than NVIDIA's Ampere, or not NVIDIA's, so torch's kernels run instead of this "
        "package's"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "size", "rows"),
    [(80, "gpt2-124M", 1), (90, "gpt2-124M", 4), (90, "gpt2-1558M", 1), (120, "gpt2-124M", 1)],
)
def test_kernels_compile_for_gpus(capability: int, size: str, rows: int, tmp_path: Path) -> None:
    """The interpreter accepts code that the compiler does not. For one row no register may be spilled."""
    pytest.importorskip("triton", reason="Triton, of the extra 'test', is for Linux on x86-64")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = python(str(ROOT / "tests" / "kernels" / "compile_kernels.py"), str(capability), size, str(rows), cwd=ROOT,
                  env=environment | {"TRITON_CACHE_DIR": str(tmp_path)})  # fmt: skip
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    names = [name for name, _ in kernels]
    # linear: qkv, out_proj, two feed-forward layers; attention: one span, and several with padding
    counts = {"linear": 4, "attention": 2, "head": 1, "embed": 2, "_loss_and_gradient": 1}
    assert {name: names.count(name) for name in counts} == counts
    if rows == 1:
        assert [kernel for kernel in kernels if kernel[1]] == []
