"""Who may use a server: hosts, origins, tokens, sizes."""

import socket
from pathlib import Path

import httpx
import pytest

from gpt_lightning.serving.access import MAX_BODY, access_rules, read_token
from servers import RunningServer, running_server

BODY = {"prompt": "a", "max_tokens": 1}


def status(server: RunningServer, **headers: str) -> int:
    answer = httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}", "127.0.0.1", "127.1.2.3"]
)  # fmt: skip
def test_own_names_are_allowed(server: RunningServer, host: str) -> None:
    assert status(server, Host=host.format(port=server.port)) == 200


@pytest.mark.parametrize(
    "host",
    ["attacker.example", "attacker.example:{port}", "127.0.0.1.attacker.example", "localhost.attacker.example:{port}",
     "192.168.1.7:{port}", "0.0.0.0:{port}", "", "[::1", "user@localhost@evil.example"],
)  # fmt: skip
def test_other_names_are_refused(server: RunningServer, host: str) -> None:
    assert status(server, Host=host.format(port=server.port)) == 403


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/", "/nothing"])
def test_pages_of_other_sites_are_refused(server: RunningServer, path: str) -> None:
    own = {"Origin": server.url}
    assert httpx.get(server.url + path, headers=own).status_code in (200, 404, 405)
    for origin in (
        "https://attacker.example",
        "null",
        f"https://127.0.0.1:{server.port}",
        "http://127.0.0.1:1",
    ):
        assert httpx.get(server.url + path, headers={"Origin": origin}).status_code == 403


def test_answers_have_headers_that_keep_browsers_safe(server: RunningServer) -> None:
    for path in ("/v1/models", "/nothing"):
        headers = httpx.get(server.url + path).headers
        assert headers["content-security-policy"].startswith(
            "default-src 'none'; script-src 'self';"
        )
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    refused = httpx.get(f"{server.url}/v1/models", headers={"Host": "attacker.example"})
    assert "content-security-policy" in refused.headers


def test_authorization_is_ignored_without_a_token(server: RunningServer) -> None:
    assert status(server, Authorization="Bearer anything") == 200


@pytest.mark.parametrize("is_chunked", [False, True])
def test_body_has_a_limit(server: RunningServer, is_chunked: bool) -> None:
    body = b'{"prompt": "' + b"a" * MAX_BODY + b'"}'
    content = iter([body[:5000], body[5000:]]) if is_chunked else body
    with httpx.Client() as client:
        try:
            answer = client.post(f"{server.url}/v1/completions", content=content)
        except httpx.WriteError:  # the server answered before it had everything
            return
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_server_for_other_machines_needs_its_token(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret-of-the-file\n", encoding="utf-8")
    arguments = ["--from", str(source), "--host", "0.0.0.0", "--token_file", str(file)]
    with running_server("serve", *arguments, GPT_LIGHTNING_TOKEN="of-the-environment") as server:
        url = f"http://127.0.0.1:{server.port}/v1/models"
        assert "s3cret" not in server.ready_line
        for given in (None, "Bearer", "Bearer wrong", "Basic s3cret-of-the-file", "s3cret-of-the-file",
                      "Bearer of-the-environment", "Bearer s3cret-of-the-filé"):  # fmt: skip
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            answer = httpx.get(url, headers=headers)
            assert answer.status_code == 401, given
            assert answer.headers["www-authenticate"] == "Bearer"
        right = {"Authorization": "Bearer s3cret-of-the-file"}
        for host in ("127.0.0.1", "192.168.1.7", socket.gethostname()):
            assert httpx.get(url, headers=right | {"Host": host}).status_code == 200
        assert httpx.get(url, headers=right | {"Host": "attacker.example"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "myhost.example"])
def test_other_hosts_without_a_token_are_refused(host: str) -> None:
    with pytest.raises(ValueError, match=r"^host: other machines reach"):
        access_rules(host, None)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_loopback_needs_no_token(host: str) -> None:
    assert access_rules(host, None).is_loopback


@pytest.mark.parametrize("content", ["", " \n", "two words", "tökens", "a\x00b"])
def test_damaged_token_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r"^token_file: "):
        read_token(None, content.encode())
    with pytest.raises(ValueError, match=r"^GPT_LIGHTNING_TOKEN: "):
        read_token(content, None)


def test_file_has_priority_over_the_environment() -> None:
    assert read_token("one", b" two\n") == "two"
    assert read_token("one", None) == "one"
    assert read_token(None, None) is None
