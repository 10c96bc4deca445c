"""The page's interface: its answers, and what it says about wrong requests."""

import asyncio
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.data.tokenizer import GPT2, Tokenizer
from gpt_lightning.data.tokenizer_json import read_tokenizer
from gpt_lightning.exploring.api import (
    MAX_CHOSEN,
    MAX_CHOSEN_CROPPED,
    MAX_CHOSEN_SAMPLED,
    MAX_SCORED_TOKENS,
    MAX_UNREAD,
    routes,
)
from gpt_lightning.exploring.explorer import Explorer, LoadModel
from gpt_lightning.generation.engine import stream_ids
from gpt_lightning.generation.sampling import SamplingParams, make_generator
from gpt_lightning.model.kv_cache import KVCache
from gpt_lightning.pretrained.convert import save_model
from gpt_lightning.serving.generation_request import BusyError
from gpt_lightning.serving.worker import ModelWorker
from helpers import Command, json_of, tiny_gpt2_vocabulary
from own_tokenizers import write_own

PROMPT = "Every effort moves you"
IDS = GPT2.encode_prompt(PROMPT)
LONG = PROMPT * 8  # 32 tokens; the model reads 24
SAMPLING = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}
POSTS = {
    "load": {},
    "tokens": {"prompt": PROMPT},
    "next": {"prompt": PROMPT},
    "generate": {"prompt": PROMPT, "max_new_tokens": 2},
    "score": {"text": PROMPT},
    "lens": {"prompt": PROMPT},
    "attention": {"prompt": PROMPT, "layer": 1},
}

FIELDS_OF = {
    "load": ["model"],
    "tokens": ["model", "prompt", "path"],
    "next": ["model", "prompt", "path", "sampling", "draws", "seed", "bars", "include_tokens"],
    "generate": ["model", "prompt", "path", "sampling", "max_new_tokens", "seed"],
    "score": ["model", "text"],
    "lens": ["model", "prompt", "path", "positions"],
    "attention": ["model", "prompt", "path", "layer", "head"],
}

Post = Callable[..., Any]


@contextmanager
def client_for(
    model: GPTModel, path: Path, load: LoadModel, tokenizer: Tokenizer = GPT2
) -> Iterator[TestClient]:
    """A client of a server with ``model``, whose id is ``tiny``."""
    save_model(model, path, "lightning", tokenizer=tokenizer)
    explorer = Explorer({"tiny": str(path)}, load)
    with TestClient(Starlette(routes=routes(explorer))) as client:
        yield client


def test_state(client: TestClient) -> None:
    answer = client.get("/api/state").json()
    assert answer["default_prompt"] == PROMPT
    assert answer["models"] == [
        {
            "id": "tiny", "source": "tiny", "checkpoint": None, "step": None, "is_loaded": True,
            "revision": 1, "loaded_revision": 1, "loaded_step": None,
            "n_layers": 2, "n_heads": 2, "emb_dim": 16, "context_length": 24, "vocab_size": 50257,
            "num_parameters": sum(p.numel() for p in tiny_gpt2_vocabulary().parameters()),
        }
    ]  # fmt: skip


def test_tokens(post: Post) -> None:
    answer = post("tokens", prompt="é 🦜", path=[50256])
    assert [t["id"] for t in answer["tokens"]] == [*GPT2.encode_prompt("é 🦜"), 50256]
    assert bytes.fromhex("".join(t["bytes"] for t in answer["tokens"][:-1])) == "é 🦜".encode()
    assert answer["tokens"][0]["text"] == "é"
    assert "\ufffd" in answer["tokens"][1]["text"]  # a part of the parrot
    assert answer["tokens"][-1]["text"] == "<|endoftext|>"
    assert answer["cropped"] == 0
    assert post("tokens", prompt=LONG)["cropped"] == 8
    assert post("tokens", prompt="") == {"tokens": [], "cropped": 0}


def test_next(post: Post) -> None:
    answer = post("next", prompt=PROMPT, sampling=SAMPLING, draws=100, seed=3, bars=10)
    assert [t["id"] for t in answer["tokens"]] == IDS
    assert len(answer["bars"]) == 10
    assert set(answer["bars"][0]) == {
        "id", "text", "bytes", "rank", "logit", "model_probability", "probability", "drawn",
    }  # fmt: skip
    drawn = sum(bar["drawn"] for bar in answer["bars"]) + answer["rest"]["drawn"]
    assert drawn == answer["draws"] == 100
    assert answer["num_kept"] <= 50
    assert answer["path"] == []
    assert answer["milliseconds"] > 0
    again = post("next", prompt=PROMPT, sampling=SAMPLING, draws=100, seed=3, bars=10)
    assert {**again, "milliseconds": 0} == {**answer, "milliseconds": 0}


def test_next_computes_logits_once(
    post: Post, tiny: GPTModel, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = explorer.models["tiny"].model
    calls: list[int] = []
    features = model.features
    monkeypatch.setattr(
        model, "features", lambda idx, cache: calls.append(idx.shape[1]) or features(idx, cache)
    )
    for temperature in (0.1, 0.5, 1.0):
        post("next", prompt="A new prompt", sampling={"temperature": temperature})
    assert calls == [3]
    path = post("next", prompt="A new prompt", bars=1)["bars"]
    post("next", prompt="A new prompt", path=[path[0]["id"]])
    assert calls == [3, 1]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_path_has_the_figures_of_each_step(post: Post, prompt: str) -> None:
    path: list[int] = []
    expected = []
    for rank in (0, 3, 1):
        bar = post("next", prompt=prompt, path=path, sampling=SAMPLING)["bars"][rank]
        expected.append(bar)
        path.append(bar["id"])
    answer = post("next", prompt=prompt, path=path, sampling=SAMPLING, bars=0)
    assert answer["bars"] == []
    for step, bar in zip(answer["path"], expected, strict=True):
        assert step == {key: bar[key] for key in step}


def test_tokens_can_be_left_out(post: Post) -> None:
    """A slider changes no token, so the page does not ask for them again."""
    whole = post("next", prompt=LONG, path=[5])
    without = post("next", prompt=LONG, path=[5], include_tokens=False)
    assert (without["num_tokens"], without["cropped"]) == (33, 9)
    assert len(whole.pop("tokens")) == 33
    assert {**without, "milliseconds": 0} == {**whole, "milliseconds": 0}


def test_few_of_the_unread_tokens_are_listed(post: Post) -> None:
    ids = GPT2.encode_prompt(PROMPT * 100)
    answer = post("next", prompt=PROMPT * 100)
    assert [t["id"] for t in answer["tokens"]] == ids[-24 - MAX_UNREAD :]
    assert answer["num_tokens"] == len(ids) == 400
    assert answer["cropped"] == 376


def test_each_cropped_window_is_a_job(
    client: TestClient, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client's request is answered between two windows, and a long path costs few of them."""
    served = explorer.models["tiny"]
    jobs: list[list[int]] = []
    features, run = served.model.features, type(served.worker).run

    def count(idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
        jobs[-1].append(idx.shape[1])
        return features(idx, cache)

    async def note(worker: ModelWorker, function: Callable[[], Any]) -> Any:
        jobs.append([])
        return await run(worker, function)

    monkeypatch.setattr(served.model, "features", count)
    monkeypatch.setattr(ModelWorker, "run", note)
    path = list(range(200, 240))
    body = {"model": "tiny", "prompt": PROMPT, "path": path}
    answer = client.post("/api/next", json=body).json()
    assert [job for job in jobs if job] == [[24]] * (MAX_CHOSEN_CROPPED + 1)
    figures = [step["rank"] is not None for step in answer["path"]]
    assert figures == [False] * (40 - MAX_CHOSEN_CROPPED) + [True] * MAX_CHOSEN_CROPPED


def test_a_long_path_has_figures_at_its_end(load: LoadModel, tmp_path: Path) -> None:
    model = GPTModel(GPTConfig(context_length=64, emb_dim=8, n_heads=2, n_layers=1))
    path = list(range(100, 102 + MAX_CHOSEN))
    with client_for(model, tmp_path / "long.ckpt", load) as client:
        body = {"model": "tiny", "prompt": PROMPT, "path": path}
        steps = client.post("/api/next", json=body).json()["path"]
    assert [step["id"] for step in steps] == path
    for name, count in (
        ("rank", MAX_CHOSEN),
        ("model_probability", MAX_CHOSEN),
        ("probability", MAX_CHOSEN_SAMPLED),
    ):
        missing = len(path) - count
        assert [step[name] is None for step in steps] == [True] * missing + [False] * count


def test_path_without_a_prompt(post: Post) -> None:
    answer = post("next", prompt="", path=[5, 6])
    assert [step["rank"] is None for step in answer["path"]] == [True, False]
    assert [t["id"] for t in answer["tokens"]] == [5, 6]


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLING], ids=["greedy", "sampled"])
def test_generated_text_is_that_of_generate(
    post: Post, explorer: Explorer, sampling: dict[str, Any], prompt: str
) -> None:
    *events, end = post("generate", prompt=prompt, sampling=sampling, max_new_tokens=30, seed=5)
    steps = stream_ids(
        explorer.models["tiny"].model,
        [GPT2.encode_prompt(prompt)],
        30,
        SamplingParams(**sampling),
        eos_id=50256,
        generator=make_generator(5),
    )
    assert [event["token"]["id"] for event in events] == [int(step[0]) for step in steps]
    assert end == {"done": "length", "error": None}
    for event in events:
        assert set(event) == {"token", "surprisal", "rank", "candidates"}
        assert len(event["candidates"]) == 5
        for candidate in event["candidates"]:
            if candidate["id"] == event["token"]["id"]:
                own = candidate["model_probability"]
                assert own == pytest.approx(math.exp(-event["surprisal"]), rel=1e-4)
    if sampling["temperature"] == 0:
        assert all(e["candidates"][0]["id"] == e["token"]["id"] for e in events)
        assert all(e["candidates"][0]["probability"] == 1 for e in events)


def test_generation_continues_a_path(post: Post) -> None:
    path = [11, 262]
    greedy = {"temperature": 0}
    *events, _ = post("generate", prompt=PROMPT, path=path, sampling=greedy, max_new_tokens=1)
    bars = post("next", prompt=PROMPT, path=path, sampling=greedy)["bars"]
    assert events[0]["token"]["id"] == bars[0]["id"]
    assert events[0]["rank"] == 1


def test_score(post: Post) -> None:
    answer = post("score", text=LONG)
    assert [t["id"] for t in answer["tokens"]] == GPT2.encode_prompt(LONG)
    assert answer["num_tokens"] == 32
    surprisals = [t["surprisal"] for t in answer["tokens"]]
    assert surprisals[0] is None
    assert answer["loss"] == pytest.approx(math.fsum(surprisals[1:]) / 31)
    assert answer["cropped"] == 0
    assert len(answer["tokens"][1]["candidates"]) == 5


def test_lens(post: Post) -> None:
    answer = post("lens", prompt=LONG, positions=3)
    assert [t["id"] for t in answer["tokens"]] == GPT2.encode_prompt(LONG)[-3:]
    assert [layer["name"] for layer in answer["layers"]] == ["embedding", "block 1", "block 2"]
    assert all(len(layer["positions"]) == 3 for layer in answer["layers"])
    last = answer["layers"][-1]["positions"][-1]["top"]
    bars = post("next", prompt=LONG)["bars"][:5]
    assert [token["id"] for token in last] == [bar["id"] for bar in bars]
    expected = [bar["model_probability"] for bar in bars]
    assert [token["probability"] for token in last] == pytest.approx(expected, abs=1e-6)
    assert len(post("lens", prompt=PROMPT)["tokens"]) == len(IDS)


def test_attention(post: Post) -> None:
    heads = [post("attention", prompt=PROMPT, layer=1, head=head) for head in (0, 1)]
    mean = post("attention", prompt=PROMPT, layer=1)
    for answer in (*heads, mean):
        assert [t["id"] for t in answer["tokens"]] == IDS
        assert answer["cropped"] == 0
        for i, row in enumerate(answer["weights"]):
            assert math.fsum(row) == pytest.approx(1, abs=1e-6)
            assert row[i + 1 :] == [0] * (len(IDS) - 1 - i)
    for row, first, second in zip(
        mean["weights"], heads[0]["weights"], heads[1]["weights"], strict=True
    ):
        assert row == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)])
    cropped = post("attention", prompt=LONG, layer=0)
    assert cropped["cropped"] == 8
    assert [t["id"] for t in cropped["tokens"]] == GPT2.encode_prompt(LONG)[-24:]


def test_heads_of_a_block_are_computed_once(
    post: Post, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    model = explorer.models["tiny"].model
    features = model.features
    monkeypatch.setattr(model, "features", lambda idx: calls.append(idx.shape[1]) or features(idx))
    for layer, head in ((0, 0), (0, 1), (0, None), (1, 0)):
        post("attention", prompt="Heads", layer=layer, head=head)
    assert len(calls) == 2


def test_attention_of_a_long_window(load: LoadModel, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = GPTModel(GPTConfig(context_length=300, emb_dim=8, n_heads=2, n_layers=1))
    with client_for(model, tmp_path / "long.ckpt", load) as client:
        path = [i % 1000 for i in range(310)]
        body = {"model": "tiny", "prompt": "", "path": path, "layer": 0, "head": 1}
        answer = client.post("/api/attention", json=body).json()
    assert [t["id"] for t in answer["tokens"]] == path[-256:]
    assert answer["cropped"] == 54
    assert [len(row) for row in answer["weights"]] == [256] * 256
    assert math.fsum(answer["weights"][-1]) < 0.99  # the rest is on tokens that are not shown


def test_another_tokenizer(load: LoadModel, tmp_path: Path) -> None:
    tokenizer = read_tokenizer(write_own(tmp_path / "tokenizer") / "tokenizer.json")
    model = GPTModel(GPTConfig(tokenizer.vocab_size, 24, emb_dim=8, n_heads=2, n_layers=1))
    with client_for(model, tmp_path / "own.ckpt", load, tokenizer) as client:
        for name, body in POSTS.items():
            body = {**body, "layer": 0} if name == "attention" else body
            assert client.post(f"/api/{name}", json={"model": "tiny", **body}).status_code == 200
        answer = client.post("/api/score", json={"model": "tiny", "text": "Every é"}).json()
    assert [t["id"] for t in answer["tokens"]] == tokenizer.encode_prompt("Every é")
    assert bytes.fromhex("".join(t["bytes"] for t in answer["tokens"])) == "Every é".encode()


def test_ids_beyond_the_tokenizer(load: LoadModel, tmp_path: Path) -> None:
    model = GPTModel(GPTConfig(50304, 24, emb_dim=8, n_heads=2, n_layers=1))
    with client_for(model, tmp_path / "padded.ckpt", load) as client:
        body = {"model": "tiny", "prompt": "A", "path": [50303]}
        answer = client.post("/api/next", json=body).json()
        assert answer["path"][0]["text"] == "\ufffd"
        assert answer["rest"]["count"] == 50304 - 40
        error = error_of(client, "next", 400, prompt="A", path=[50304])
        assert "vocabulary of 50,304" in error["message"]


# --- wrong requests -------------------------------------------------------------------------------


def error_of(client: TestClient, name: str, status: int, **body: Any) -> dict[str, Any]:
    response = client.post(f"/api/{name}", json={"model": "tiny", **body})
    assert response.status_code == status, response.text[:500]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize("name", POSTS)
def test_wrong_types(client: TestClient, name: str) -> None:
    fields = {"model": "tiny", **POSTS[name]}
    for field in fields:
        for wrong in (None, [], {}, True, [None], 1.5):
            error = error_of(client, name, 400, **{**fields, field: wrong})
            assert error["param"] == field, (field, wrong)
            assert error["type"] == "invalid_request_error"
    assert error_of(client, name, 400, **fields, promt="x")["param"] == "promt"
    assert error_of(client, name, 404, **{**fields, "model": "gpt-4"})["code"] == "model_not_found"
    for body in ("", "[]", "null", "{", '{"model": 1e999}', "[" * 100_000, b"\xff"):
        headers = {"Content-Type": "application/json"}
        response = client.post(f"/api/{name}", content=body, headers=headers)
        assert response.status_code == 400, body
    response = client.post(f"/api/{name}", content=json.dumps(fields))
    assert response.status_code == 400
    assert "Content-Type" in response.json()["error"]["message"]
    assert client.get(f"/api/{name}").status_code == 405


@pytest.mark.parametrize(
    ("name", "param", "body"),
    [
        ("next", "prompt", {"prompt": ""}),
        ("next", "prompt", {"prompt": "a" * 200_001}),
        ("next", "path", {"path": [50257]}),
        ("next", "path", {"path": [-1]}),
        ("next", "path", {"path": ["a"]}),
        ("next", "path", {"path": [0] * 20_001}),
        ("next", "draws", {"draws": 10_001}),
        ("next", "draws", {"draws": -1}),
        ("next", "bars", {"bars": 501}),
        ("next", "include_tokens", {"include_tokens": 0}),
        ("next", "seed", {"seed": 2**64}),
        ("next", "sampling.temperature", {"sampling": {"temperature": -1}}),
        ("next", "sampling.temperature", {"sampling": {"temperature": "1"}}),
        ("next", "sampling.temperature", {"sampling": {"temperature": None}}),
        ("next", "sampling.top_k", {"sampling": {"top_k": 0}}),
        ("next", "sampling.top_k", {"sampling": {"top_k": 50258}}),
        ("next", "sampling.top_k", {"sampling": {"top_k": 2.5}}),
        ("next", "sampling.top_k", {"sampling": {"top_k": True}}),
        ("next", "sampling.top_p", {"sampling": {"top_p": 1.01}}),
        ("next", "sampling.min_p", {"sampling": {"min_p": 0}}),
        ("next", "sampling.repetition_penalty", {"sampling": {"repetition_penalty": 0}}),
        ("next", "sampling", {"sampling": {"top_q": 1}}),
        ("generate", "max_new_tokens", {"max_new_tokens": -1}),
        ("generate", "sampling.top_k", {"sampling": {"top_k": -3}}),
        ("score", "text", {"text": ""}),
        ("lens", "positions", {"positions": 0}),
        ("lens", "positions", {"positions": 65}),
        ("attention", "layer", {"layer": 2}),
        ("attention", "layer", {"layer": -1}),
        ("attention", "head", {"head": 2}),
    ],
)
def test_values_out_of_range(
    client: TestClient, name: str, param: str, body: dict[str, Any]
) -> None:
    error = error_of(client, name, 400, **{**POSTS[name], **body})
    assert error["param"] == param
    assert error["message"].startswith(f"{param.rpartition('.')[2]}: ") or error[
        "message"
    ].startswith(f"{param}: ")


def test_numbers_that_json_does_not_have(client: TestClient) -> None:
    for number in ("NaN", "Infinity", "1e999"):
        body = json.dumps({"model": "tiny", "prompt": "a", "sampling": {"temperature": "?"}})
        body = body.replace('"?"', number)
        response = client.post(
            "/api/next", content=body, headers={"Content-Type": "application/json"}
        )
        assert response.status_code == 400, number


def test_a_lone_surrogate(client: TestClient) -> None:
    body = '{"model": "tiny", "prompt": "\\ud800"}'
    response = client.post("/api/next", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400


def test_a_text_that_is_too_long(client: TestClient) -> None:
    error = error_of(client, "score", 413, text=" a" * (MAX_SCORED_TOKENS + 1))
    assert error["param"] == "text"
    assert "8,193 tokens" in error["message"]


# --- failures of the model ------------------------------------------------------------------------


def test_damaged_weights(load: LoadModel, tmp_path: Path) -> None:
    model = tiny_gpt2_vocabulary()
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with client_for(model, tmp_path / "nan.ckpt", load) as client:
        for name in ("next", "score", "lens"):
            error = error_of(client, name, 500, **POSTS[name])
            assert "the model's weights are damaged" in error["message"]
        body = {"model": "tiny", **POSTS["generate"]}
        events = client.post("/api/generate", json=body).text
        assert events.count("data: ") == 1
        assert json.loads(events.removeprefix("data: "))["done"] == "error"
        assert "damaged" in events
        assert client.post("/api/tokens", json={"model": "tiny", "prompt": "a"}).status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_fails_one_request(
    client: TestClient, explorer: Explorer, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(explorer.models["tiny"].model, "features", fail)
        for name in ("next", "score", "lens", "attention"):
            body = {
                **POSTS[name],
                **({"prompt": f"not cached {error}"} if "prompt" in POSTS[name] else {}),
            }
            refusal = error_of(client, name, 500, **body)
            assert refusal["code"] == "out_of_memory"
            assert "memory" in refusal["message"]
    answer = client.post("/api/next", json={"model": "tiny", "prompt": f"not cached {error}"})
    assert answer.status_code == 200


def test_a_busy_model(
    client: TestClient, explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise BusyError(7)

    worker = type(explorer.models["tiny"].worker)
    for method, name in (("run", "lens"), ("submit", "generate")):
        with monkeypatch.context() as patch:
            patch.setattr(worker, method, refuse)
            response = client.post(f"/api/{name}", json={"model": "tiny", **POSTS[name]})
            assert response.status_code == 429
            assert response.headers["Retry-After"] == "7"


# --- a client that goes away ----------------------------------------------------------------------


async def call_and_leave(app: Starlette, name: str, body: dict[str, Any], num_parts: int) -> int:
    """POST a request and leave after ``num_parts`` parts of the answer. Returns the number of parts."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    left = asyncio.Event()
    parts = 0

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal parts
        if message["type"] == "http.response.body" and message["body"]:
            parts += 1
        if parts >= num_parts:
            left.set()

    scope = {
        "type": "http", "method": "POST", "path": f"/api/{name}", "query_string": b"",
        "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        "scheme": "http", "server": ("127.0.0.1", 80), "root_path": "",
    }  # fmt: skip
    if num_parts == 0:
        left.set()
    await asyncio.wait_for(app(scope, receive, send), 60)
    return parts


@pytest.mark.parametrize("num_parts", [0, 3])
def test_a_client_that_leaves_ends_its_generation(explorer: Explorer, num_parts: int) -> None:
    worker = explorer.models["tiny"].worker

    async def leave() -> None:
        body = {"model": "tiny", "prompt": PROMPT, "max_new_tokens": 10_000}
        assert (
            await call_and_leave(Starlette(routes=routes(explorer)), "generate", body, num_parts)
            < 1000
        )
        for _ in range(200):
            if not worker.has_work:
                return
            await asyncio.sleep(0.05)
        pytest.fail("the row is not freed")

    asyncio.run(leave())


def test_a_client_that_leaves_ends_its_scoring(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    model = explorer.models["tiny"].model
    features = model.features
    monkeypatch.setattr(model, "features", lambda idx: calls.append(idx.shape[1]) or features(idx))

    async def leave() -> None:
        body = {"model": "tiny", "text": LONG * 20}
        app = Starlette(routes=routes(explorer))
        await call_and_leave(app, "score", body, 0)

    asyncio.run(leave())
    assert len(calls) <= 1


# --- the commands' figures ------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_bars_are_those_of_report_sampling(
    command: Command, post: Post, tiny_file: Path, prompt: str
) -> None:
    report = json_of(
        command(
            "report", "sampling", "--from", str(tiny_file), "--prompt", prompt, "--show=40",
            "--temperatures=[0.5,1,3]", "--top_k=[0,30]", "--top_p=[0.9,1]", "--num_samples=10",
            "--json",
        )
    )  # fmt: skip
    assert len(report["distributions"]) == 12
    for distribution in report["distributions"]:
        sampling = {name: distribution[name] for name in ("temperature", "top_k", "top_p")}
        rows = [row for row in report["rows"] if sampling.items() <= row.items()]
        answer = post("next", prompt=prompt, sampling=sampling)
        assert [repr(bar["text"]) for bar in answer["bars"]] == [row["token"] for row in rows]
        for bar, row in zip(answer["bars"], rows, strict=True):
            assert bar["probability"] == pytest.approx(row["probability"], abs=1e-6)
        assert answer["entropy"] == pytest.approx(distribution["entropy"], rel=1e-6)
        # rounding may move the last of many thousand nearly equal tokens over the limit of top_p
        assert abs(answer["num_kept"] - distribution["tokens_left"]) <= 2


def test_the_stream_is_the_text_of_generate(command: Command, post: Post, tiny_file: Path) -> None:
    options = {
        "temperature": 0.8,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.001,
        "repetition_penalty": 1.1,
    }
    text = json_of(
        command(
            "generate", "--from", str(tiny_file), "--prompt", PROMPT, "--seed=7", "--json",
            "--max_new_tokens=30", *(f"--{name}={value}" for name, value in options.items()),
        )
    )  # fmt: skip
    *events, _ = post("generate", prompt=PROMPT, sampling=options, max_new_tokens=30, seed=7)
    ids = [event["token"]["id"] for event in events]
    assert IDS + ids == text["token_ids"]
    new_bytes = b"".join(bytes.fromhex(event["token"]["bytes"]) for event in events)
    assert PROMPT + new_bytes.decode(errors="replace") == text["text"]


# --- random requests ------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
SENSIBLE = {
    "model": st.just("tiny"),
    "prompt": st.text(max_size=40),
    "text": st.text(max_size=40),
    "path": st.lists(st.integers(-1, 50300), max_size=40),
    "sampling": st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 1e308),
            "top_k": st.none() | st.integers(-1, 60_000),
            "top_p": st.none() | st.floats(0, 1.01),
            "min_p": st.none() | st.floats(0, 1.01),
            "repetition_penalty": st.floats(0.001, 1000),
        },
    ),
    "draws": st.integers(-1, 10_001),
    "seed": st.integers(-(2**64), 2**65),
    "bars": st.integers(-1, 501),
    "include_tokens": st.booleans(),
    "max_new_tokens": st.integers(-1, 5),
    "positions": st.integers(0, 66),
    "layer": st.integers(-1, 3),
    "head": st.none() | st.integers(-1, 3),
}
BODIES = st.sampled_from(sorted(POSTS)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.fixed_dictionaries(
            {}, optional={field: SENSIBLE[field] | JSON_VALUES for field in FIELDS_OF[name]}
        ),
        st.fixed_dictionaries({field: SENSIBLE[field] for field in FIELDS_OF[name]}),
        st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=1),
    )
)


@settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(request=BODIES, changes=st.integers(0, 2))
def test_random_requests(client: TestClient, request: Any, changes: int) -> None:
    name, some, sensible, others = request
    body = [sensible, {**sensible, **some}, {**sensible, **some, **others}][changes]
    response = client.post(
        f"/api/{name}",
        content=json.dumps(body),  # NaN and lone surrogates included
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code in (200, 400, 404), (response.text[:500], body)
    if response.status_code != 200:
        assert response.json()["error"]["message"]
    elif name == "generate":
        assert '"error": null' in response.text
