"""A server for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from servers import RunningServer, running_server, write_tiny_model


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="session")
def server(source: Path) -> Iterator[RunningServer]:
    """``serve`` with a tiny model."""
    with running_server("serve", "--from", str(source)) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    """OpenAI's client, without retries: an error is to be seen."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        yield client
