"""The decoding step as a CUDA graph, and its tokens against eager decoding."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation import cuda_graph, engine
from gpt_lightning.generation.cuda_graph import GraphedDecodeStep, padded_length
from gpt_lightning.generation.engine import DecodeBackend, stream_ids
from gpt_lightning.generation.sampling import SamplingParams, multinomial_no_sync
from gpt_lightning.model.kv_cache import KVCache
from helpers import (
    make_generator,
)

CONFIG = GPTConfig(vocab_size=101, context_length=48, emb_dim=32, n_heads=4, n_layers=2,
                   qkv_bias=True, tied_embeddings=True)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(1)
    model = GPTModel(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # logits that differ clearly
    return model


@pytest.mark.parametrize("lengths", [[3], [3, 3], [1, 3, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_step_logits_equal_the_models(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, lengths: list[int], dtype: torch.dtype
) -> None:
    """From the prompt to the last position of the context, in four widths, with and without padding."""
    monkeypatch.setattr(cuda_graph, "FIRST_WIDTH", 8)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
    model_copy = GPTModel(CONFIG).to(dtype).eval()
    model_copy.load_state_dict(model.state_dict())
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(101, (rows, 48), generator=make_generator(7))
    padding = None if len(set(lengths)) == 1 else torch.tensor([width - n for n in lengths])
    caches = [KVCache.allocate(CONFIG, rows, 48, dtype=dtype) for _ in range(2)]
    for cache in caches:
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # uninitialized memory may contain NaN
        model_copy.features(ids[:, :width], cache, padding)
    eager_cache, step_cache = caches
    step = GraphedDecodeStep(model_copy, step_cache, padding)
    for at in range(width, 48):
        expected = model_copy.head(
            model_copy.features(ids[:, at : at + 1], eager_cache, padding)[:, -1]
        )
        logits = step(ids[:, at])
        assert step_cache.length == eager_cache.length == at + 1
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)
        assert torch.equal(step.max_logits, logits.amax(dim=-1))
        assert torch.equal(step.argmax_ids, logits.argmax(dim=-1))


PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(40, 53))]


def stream_table(model: GPTModel, n: int = 60, **settings: Any) -> list[list[int]]:
    prompts = settings.pop("prompts", PROMPTS)
    steps = list(stream_ids(model, prompts, n, **{"sampling": SamplingParams(), **settings}))
    return torch.stack(steps, dim=1).tolist()


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "three samples": {"num_samples": 3},
    "one prompt": {"prompts": [[3, 1, 4]]},
    "more than the context": {"prompts": [*PROMPTS, list(range(20, 90))]},
    "drawn": {"sampling": SamplingParams(1.0, top_k=20, repetition_penalty=1.2), "num_samples": 2},
    "eos": {"eos_id": 17, "sampling": SamplingParams(1.0)},
    "stopped": {"is_over": lambda row, ids: len(ids) >= 10 * (row + 1)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_step_tokens_equal_eager_tokens(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, name: str
) -> None:
    """Prompts of 1, 5 and 13 tokens in one batch, generated beyond the context of 48."""
    expected = stream_table(model, **SETTINGS[name], generator=make_generator(5))
    monkeypatch.setattr(cuda_graph, "FIRST_WIDTH", 8)
    assert (
        stream_table(model, **SETTINGS[name], generator=make_generator(5), backend="cuda_graph")
        == expected
    )
    if name == "eos":
        assert any(-1 in row for row in expected)
    if name == "stopped":
        assert [row.index(-1) for row in expected[:2]] == [10, 20]
        assert len(expected[0]) == 30


@pytest.mark.parametrize("at", [0, 3, 40])
@pytest.mark.parametrize("interval", [1, 64])
def test_error_of_nan_logits_names_the_first_step(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, at: int, interval: int
) -> None:
    """Also when many steps are checked at once, as on a GPU."""
    check = engine.FiniteLogitsCheck
    monkeypatch.setattr(engine, "FiniteLogitsCheck", lambda **_: check(interval))
    broken_model = GPTModel(CONFIG).eval()
    broken_model.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken_model.pos_emb.weight[2 + at] = torch.nan
    with pytest.raises(ValueError, match=rf"logits: .*\(new token {at}\)"):
        stream_table(broken_model, 44, prompts=[[3, 1, 4]], backend="cuda_graph")


def test_step_runs_under_autocast(model: GPTModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = stream_table(model, 5)
        assert stream_table(model, 5, backend="cuda_graph") == expected


def test_draws_without_sync_equal_torch_multinomial() -> None:
    p = (torch.randn(300, 40, generator=make_generator(1)) * 2).softmax(dim=-1)
    p[:, 7] = 0
    expected = torch.multinomial(p, 1, generator=make_generator(2)).squeeze(1)
    assert torch.equal(multinomial_no_sync(p, make_generator(2)), expected)


def test_cache_lengths_are_aligned() -> None:
    assert [padded_length(n) for n in (1, 64, 65, 1000)] == [64, 64, 128, 1024]


class FakeGraph:
    """Fake CUDA graph: a capture has no effect on memory; a replay runs the step and writes the same tensors."""

    step: GraphedDecodeStep
    captures = 0
    replays = 0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        FakeGraph.captures += 1
        cache = self.step._static_cache
        assert cache.position is not None
        written = (cache.position, self.step._tokens, *cache.keys, *cache.values)
        copies = [tensor.clone() for tensor in written]
        yield
        for tensor, before in zip(written, copies, strict=True):
            tensor.copy_(before)

    def replay(self) -> None:
        FakeGraph.replays += 1
        assert self.step._graph_logits is not None
        self.step._graph_logits.copy_(self.step._forward())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraph]:
    original_init = GraphedDecodeStep.__init__

    def init(self: GraphedDecodeStep, *arguments: Any, **settings: Any) -> None:
        original_init(self, *arguments, **settings)
        FakeGraph.step = self

    monkeypatch.setattr(GraphedDecodeStep, "__init__", init)
    for module in (engine, cuda_graph):
        monkeypatch.setattr(module, "cuda_graph_unsupported_reason", lambda model: None)
    monkeypatch.setattr(cuda_graph, "FIRST_WIDTH", 8)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.capture())
    monkeypatch.setattr(cuda_graph, "_capture_stream", lambda device: None)
    monkeypatch.setattr(FakeGraph, "captures", 0)
    monkeypatch.setattr(FakeGraph, "replays", 0)
    return FakeGraph


def test_replayed_steps_equal_eager_steps(model: GPTModel, request: pytest.FixtureRequest) -> None:
    settings = {"num_samples": 2}
    expected = stream_table(model, **settings)
    graphs = request.getfixturevalue("graphs")
    assert stream_table(model, **settings) == expected
    # positions 13 to 47 in widths 16, 32, 48: the first step of each width runs eagerly
    assert (graphs.captures, graphs.replays) == (3, 35 - 3)


@pytest.mark.usefixtures("messages")
def test_failed_capture_warns_once_and_decoding_continues(
    model: GPTModel,
    graphs: type[FakeGraph],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = stream_table(model)
    cuda_graph._warn_once.cache_clear()

    @contextlib.contextmanager
    def fails(graph: FakeGraph, **_: Any) -> Iterator[None]:
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fails)
    capsys.readouterr()
    assert stream_table(model) == expected
    assert stream_table(model) == expected
    assert capsys.readouterr().err == (
        "gpt_lightning: generate: the step could not be captured as a CUDA graph "
        "(CUDA error: operation not permitted); decoding continues without it, more slowly\n"
    )


@contextlib.contextmanager
def _autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fake CUDA autocast: torch disables the real one on a machine without CUDA."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        yield


def test_capture_is_refused_on_cpu_with_hooks_or_autocast(
    model: GPTModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuda_graph.cuda_graph_unsupported_reason(model) == "the model is on cpu"

    class OnCuda:
        device = torch.device("cuda")

    other = GPTModel(CONFIG)
    del other.tok_emb.weight
    other.tok_emb.weight = OnCuda()  # type: ignore[assignment]
    assert cuda_graph.cuda_graph_unsupported_reason(other) is None
    with _autocast(monkeypatch):
        assert cuda_graph.cuda_graph_unsupported_reason(other) == "autocast is on"
    other.trf_blocks[0].register_forward_pre_hook(lambda *_: None)
    assert cuda_graph.cuda_graph_unsupported_reason(other) == "it has hooks"


@pytest.mark.usefixtures("messages")
def test_requested_graph_on_a_cpu_warns_once(
    model: GPTModel, capsys: pytest.CaptureFixture[str]
) -> None:
    cuda_graph._warn_once.cache_clear()
    stream_table(model)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        stream_table(model, backend="cuda_graph")
    assert capsys.readouterr().err == (
        "gpt_lightning: generate: the step could not be captured as a CUDA graph (the model is on cpu); "
        "decoding continues without it, more slowly\n"
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("cuda_graph", n) for n in SETTINGS if n not in ("drawn", "eos")),
        *(("fused", n) for n in ("greedy", "one prompt", "more than the context", "stopped")),
    ],
)
@pytest.mark.usefixtures("messages")
def test_backends_on_a_gpu_give_eager_tokens(
    capsys: pytest.CaptureFixture[str], model: GPTModel, backend: DecodeBackend, name: str
) -> None:
    model_copy = GPTModel(CONFIG).cuda().eval()
    model_copy.load_state_dict(model.state_dict())
    cuda_graph._warn_once.cache_clear()
    tokens = stream_table(model_copy, **SETTINGS[name], backend=backend)
    assert capsys.readouterr().err == ""
    assert stream_table(model_copy, **SETTINGS[name], backend="eager") == tokens


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("backend", ["cuda_graph", "fused"])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0, top_k=20, top_p=0.9, min_p=0.01)]
)
def test_steps_on_a_gpu_do_not_synchronize(
    model: GPTModel, sampling: SamplingParams, backend: DecodeBackend
) -> None:
    model_copy = GPTModel(CONFIG).cuda().eval()
    model_copy.load_state_dict(model.state_dict())
    steps = stream_ids(model_copy, [[3, 1, 4]], 40, sampling, backend=backend)
    for _ in range(4):
        next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(30):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
