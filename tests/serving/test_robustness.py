"""Clients that are killed, slow or random do not harm a server."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from servers import RunningServer, running_server

STATUSES = {200, 400, 404, 413}
QUIET = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def robust_server(source: Path) -> Iterator[RunningServer]:
    """A server whose standard error is checked at the end."""
    with running_server("serve", "--from", str(source)) as running:
        yield running
        assert running.stop() == (143, "")


@pytest.fixture(scope="module")
def http(robust_server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=robust_server.url, timeout=60) as client:
        yield client


def memory(server: RunningServer) -> int:
    """Resident bytes of the server's process."""
    return int(psutil.Process(server.process.pid).memory_info().rss)


def assert_works(http: httpx.Client) -> None:
    body = {"prompt": "Every effort", "max_tokens": 4, "temperature": 0}
    answer = http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 4)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(0, 60), st.floats(), st.floats(0, 1), st.text(max_size=20)
)  # fmt: skip
ANYTHING = st.recursive(
    SCALARS,
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=9), values, max_size=3),
    max_leaves=8,
)  # fmt: skip
TOKEN_IDS = st.lists(st.integers(0, 50256), min_size=1, max_size=60)
FIELDS = st.fixed_dictionaries(
    {"prompt": st.text(max_size=40) | TOKEN_IDS | st.lists(TOKEN_IDS | st.text(max_size=9), max_size=3) | ANYTHING},
    optional={
        "model": st.just("tiny") | ANYTHING,
        "max_tokens": st.integers(-1, 12) | ANYTHING,
        "temperature": st.floats(0, 2) | ANYTHING,
        "top_p": st.floats(0, 1) | ANYTHING,
        "n": st.integers(0, 4) | ANYTHING,
        "seed": st.integers(-(2**63), 2**63 - 1) | ANYTHING,
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=3) | ANYTHING,
        "logprobs": st.integers(-1, 6) | ANYTHING,
        "echo": st.booleans() | ANYTHING,
        "stream": st.booleans() | ANYTHING,
        "stream_options": st.just({"include_usage": True}) | ANYTHING,
        "best_of": ANYTHING,
        "logit_bias": ANYTHING,
        "suffix": ANYTHING,
        "user": ANYTHING,
    },
)  # fmt: skip
BODIES = st.one_of(FIELDS.map(json.dumps).map(str.encode), ANYTHING.map(json.dumps).map(str.encode), st.binary(max_size=60))  # fmt: skip


@pytest.mark.parametrize("count", [pytest.param(2_000, marks=pytest.mark.slow), pytest.param(10_000, marks=pytest.mark.nightly)])  # fmt: skip
def test_random_requests(robust_server: RunningServer, http: httpx.Client, count: int) -> None:
    statuses: list[int] = []
    sizes: list[int] = []

    @settings(QUIET, max_examples=count)
    @given(body=BODIES)
    def post(body: bytes) -> None:
        answer = http.post("/v1/completions", content=body)
        statuses.append(answer.status_code)
        assert answer.status_code in STATUSES, answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert "\n" not in error["message"]
        if len(statuses) % (count // 10) == 0:
            sizes.append(memory(robust_server))

    post()
    assert len(statuses) >= count
    assert statuses.count(200) > 0.03 * count
    # after the first three tenths the memory stays
    assert sizes[-1] - sizes[2] < 20 * 2**20, sizes
    assert_works(http)


def request_bytes(body: dict[str, Any], server: RunningServer) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


ENDLESS = {"prompt": ["a"] * 250, "max_tokens": 40, "temperature": 1}


def test_clients_that_go_away_free_their_rows(
    robust_server: RunningServer, http: httpx.Client
) -> None:
    for n in range(30):
        with socket.create_connection(("127.0.0.1", robust_server.port)) as connection:
            connection.sendall(request_bytes({**ENDLESS, "stream": n % 2 == 0}, robust_server))
            if n % 2 == 0:
                connection.recv(1)
    start = time.monotonic()
    assert_works(http)  # 30 requests of 250 texts would take minutes
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_half_requests_are_forgotten(
    robust_server: RunningServer, http: httpx.Client, share: float
) -> None:
    content = request_bytes({"prompt": "a" * 500}, robust_server)
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", robust_server.port)) as connection:
            connection.sendall(content[: int(share * len(content))])
    assert_works(http)
    idle = [socket.create_connection(("127.0.0.1", robust_server.port)) for _ in range(20)]
    try:
        for connection in idle:
            connection.sendall(content[: int(share * len(content))])
        assert_works(http)
    finally:
        for connection in idle:
            connection.close()


@pytest.mark.parametrize(
    "content",
    [b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 50, b"POST /v1/completions HTTP/1.1\r\n\r\n", b"a" * 100_000,
     b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n"],
    ids=range(6),
)  # fmt: skip
def test_what_is_not_http_is_refused(
    robust_server: RunningServer, http: httpx.Client, content: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", robust_server.port), timeout=10) as connection:
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(100)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.0 4"))
    assert_works(http)


@pytest.mark.slow
def test_readers_that_do_not_read_hold_no_row(
    robust_server: RunningServer, http: httpx.Client
) -> None:
    body = {"prompt": ["a"] * 16, "n": 16, "max_tokens": 40, "logprobs": 5, "stream": True}
    connections = [socket.create_connection(("127.0.0.1", robust_server.port)) for _ in range(3)]
    try:
        for connection in connections:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request_bytes(body, robust_server))
        assert_works(http)
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(lambda _: assert_works(http), range(16)):
                pass
    finally:
        for connection in connections:
            connection.close()
    assert_works(http)
