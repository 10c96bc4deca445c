"""``explore`` as a command: the page, its back end and the endpoint at one address."""

import re
from pathlib import Path

import httpx
import pytest

from helpers import Command, assert_refused, python
from servers import running_server, write_tiny_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("explored") / "tiny")


def test_one_address_has_page_back_end_and_endpoint(source: Path) -> None:
    with running_server("explore", "--from", str(source)) as server:
        assert server.ready_line == f"{server.url}/ shows tiny; Ctrl-C stops it\n"
        with httpx.Client(base_url=server.url) as client:
            page = client.get("/")
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            files = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
            assert len(files) >= 3
            for file in files:
                answer = client.get(file)
                assert answer.status_code == 200, file
                assert answer.headers["x-content-type-options"] == "nosniff"
            (model,) = client.get("/api/state").json()["models"]
            assert model["id"] == "tiny"
            body = {"prompt": "a", "max_tokens": 2}
            assert client.post("/v1/completions", json=body).status_code == 200
            for other in (
                "/page/",
                "/page/../api.py",
                "/page/%2e%2e/api.py",
                "/page/nothing.js",
                "/etc/passwd",
            ):
                assert client.get(other).status_code == 404
        assert server.stop() == (143, "")


def test_page_asks_for_the_token_and_all_else_needs_it(source: Path) -> None:
    arguments = ["--from", str(source), "--host", "0.0.0.0"]
    with running_server("explore", *arguments, GPT_LIGHTNING_TOKEN="secret") as server:
        url = f"http://127.0.0.1:{server.port}"
        assert httpx.get(f"{url}/").status_code == 200
        assert httpx.get(f"{url}/page/app.js").status_code == 200
        for path in ("/api/state", "/v1/models"):
            assert httpx.get(url + path).status_code == 401
            right = {"Authorization": "Bearer secret"}
            assert httpx.get(url + path, headers=right).status_code == 200


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "from: is missing"),
        (["--from", "nowhere"], "nowhere: does not exist"),
        (["--from", "{source}", "nowhere"], "nowhere: does not exist"),
        (["--from", "{file}"], "note.txt"),
        (["--from", "{source}", "--port", "70000"], "port: 70000"),
        (["--from", "{source}", "--host", "0.0.0.0"], "host: "),
    ],
)
def test_mistake_is_one_line(
    command: Command, source: Path, tmp_path: Path, arguments: list[str], part: str
) -> None:
    (tmp_path / "note.txt").write_text("no weights", encoding="utf-8")
    names = {"source": source, "file": tmp_path / "note.txt"}
    assert_refused(command("explore", *(a.format(**names) for a in arguments)), part)


def test_explore_does_not_import_lightning() -> None:
    code = (
        "import sys; import gpt_lightning.cli.explore, gpt_lightning.exploring.api; "
        "print([n for n in sys.modules if n.split('.')[0] in ('lightning', 'pytorch_lightning')])"
    )
    result = python("-c", code)
    assert result.stdout.strip() == "[]", result.stderr
