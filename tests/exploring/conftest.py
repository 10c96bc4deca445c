"""Fixtures of the tests of exploring."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from gpt_lightning import GPTModel
from gpt_lightning.exploring.api import routes
from gpt_lightning.exploring.explorer import Explorer, LoadModel
from gpt_lightning.pretrained.convert import save_model
from gpt_lightning.serving.model_thread import ModelThread
from gpt_lightning.serving.served_model import LoadSettings, load_served_model
from gpt_lightning.serving.worker import WorkerLimits
from helpers import tiny_gpt2_vocabulary


@pytest.fixture(scope="session")
def tiny() -> GPTModel:
    """A tiny model with GPT-2's vocabulary, 24 positions, 2 heads and 2 blocks."""
    return tiny_gpt2_vocabulary()


@pytest.fixture(scope="session")
def tiny_file(tiny: GPTModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.ckpt"
    save_model(tiny, path, "lightning")
    return path


@pytest.fixture(scope="module")
def thread() -> Iterator[ModelThread]:
    thread = ModelThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def load(thread: ModelThread) -> LoadModel:
    """Loads a model for a server."""
    return lambda source, model_id: load_served_model(
        source, model_id, LoadSettings(), thread, WorkerLimits()
    )


Post = Callable[..., Any]


@pytest.fixture(scope="module")
def explorer(tiny_file: Path, load: LoadModel) -> Explorer:
    explorer = Explorer({"tiny": str(tiny_file)}, load)
    explorer.load_sources()
    return explorer


@pytest.fixture(scope="module")
def client(explorer: Explorer) -> Iterator[TestClient]:
    with TestClient(Starlette(routes=routes(explorer))) as client:
        yield client


@pytest.fixture(scope="module")
def post(client: TestClient) -> Post:
    """``post(NAME, FIELD=…)``: the answer of ``/api/NAME`` for the model ``tiny``, which must be a success."""

    def post(name: str, **fields: Any) -> Any:
        response = client.post(f"/api/{name}", json={"model": "tiny", **fields})
        assert response.status_code == 200, response.text[:500]
        if response.headers["content-type"].startswith("text/event-stream"):
            events = response.text.removesuffix("\n\n").split("\n\n")
            return [json.loads(event.removeprefix("data: ")) for event in events]
        return response.json()

    return post
