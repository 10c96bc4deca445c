"""``serve`` as a command: its start, its stop, its errors."""

import json
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import Command, assert_refused, python
from servers import running_server


def test_ready_line_has_the_address_and_the_models(source: Path) -> None:
    arguments = [
        "--from",
        str(source),
        str(source / "."),
        f"{source.parent}/../{source.parent.name}/{source.name}",
    ]
    with running_server("serve", *arguments) as server:
        assert server.ready_line == (
            f"http://127.0.0.1:{server.port}/v1 serves tiny, tiny-2, tiny-3; Ctrl-C stops it\n"
        )
        models = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["tiny", "tiny-2", "tiny-3"]
        assert server.stop() == (143, "")


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_stop_lets_running_requests_end(source: Path, signum: int, code: int) -> None:
    answers: list[Any] = []
    with running_server("serve", "--from", str(source)) as server:
        body = {"prompt": ["a"] * 200, "max_tokens": 40, "temperature": 0, "n": 1}

        def post() -> None:
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=60))

        thread = threading.Thread(target=post)
        thread.start()
        time.sleep(0.5)
        assert not answers
        assert server.stop(signum) == (code, "")
        thread.join()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/v1/models")
    (answer,) = answers
    assert answer.status_code == 200
    assert len(answer.json()["choices"]) == 200


def test_second_signal_ends_at_once_and_in_one_line(source: Path) -> None:
    with running_server("serve", "--from", str(source)) as server:
        body = json.dumps({"prompt": ["a"] * 256, "max_tokens": 40, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port)) as reader:
            reader.sendall(head.encode() + body)
            reader.recv(1)  # and no more
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            code, err = server.stop(signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err


def test_port_in_use_is_named(command: Command, source: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = command("serve", "--from", str(source), "--port", str(port))
    other_port = port + 1 if port < 65535 else port - 1
    assert_refused(result, f"port: {port} is in use", f"--port {other_port}", "--port 0")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["from: is missing"]),
        (["--from", "nowhere"], ["nowhere: does not exist"]),
        (["--from", "{source}", "--port", "70000"], ["port: 70000"]),
        (["--from", "{source}", "--port", "-1"], ["port: -1"]),
        (["--from", "{source}", "--port", "web"], ["port"]),
        (["--from", "{source}", "--host", "0.0.0.0"], ["host: ", "GPT_LIGHTNING_TOKEN", "--token_file"]),
        (["--from", "{source}", "--host", "203.0.113.7", "--token_file", "{token}"], ["host: cannot listen"]),
        (["--from", "{source}", "--host", "no.such.host.invalid", "--token_file", "{token}"], ["host: no.such.host.invalid is not known"]),
        (["--from", "{source}", "--token_file", "nowhere"], ["nowhere"]),
        (["--from", "{source}", "--token_file", "{source}"], ["tiny"]),
        (["--from", "{source}", "--token_file", "{binary}"], ["token_file"]),
        (["--from", "{source}", "--max_batch", "0"], ["max_batch: 0"]),
        (["--from", "{source}", "--timeout", "-1"], ["timeout: -1"]),
        (["--from", "{source}", "--device", "tpu"], ["device: tpu"]),
        (["--from", "{source}", "--token", "secret"], ["token"]),
    ],
)  # fmt: skip
def test_wrong_option_is_one_line(
    command: Command, source: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "token").write_text("abc", encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    names = {"source": source, "token": tmp_path / "token", "binary": tmp_path / "binary"}
    assert_refused(command("serve", *(a.format(**names) for a in arguments)), *parts)


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "pydantic"])
def test_missing_package_is_named(
    command: Command, source: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    for name in list(sys.modules):
        if name.startswith("gpt_lightning.serving"):
            monkeypatch.delitem(sys.modules, name)
        elif name.partition(".")[0] == package:
            monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    result = command("serve", "--from", str(source))
    assert_refused(result, f"serve: needs the package {package}", "gpt-lightning[explore]")


def test_server_does_not_import_lightning() -> None:
    code = (
        "import sys; import gpt_lightning.cli.serve, gpt_lightning.serving.endpoint, gpt_lightning.serving.server; "
        "print([n for n in sys.modules if 'lightning' in n.split('.')[0] and not n.startswith('gpt_lightning')])"
    )
    result = python("-c", code)
    assert result.stdout.strip() == "[]", result.stderr


def test_help_lists_the_options(command: Command) -> None:
    text = command("serve", "--help").out
    assert all(
        re.search(rf"--{name}\b", text) for name in ("port", "host", "token_file", "max_batch")
    )
