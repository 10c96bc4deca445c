"""The step of fixed shapes, which a GPU replays as a graph, gives what the plain path gives."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.generation import cuda_graph as decoding_step
from gpt_lightning.generation import engine as generate_module
from gpt_lightning.generation.cuda_graph import GraphedDecodeStep, padded_length
from gpt_lightning.generation.engine import DecodeBackend, stream_ids
from gpt_lightning.generation.sampling import SamplingParams, multinomial_no_sync
from gpt_lightning.model.kv_cache import KVCache

CONFIG = GPTConfig(vocab_size=101, context_length=48, emb_dim=32, n_heads=4, n_layers=2,
                   qkv_bias=True, tied_embeddings=True)  # fmt: skip
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(40, 53))]


@pytest.fixture(scope="module")
def model() -> GPTModel:
    torch.manual_seed(1)
    model = GPTModel(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # logits that differ clearly
    return model


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streamed(model: GPTModel, n: int = 60, **settings: Any) -> list[list[int]]:
    prompts = settings.pop("prompts", PROMPTS)
    steps = list(stream_ids(model, prompts, n, **{"sampling": SamplingParams(), **settings}))
    return torch.stack(steps, dim=1).tolist()


@pytest.mark.parametrize("lengths", [[3], [3, 3], [1, 3, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_logits_are_the_plain_paths(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, lengths: list[int], dtype: torch.dtype
) -> None:
    """From the prompt to the last position of the context, over four widths, with padding and without."""
    monkeypatch.setattr(decoding_step, "FIRST_WIDTH", 8)
    exact = {torch.float32: 1e-4, torch.bfloat16: 8e-2}[dtype]
    own = GPTModel(CONFIG).to(dtype).eval()
    own.load_state_dict(model.state_dict())
    rows, width = len(lengths), max(lengths)
    ids = torch.randint(101, (rows, 48), generator=make_generator(7))
    padding = None if len(set(lengths)) == 1 else torch.tensor([width - n for n in lengths])
    caches = [KVCache.allocate(CONFIG, rows, 48, dtype=dtype) for _ in range(2)]
    for cache in caches:
        for tensor in (*cache.keys, *cache.values):
            tensor.fill_(torch.nan)  # what memory holds that nobody wrote
        own.features(ids[:, :width], cache, padding)
    plain, fixed = caches
    step = GraphedDecodeStep(own, fixed, padding)
    for at in range(width, 48):
        expected = own.head(own.features(ids[:, at : at + 1], plain, padding)[:, -1])
        found = step(ids[:, at])
        assert fixed.length == plain.length == at + 1
        torch.testing.assert_close(found, expected, atol=exact, rtol=exact)
        assert torch.equal(step.largest, found.amax(dim=-1))
        assert torch.equal(step.likeliest, found.argmax(dim=-1))


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
def test_tokens_are_the_plain_paths(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, name: str
) -> None:
    """Prompts of 1, 5 and 13 tokens together, on past the context of 48, where the window slides."""
    expected = streamed(model, **SETTINGS[name], generator=make_generator(5))
    monkeypatch.setattr(decoding_step, "FIRST_WIDTH", 8)
    assert (
        streamed(model, **SETTINGS[name], generator=make_generator(5), backend="cuda_graph")
        == expected
    )
    if name == "eos":
        assert any(-1 in row for row in expected)
    if name == "stopped":
        assert [row.index(-1) for row in expected[:2]] == [10, 20]
        assert len(expected[0]) == 30


@pytest.mark.parametrize("at", [0, 3, 40])
@pytest.mark.parametrize("every", [1, 64])
def test_damaged_logits_are_refused_with_their_step(
    monkeypatch: pytest.MonkeyPatch, model: GPTModel, at: int, every: int
) -> None:
    """On a GPU one looks at many steps at once; the number is still the first's."""
    made = generate_module._Finite
    monkeypatch.setattr(generate_module, "_Finite", lambda *_, **__: made(every))
    damaged = GPTModel(CONFIG).eval()
    damaged.load_state_dict(model.state_dict())
    with torch.no_grad():
        damaged.pos_emb.weight[2 + at] = torch.nan
    with pytest.raises(ValueError, match=rf"logits: .*\(new token {at}\)"):
        streamed(damaged, 44, prompts=[[3, 1, 4]], backend="cuda_graph")


def test_a_step_that_was_asked_for_runs_under_autocast(model: GPTModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = streamed(model, 5)
        assert streamed(model, 5, backend="cuda_graph") == expected


def test_draws_are_torchs() -> None:
    p = (torch.randn(300, 40, generator=make_generator(1)) * 2).softmax(dim=-1)
    p[:, 7] = 0
    expected = torch.multinomial(p, 1, generator=make_generator(2)).squeeze(1)
    assert torch.equal(multinomial_no_sync(p, make_generator(2)), expected)


def test_cache_lengths_are_aligned() -> None:
    assert [padded_length(n) for n in (1, 64, 65, 1000)] == [64, 64, 128, 1024]


# --- capturing, with a stand-in for CUDA's graphs ---------------------------------------------------


class Graph:
    """Captures as CUDA does: what is launched meanwhile is remembered and not done; a replay does it,
    into the same memory."""

    step: GraphedDecodeStep
    captures = 0
    replays = 0

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        Graph.captures += 1
        static = self.step._static
        assert static.at is not None
        written = (static.at, self.step._tokens, *static.keys, *static.values)
        kept = [tensor.clone() for tensor in written]
        yield
        for tensor, before in zip(written, kept, strict=True):
            tensor.copy_(before)

    def replay(self) -> None:
        Graph.replays += 1
        assert self.step._found is not None
        self.step._found.copy_(self.step._forward())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    make = GraphedDecodeStep.__init__

    def made(self: GraphedDecodeStep, *arguments: Any, **settings: Any) -> None:
        make(self, *arguments, **settings)
        Graph.step = self

    monkeypatch.setattr(GraphedDecodeStep, "__init__", made)
    for module in (generate_module, decoding_step):
        monkeypatch.setattr(module, "cuda_graph_unsupported_reason", lambda model: None)
    monkeypatch.setattr(decoding_step, "FIRST_WIDTH", 8)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph.capture())
    monkeypatch.setattr(decoding_step, "_capture_stream", lambda device: None)
    monkeypatch.setattr(Graph, "captures", 0)
    monkeypatch.setattr(Graph, "replays", 0)
    return Graph


def test_replayed_steps_are_the_plain_ones(model: GPTModel, request: pytest.FixtureRequest) -> None:
    settings = {"num_samples": 2}
    expected = streamed(model, **settings)
    graphs = request.getfixturevalue("graphs")
    assert streamed(model, **settings) == expected
    # positions 13 to 47 in widths 16, 32, 48: the first step of each runs and is captured
    assert (graphs.captures, graphs.replays) == (3, 35 - 3)


@pytest.mark.usefixtures("messages")
def test_without_a_capture_it_goes_on_and_says_so_once(
    model: GPTModel,
    graphs: type[Graph],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = streamed(model)
    decoding_step._say_once.cache_clear()

    @contextlib.contextmanager
    def fails(graph: Graph, **_: Any) -> Iterator[None]:
        raise RuntimeError("CUDA error: operation not permitted\nmore lines")
        yield

    monkeypatch.setattr(torch.cuda, "graph", fails)
    capsys.readouterr()
    assert streamed(model) == expected
    assert streamed(model) == expected
    assert capsys.readouterr().err == (
        "gpt_lightning: generate: the step could not be captured as a CUDA graph "
        "(CUDA error: operation not permitted); it runs without, slower\n"
    )


def test_what_cannot_be_captured(model: GPTModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing on a CPU; on a GPU no hooks, no autocast."""
    assert decoding_step.cuda_graph_unsupported_reason(model) == "the model is on cpu"

    class OnCuda:
        device = torch.device("cuda")

    other = GPTModel(CONFIG)
    del other.tok_emb.weight
    other.tok_emb.weight = OnCuda()  # type: ignore[assignment]
    assert decoding_step.cuda_graph_unsupported_reason(other) is None
    with _autocast(monkeypatch):
        assert decoding_step.cuda_graph_unsupported_reason(other) == "autocast is on"
    other.trf_blocks[0].register_forward_pre_hook(lambda *_: None)
    assert decoding_step.cuda_graph_unsupported_reason(other) == "it has hooks"


@pytest.mark.usefixtures("messages")
def test_a_graph_that_was_asked_for_and_cannot_be_is_said(
    model: GPTModel, capsys: pytest.CaptureFixture[str]
) -> None:
    decoding_step._say_once.cache_clear()
    streamed(model)
    assert capsys.readouterr().err == ""
    for _ in range(2):
        streamed(model, backend="cuda_graph")
    assert capsys.readouterr().err == (
        "gpt_lightning: generate: the step could not be captured as a CUDA graph (the model is on cpu); "
        "it runs without, slower\n"
    )


@contextlib.contextmanager
def _autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch turns CUDA's autocast off where there is no CUDA."""
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
        yield


# --- on a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("cuda_graph", n) for n in SETTINGS if n not in ("drawn", "eos")),
        *(("fused", n) for n in ("greedy", "one prompt", "more than the context", "stopped")),
    ],
)
def test_graphs_on_a_gpu_give_the_plain_tokens(
    capsys: pytest.CaptureFixture[str], model: GPTModel, backend: DecodeBackend, name: str
) -> None:
    own = GPTModel(CONFIG).cuda().eval()
    own.load_state_dict(model.state_dict())
    decoding_step._say_once.cache_clear()
    found = streamed(own, **SETTINGS[name], backend=backend)
    assert capsys.readouterr().err == ""
    assert streamed(own, **SETTINGS[name], backend="eager") == found


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("backend", ["cuda_graph", "fused"])
@pytest.mark.parametrize(
    "sampling", [SamplingParams(), SamplingParams(1.0, top_k=20, top_p=0.9, min_p=0.01)]
)
def test_steps_on_a_gpu_do_not_wait(
    model: GPTModel, sampling: SamplingParams, backend: DecodeBackend
) -> None:
    own = GPTModel(CONFIG).cuda().eval()
    own.load_state_dict(model.state_dict())
    steps = stream_ids(own, [[3, 1, 4]], 40, sampling, backend=backend)
    for _ in range(4):
        next(steps)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(30):
            next(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
