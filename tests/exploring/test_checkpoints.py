"""Checkpoints of a run: which there are, which changed, loading and replacing their models."""

import asyncio
import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gpt_lightning import GPTConfig, GPTModel
from gpt_lightning.exploring import checkpoints as checkpoints_module
from gpt_lightning.exploring import explorer as explorer_module
from gpt_lightning.exploring.api import routes
from gpt_lightning.exploring.checkpoints import Checkpoints
from gpt_lightning.exploring.explorer import Explorer, LoadModel
from gpt_lightning.pretrained.convert import save_model
from gpt_lightning.serving.generation_request import RowRequest
from gpt_lightning.serving.served_model import ServedModel


def write_checkpoint(path: Path, step: int) -> None:
    """A checkpoint of a run at ``step``, whose weights depend on the step, put in place as training does it."""
    torch.manual_seed(step)
    config = GPTConfig(context_length=16, emb_dim=8, n_heads=2, n_layers=1)
    weights = {f"model.{name}": t for name, t in GPTModel(config).state_dict().items()}
    content = {
        "hyper_parameters": {"config": asdict(config)},
        "state_dict": weights,
        "global_step": step,
    }
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run with last, best, previous and two numbered checkpoints, and other files."""
    folder = tmp_path / "checkpoints" / "verdict"
    folder.mkdir(parents=True)
    steps = {"last": 9, "best": 6, "previous": 8, "step-000003": 3, "step-000006": 6}
    for name, step in steps.items():
        write_checkpoint(folder / f"{name}.ckpt", step)
    for name in ("config.yaml", ".last.ckpt.tmp", "other.ckpt", "step-x.ckpt"):
        (folder / name).write_text("?")
    return folder


@pytest.fixture
def explorer(run: Path, load: LoadModel) -> Explorer:
    explorer = Explorer({"verdict": str(run)}, load)
    explorer.load_sources()
    return explorer


@pytest.fixture
def client(explorer: Explorer) -> Iterator[TestClient]:
    with TestClient(Starlette(routes=routes(explorer))) as client:
        yield client


def entries(client: TestClient) -> dict[str, dict[str, Any]]:
    return {entry["id"]: entry for entry in client.get("/api/state").json()["models"]}


def first_bar(client: TestClient, model: str) -> dict[str, Any]:
    response = client.post("/api/next", json={"model": model, "prompt": "A", "bars": 1})
    assert response.status_code == 200, response.text
    bar: dict[str, Any] = response.json()["bars"][0]
    return bar


# --- on disk --------------------------------------------------------------------------------------


def test_checkpoints_of_a_run(run: Path) -> None:
    found = Checkpoints({"verdict": str(run)}).refresh()
    assert [(c.id, c.source, c.name, c.step, c.revision) for c in found] == [
        ("verdict", "verdict", "last", 9, 1),
        ("verdict/best", "verdict", "best", 6, 1),
        ("verdict/previous", "verdict", "previous", 8, 1),
        ("verdict/step-000003", "verdict", "step-000003", 3, 1),
        ("verdict/step-000006", "verdict", "step-000006", 6, 1),
    ]


def test_a_trained_run(trained_run: Path) -> None:
    found = Checkpoints({"quickstart": str(trained_run)}).refresh()
    names = {path.stem for path in trained_run.glob("*.ckpt")}
    assert {c.name for c in found} == names
    assert {"last", "best"} <= names
    assert found[0].step == 4
    assert all(c.step is not None and 0 < c.step <= 4 for c in found)


def test_other_sources_have_one_entry(run: Path, tmp_path: Path) -> None:
    model = GPTModel(GPTConfig(context_length=16, emb_dim=8, n_heads=2, n_layers=1))
    save_model(model, tmp_path / "hf", "hf")
    save_model(model, tmp_path / "model.pth", "book")
    sources = {
        "file": str(run / "best.ckpt"),
        "without-suffix": str(run / "best"),
        "hf": str(tmp_path / "hf"),
        "book": str(tmp_path / "model.pth"),
    }
    found = Checkpoints(sources).refresh()
    assert [(c.id, c.name, c.step) for c in found] == [
        ("file", None, 6),
        ("without-suffix", None, 6),
        ("hf", None, None),
        ("book", None, None),
    ]
    assert all(c.revision == 1 for c in found)


def test_a_run_without_last(run: Path) -> None:
    (run / "last.ckpt").unlink()
    checkpoints = Checkpoints({"verdict": str(run)})
    assert [c.name for c in checkpoints.refresh()][:2] == ["best", "previous"]
    write_checkpoint(run / "last.ckpt", 10)
    found = checkpoints.refresh()
    assert found[0].name == "best"
    assert (found[-1].id, found[-1].step) == ("verdict/last", 10)


def test_two_sources_of_one_run(run: Path) -> None:
    sources = {"verdict": str(run), "verdict-best": str(run / "best.ckpt")}
    found = Checkpoints(sources).refresh()
    assert [c.id for c in found][:3] == ["verdict", "verdict-best", "verdict/previous"]


def test_only_changed_files_are_opened(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints({"verdict": str(run)})
    checkpoints.refresh()
    opened: list[str] = []
    read = checkpoints_module.read_torch
    monkeypatch.setattr(
        checkpoints_module, "read_torch", lambda path: opened.append(path.name) or read(path)
    )
    checkpoints.refresh()
    assert opened == []
    write_checkpoint(run / "best.ckpt", 7)
    found = {c.id: c for c in checkpoints.refresh()}
    assert opened == ["best.ckpt"]
    assert (found["verdict/best"].revision, found["verdict/best"].step) == (2, 7)
    assert found["verdict"].revision == 1


def test_a_file_that_is_damaged_or_gone(run: Path) -> None:
    checkpoints = Checkpoints({"verdict": str(run)})
    checkpoints.refresh()
    (run / "best.ckpt").write_bytes(b"?")
    (run / "last.ckpt").unlink()
    (run / "previous.ckpt").unlink()
    found = {c.id: c for c in checkpoints.refresh(kept=frozenset(["verdict/previous"]))}
    assert (found["verdict/best"].revision, found["verdict/best"].step) == (2, None)
    assert (found["verdict"].revision, found["verdict"].step) == (1, 9)
    assert found["verdict/previous"].revision == 1
    shutil.rmtree(run)
    assert [c.id for c in checkpoints.refresh()] == ["verdict"]


# --- in memory ------------------------------------------------------------------------------------


def test_checkpoints_load_at_first_use(client: TestClient) -> None:
    before = entries(client)
    assert [entry["is_loaded"] for entry in before.values()] == [True, False, False, False, False]
    assert before["verdict/best"]["vocab_size"] is None
    assert before["verdict/best"]["loaded_revision"] is None
    bars = {model: first_bar(client, model)["logit"] for model in before}
    assert bars["verdict/best"] == bars["verdict/step-000006"]  # the same step
    assert len(set(bars.values())) == 4
    assert entries(client)["verdict/step-000006"]["context_length"] == 16


def test_three_lazy_models_stay_in_memory(client: TestClient) -> None:
    for name in ("best", "previous", "step-000003", "best", "step-000006"):
        first_bar(client, f"verdict/{name}")
    loaded = [name for name, entry in entries(client).items() if entry["is_loaded"]]
    assert loaded == ["verdict", "verdict/best", "verdict/step-000003", "verdict/step-000006"]
    first_bar(client, "verdict/previous")
    assert entries(client)["verdict"]["is_loaded"]
    assert not entries(client)["verdict/step-000003"]["is_loaded"]


def test_a_new_checkpoint_is_noticed_and_loaded(
    client: TestClient, explorer: Explorer, run: Path
) -> None:
    old, bar = explorer.models["verdict"], first_bar(client, "verdict")
    write_checkpoint(run / "last.ckpt", 12)
    entry = entries(client)["verdict"]
    assert (entry["revision"], entry["loaded_revision"]) == (2, 1)
    assert (entry["step"], entry["loaded_step"]) == (12, 9)
    assert first_bar(client, "verdict") == bar  # until it is asked for
    entry = client.post("/api/load", json={"model": "verdict"}).json()
    assert (entry["revision"], entry["loaded_revision"], entry["loaded_step"]) == (2, 2, 12)
    assert entry == entries(client)["verdict"]
    assert first_bar(client, "verdict") != bar
    new = explorer.models["verdict"]
    assert new is not old
    client.post("/api/load", json={"model": "verdict"})
    assert explorer.models["verdict"] is new  # it has not changed again


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_checkpoint_that_does_not_load_leaves_the_old_one(
    client: TestClient, run: Path, damage: str
) -> None:
    bars = {model: first_bar(client, model) for model in ("verdict", "verdict/best")}
    for name in ("last", "best"):
        path = run / f"{name}.ckpt"
        content = path.read_bytes()
        path.unlink()
        if damage == "cut":
            path.write_bytes(content[: len(content) // 2])
    for model, bar in bars.items():
        response = client.post("/api/load", json={"model": model})
        if damage == "cut":
            assert response.status_code == 500
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("model", "load_failed")
            assert error["message"].startswith(f"{model}: cannot be read")
            assert entries(client)[model]["revision"] == 2
        else:  # the newest file that was there is loaded
            assert response.json()["loaded_revision"] == 1
        assert first_bar(client, model) == bar
        assert entries(client)[model]["loaded_revision"] == 1


def test_no_answer_has_a_path(
    client: TestClient, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "best.ckpt").write_bytes(b"?")
    first_bar(client, "verdict/previous")
    (run / "step-000003.ckpt").write_bytes(b"")
    for body in ({"model": "verdict/best"}, {"model": "verdict/step-000003"}, {"model": str(run)}):
        for name in ("load", "tokens"):
            response = client.post(f"/api/{name}", json={**body, "prompt": "A"})
            assert response.status_code in (400, 404, 500)
            assert str(tmp_path) not in response.text
            assert "checkpoints" not in response.text
    assert str(tmp_path) not in client.get("/api/state").text
    assert str(run / "best.ckpt") in caplog.text  # the log of the server says more


def test_a_model_that_does_not_fit_in_memory(run: Path, load: LoadModel) -> None:
    def load_first(source: str, model_id: str) -> ServedModel:
        if model_id != "verdict":
            raise MemoryError
        return load(source, model_id)

    explorer = Explorer({"verdict": str(run)}, load_first)
    explorer.load_sources()
    with TestClient(Starlette(routes=routes(explorer))) as client:
        response = client.post("/api/load", json={"model": "verdict/best"})
        assert response.status_code == 500
        assert "does not fit in memory" in response.json()["error"]["message"]
        first_bar(client, "verdict")


def test_a_missing_source(tmp_path: Path, load: LoadModel) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Explorer({"a": str(tmp_path / "a")}, load)


@pytest.mark.slow
def test_a_replaced_model_ends_its_generations(explorer: Explorer, run: Path) -> None:
    """The text that is being generated is that of the old weights, to its end."""
    body = {"model": "verdict", "prompt": "A", "max_new_tokens": 400, "seed": 1}
    app = Starlette(routes=routes(explorer))

    async def generate() -> str:
        parts: list[bytes] = []
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            parts.append(message.get("body", b""))

        scope = {
            "type": "http", "method": "POST", "path": "/api/generate", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("127.0.0.1", 80), "root_path": "",
        }  # fmt: skip
        await asyncio.wait_for(app(scope, receive, send), 60)
        return b"".join(parts).decode()

    async def both() -> tuple[str, str]:
        undisturbed = await generate()
        task = asyncio.create_task(generate())
        while not explorer.models["verdict"].worker.has_work:
            await asyncio.sleep(0.001)
        old = explorer.models["verdict"]
        write_checkpoint(run / "last.ckpt", 12)
        await explorer.reload("verdict")
        assert old.worker.has_work, "the generation has ended too early for this test"
        assert explorer.models["verdict"] is not old
        return undisturbed, await task

    undisturbed, text = asyncio.run(both())
    assert text == undisturbed
    assert '"done": "length"' in text


def test_a_replaced_model_is_closed_after_its_last_request(
    explorer: Explorer, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ServedModel] = []
    monkeypatch.setattr(ServedModel, "close", lambda served: closed.append(served))
    monkeypatch.setattr(explorer_module, "_RETIRED_POLL_SECONDS", 0.001)

    async def replace() -> None:
        async with explorer.use("verdict") as loaded:
            write_checkpoint(run / "last.ckpt", 12)
            await explorer.reload("verdict")
            await asyncio.sleep(0.05)
            assert closed == []
            generation = loaded.served.worker.submit(RowRequest([1], 2000))
        await asyncio.sleep(0.05)
        assert closed == []
        async for _ in generation:
            pass
        await asyncio.sleep(0.05)
        assert closed == [loaded.served]
        async with explorer.use("verdict") as newer:
            assert newer is not loaded

    asyncio.run(replace())


def test_requests_at_the_same_time_load_a_model_once(run: Path, load: LoadModel) -> None:
    loads: list[str] = []

    def count(source: str, model_id: str) -> ServedModel:
        loads.append(model_id)
        return load(source, model_id)

    explorer = Explorer({"verdict": str(run)}, count)
    explorer.load_sources()

    async def use() -> None:
        async with explorer.use("verdict/best"):
            pass

    async def ask() -> None:
        await asyncio.gather(*(use() for _ in range(5)))

    asyncio.run(ask())
    assert loads == ["verdict", "verdict/best"]


def test_a_slow_load_does_not_delay_other_models(run: Path, load: LoadModel) -> None:
    is_slow = threading.Event()
    may_end = threading.Event()

    def load_slowly(source: str, model_id: str) -> ServedModel:
        if model_id == "verdict/best":
            is_slow.set()
            assert may_end.wait(60)
        return load(source, model_id)

    explorer = Explorer({"verdict": str(run)}, load_slowly)
    explorer.load_sources()

    async def ask() -> None:
        loading = asyncio.create_task(explorer.reload("verdict/best"))
        while not is_slow.is_set():
            await asyncio.sleep(0.001)
        async with explorer.use("verdict") as loaded:
            await loaded.next_tokens([1, 2], [2])
        assert len(await explorer.state()) == 5
        assert not loading.done()
        may_end.set()
        await loading

    asyncio.run(ask())
