"""Downloads of GPT-2's files from hosts that break off, send wrong files, or cannot be reached."""

import base64
import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Command, Done, python
from filelock import FileLock

from gpt_lightning.data.tokenizer import vocabulary_file
from gpt_lightning.model.config import GPT2_SIZES
from gpt_lightning.pretrained import download as module
from gpt_lightning.pretrained import http_download
from gpt_lightning.pretrained.download import (
    HUB_FILES,
    OPENAI_FILES,
    ExpectedFile,
    download,
    download_folder,
    fetch,
    find_downloaded,
)

DATA = "model.ckpt.data-00000-of-00001"
POINTER = b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'

needs_hub = pytest.mark.skipif(
    find_spec("huggingface_hub") is None,
    reason="huggingface_hub is not installed: pip install '.[hub]'",
)


@dataclass
class FaultyHost:
    """A test server: its files, its faults, and the requests that it got."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)  # by path
    faults: dict[str, list[str]] = field(
        default_factory=dict
    )  # by path, one for each GET, then none
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    watched: Path | None = None  # must not exist while anything is sent
    errors: list[str] = field(default_factory=list)

    def ranges(self, path: str) -> list[str | None]:
        return [r for method, p, r in self.requests if (method, p) == ("GET", path)]


def batched(content: bytes, size: int = 1000) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


def handler(host: FaultyHost) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None: ...

        def do_HEAD(self) -> None:
            self.answer("", send=False)

        def do_GET(self) -> None:
            faults = host.faults.get(self.path, [])
            self.answer(faults.pop(0) if faults else "", send=True)

        def answer(self, fault: str, send: bool) -> None:
            host.requests.append((self.command, self.path, self.headers.get("Range")))
            body = host.files.get(self.path)
            if body is None or fault in ("404", "503"):
                self.send_response(503 if fault == "503" else 404)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if fault in ("html", "page"):
                body = b"\n<!DOCTYPE html><title>Sign in to the network</title>"
            start = 0
            if (byte_range := self.headers.get("Range")) and fault != "no range":
                start = int(byte_range.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            else:
                md5 = hashlib.md5(body).digest()
                self.send_header("Content-MD5", base64.b64encode(md5).decode())
            if fault == "html":
                self.send_header("Content-Type", "text/html; charset=utf-8")
            etag = "another" if fault == "another" else hashlib.sha256(body).hexdigest()
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            rest = body[start:]
            length = len(rest)
            match fault:
                case "cut":  # half of the file, then the connection ends
                    rest = rest[: length // 2]
                case "long":  # gives a size that is too large
                    length += 1000
                case "short":  # or too small
                    length -= 10
                case "flip":
                    rest = rest[:9] + bytes([rest[9] ^ 1]) + rest[10:]
            if fault == "chunked":
                self.send_header("Transfer-Encoding", "chunked")
                rest = b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in batched(rest)) + b"0\r\n\r\n"
                length = len(rest)
            elif fault != "no length":
                self.send_header("Content-Length", str(length))
            self.end_headers()
            if send:
                self.wfile.write(rest[:length])
                self.wfile.flush()
                if host.watched and host.watched.exists():
                    host.errors.append(f"{host.watched} exists before it is complete")
                if fault in ("cut", "long", "no length"):
                    self.close_connection = True
                    with suppress(OSError):  # the client was faster
                        self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


@pytest.fixture
def host() -> Iterator[FaultyHost]:
    host = FaultyHost()

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            error = sys.exception()
            if not isinstance(error, ConnectionError):  # a client may hang up
                host.errors.append(repr(error))

    server = Server(("127.0.0.1", 0), handler(host))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    host.url = f"http://127.0.0.1:{server.server_port}"
    yield host
    server.shutdown()
    thread.join()
    server.server_close()
    assert host.errors == []


@pytest.fixture
def nowhere() -> str:
    """An address that refuses every connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nowhere: str) -> Path:
    """The cache of a test. No test asks a real host."""
    monkeypatch.setenv("GPT_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_OPENAI", (nowhere,))
    if find_spec("huggingface_hub") is not None:
        import huggingface_hub.constants

        template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", nowhere)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return tmp_path / "cache"


def noise(size: int) -> bytes:
    return b"".join(hashlib.sha256(i.to_bytes(4)).digest() for i in range(size // 32 + 1))[:size]


def openai_files(size: str) -> dict[str, bytes]:
    """Files that are as small as possible, except the two whose checksums are known."""
    files = {
        name: f"{size} {name} ".encode() * 20
        for name in ("hparams.json", DATA, "model.ckpt.index", "model.ckpt.meta")
    }
    files["checkpoint"] = POINTER
    files["hparams.json"] = b'{"n_layer": 12}'
    for name in ("encoder.json", "vocab.bpe"):
        files[name] = Path(vocabulary_file(name)).read_bytes()
    return files


def serve_openai(host: FaultyHost, name: str) -> dict[str, bytes]:
    size = name.removeprefix("gpt2-")
    files = openai_files(size)
    host.files |= {f"/{size}/{file}": body for file, body in files.items()}
    return files


def serve_hub(host: FaultyHost, name: str, weights: bytes) -> tuple[str, str]:
    """Let ``host`` have the two files of the hub, and return their paths."""
    repository, revision, _ = module._HUB[name]
    config, model = (f"/{repository}/resolve/{revision}/{file}" for file in HUB_FILES)
    host.files |= {config: b'{"n_layer": 12}', model: weights}
    return config, model


def refused(done: Done, *parts: str) -> None:
    assert done.code == 2, done.err
    assert done.out == ""
    assert done.err.startswith("gpt_lightning: error: ")
    assert done.err.count("\n") == 1, done.err
    for part in parts:
        assert part in done.err


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def quietly(name: str, done: int, size: int | None) -> None: ...


# --- one file -------------------------------------------------------------------------------------


@pytest.fixture
def one(host: FaultyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """A function that downloads ``/a`` from the host, or else from the other ``urls``."""
    monkeypatch.setattr(http_download, "_CHUNK_BYTES", 1000)
    host.files["/a"] = noise(200_000)

    def run(
        *faults: str, expected: ExpectedFile | None = None, urls: tuple[str, ...] = ()
    ) -> bytes:
        host.faults["/a"] = list(faults)
        host.watched = tmp_path / "a"
        host.watched.unlink(missing_ok=True)
        expected = expected or ExpectedFile()
        fetch([f"{host.url}/a", *urls], tmp_path / "a", expected, quietly, pause=0.0)
        assert {path.name for path in tmp_path.iterdir()} == {"a"}
        return (tmp_path / "a").read_bytes()

    return run


def test_interrupted_download_resumes(one: Callable[..., bytes], host: FaultyHost) -> None:
    assert one("cut", "cut", "cut", "cut", "cut") == host.files["/a"]
    first, *rest = host.ranges("/a")
    assert first is None
    starts = [int(r.removeprefix("bytes=").removesuffix("-")) for r in rest if r]
    assert len(starts) == 5
    assert starts == sorted(set(starts))  # five breaks, more than the attempts without a byte
    assert starts[0] >= 100_000


def test_interrupted_download_resumes_in_a_later_run(
    one: Callable[..., bytes], host: FaultyHost, tmp_path: Path
) -> None:
    with pytest.raises(OSError, match=r"127\.0\.0\.1:\d+: 503 Service Unavailable"):
        one("cut", "503", "503", "503")
    assert not visible(tmp_path)
    assert (tmp_path / ".a.part").stat().st_size > 0
    host.requests.clear()
    assert one() == host.files["/a"]
    (byte_range,) = host.ranges("/a")
    assert byte_range is not None
    assert byte_range.startswith("bytes=")


def test_download_restarts_if_the_host_cannot_resume(
    one: Callable[..., bytes], host: FaultyHost
) -> None:
    assert one("cut", "no range") == host.files["/a"]
    assert len(host.ranges("/a")) == 2


def test_another_file_is_not_appended_to_the_first_half(
    one: Callable[..., bytes], host: FaultyHost
) -> None:
    assert one("cut", "another") == host.files["/a"]
    assert host.ranges("/a")[2] is None


def test_another_hosts_file_is_not_appended_to_the_first_half(
    one: Callable[..., bytes], host: FaultyHost
) -> None:
    host.files["/b"] = noise(100_000)[::-1]
    found = one("cut", "404", urls=(f"{host.url}/b",))
    assert found == host.files["/b"]
    assert host.ranges("/b") == [None]


@pytest.mark.parametrize("fault", ["404", "503", "html", "page", "flip", "long", "no length"])
def test_the_next_host_is_tried(one: Callable[..., bytes], host: FaultyHost, fault: str) -> None:
    host.files["/b"] = host.files["/a"]
    assert one(*[fault] * 9, urls=(f"{host.url}/b",)) == host.files["/b"]
    assert len(host.ranges("/a")) <= 5


def test_two_processes_do_not_download_into_one_folder(host: FaultyHost, tmp_path: Path) -> None:
    serve_openai(host, "gpt2-774M")
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(OSError, match="another process is downloading"),
    ):
        download("gpt2-774M", "openai", folder=tmp_path, mirror=host.url, pause=0.0)
    download("gpt2-774M", "openai", folder=tmp_path, mirror=host.url, pause=0.0)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".lock")]


def test_a_response_that_is_too_long_is_refused(
    one: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="sends more than 90 bytes"):
        one("chunked", "chunked", expected=ExpectedFile(90))
    monkeypatch.setattr(http_download, "_MAX_BYTES", 5_000)
    with pytest.raises(OSError, match="sends more than 5,000 bytes"):
        one("chunked")
    assert not visible(tmp_path)


def test_a_truncated_file_from_the_user_is_downloaded(host: FaultyHost) -> None:
    weights = safetensors.torch.save({"a": torch.ones(100)})
    serve_hub(host, "gpt2-774M", weights)
    folder = download_folder("gpt2-774M", "hub")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(weights[:-7])
    (folder / "config.json").write_bytes(b"{")
    damaged: list[str] = []
    download("gpt2-774M", mirror=host.url, pause=0.0, on_damage=lambda p: damaged.append(p.name))
    assert damaged == ["config.json", "model.safetensors"]
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_503_is_retried(one: Callable[..., bytes], host: FaultyHost) -> None:
    assert one("503", "503") == host.files["/a"]


def test_a_file_with_a_wrong_checksum_is_downloaded_again(
    one: Callable[..., bytes], host: FaultyHost
) -> None:
    assert one("flip", "short") == host.files["/a"]  # found by Content-MD5


@pytest.mark.parametrize(
    ("faults", "expected", "cause"),
    [
        (["404"], ExpectedFile(), "404 Not Found"),
        (["503"] * 3, ExpectedFile(), "503 Service Unavailable"),
        (["html"], ExpectedFile(), "answers with a web page"),
        (["page"], ExpectedFile(), "answers with a web page"),
        (["flip"] * 3, ExpectedFile(), "does not match its checksum md5:"),
        (["short"] * 9, ExpectedFile(), "does not match its checksum md5:"),
        (["long"] * 9, ExpectedFile(), "no more bytes|IncompleteRead|broke off"),
        (["no length"], ExpectedFile(), "does not give the file's size"),
        ([], ExpectedFile(199_999), "has a file of 200,000 bytes, not 199,999"),
        ([], ExpectedFile(None, "sha256:" + "0" * 64), "does not match its checksum sha256:0000"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and value else "",
)
def test_a_wrong_file_is_refused(
    one: Callable[..., bytes], tmp_path: Path, faults: list[str], expected: ExpectedFile, cause: str
) -> None:
    with pytest.raises(OSError, match=cause):
        one(*faults, expected=expected)
    assert not visible(tmp_path)


def test_a_file_that_the_disk_cannot_hold_is_refused(
    one: Callable[..., bytes], host: FaultyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = http_download.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(http_download.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with pytest.raises(OSError, match="needs 200,000 bytes, the disk has 100,000 left"):
        one()
    assert len(host.ranges("/a")) == 1


def test_a_disk_that_fills_up_ends_the_download(
    one: Callable[..., bytes], host: FaultyHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        one()
    assert not visible(tmp_path)
    assert len(host.ranges("/a")) == 1  # a full disk is not retried


# --- a size's files -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2-774M", "gpt2-1558M"])
def test_openai_files(command: Command, host: FaultyHost, name: str) -> None:
    files = serve_openai(host, name)
    done = command("download", name, "--host=openai", f"--mirror={host.url}/", "--json")
    assert done.code == 0, done.err
    folder = download_folder(name, "openai")
    assert json.loads(done.out) == {
        "name": name,
        "folder": str(folder),
        "files": {n: (folder / n).stat().st_size for n in [*OPENAI_FILES, "manifest.json"]},
    }
    assert {n: (folder / n).read_bytes() for n in OPENAI_FILES} == files
    assert find_downloaded(name) == folder


@pytest.mark.parametrize("name", ["gpt2-124M", "gpt2-355M"])
def test_openai_files_of_a_wrong_size_are_refused(
    command: Command, host: FaultyHost, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is verified before the download."""
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    serve_openai(host, name)
    done = command("download", name, "--host=openai", f"--mirror={host.url}")
    refused(
        done,
        "hparams.json of",
        "has a file of ",
        " bytes, not 9",
        str(download_folder(name, "openai")),
    )
    assert "hparams.json" not in visible(download_folder(name, "openai"))


def test_a_file_from_the_user_is_verified_against_the_known_checksum(
    host: FaultyHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = serve_openai(host, "gpt2-124M")
    monkeypatch.setattr(module, "_EXPECTED_BY_SIZE", {})
    md5 = hashlib.md5(files[DATA]).hexdigest()
    expected = {DATA: ExpectedFile(len(files[DATA]), f"md5:{md5}")}
    monkeypatch.setattr(module, "_EXPECTED_BY_SIZE", {"gpt2-124M": expected})
    download("gpt2-124M", "openai", mirror=host.url, pause=0.0)
    host.requests.clear()
    # without a manifest, the known checksum counts
    folder = download_folder("gpt2-124M", "openai")
    (folder / "manifest.json").unlink()
    (folder / DATA).write_bytes(files[DATA][:-1] + b"?")
    download("gpt2-124M", "openai", mirror=host.url, pause=0.0)
    assert host.requests == [("GET", f"/124M/{DATA}", None)]
    assert (folder / DATA).read_bytes() == files[DATA]


def test_second_run_downloads_missing_and_damaged_files(command: Command, host: FaultyHost) -> None:
    files = serve_openai(host, "gpt2-774M")
    arguments = ("download", "gpt2-774M", "--host=openai", f"--mirror={host.url}")
    assert command(*arguments).code == 0
    folder = download_folder("gpt2-774M", "openai")
    manifest = (folder / "manifest.json").read_bytes()
    host.requests.clear()
    done = command(*arguments)
    assert (done.code, done.out, done.err) == (0, f"{folder}\n", "")
    assert host.requests == []

    flipped = bytearray(files["model.ckpt.meta"])
    flipped[5] ^= 1
    (folder / "model.ckpt.meta").write_bytes(flipped)
    (folder / "hparams.json").unlink()
    done = command(*arguments)
    assert done.code == 0, done.err
    assert done.err == f"{folder / 'model.ckpt.meta'}: is damaged; downloading it again\n"
    assert [path for _, path, _ in host.requests] == ["/774M/hparams.json", "/774M/model.ckpt.meta"]
    assert {n: (folder / n).read_bytes() for n in OPENAI_FILES} == files
    assert (folder / "manifest.json").read_bytes() == manifest


def test_manifest_keeps_the_checksum_of_a_damaged_file(host: FaultyHost, nowhere: str) -> None:
    serve_openai(host, "gpt2-774M")
    folder = download("gpt2-774M", "openai", mirror=host.url)
    manifest = (folder / "manifest.json").read_bytes()
    (folder / DATA).write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(OSError, match=f"{DATA} of gpt2-774M cannot be downloaded"):
            download("gpt2-774M", "openai", mirror=nowhere, pause=0.0)
    assert (folder / "manifest.json").read_bytes() == manifest


def test_manifest_has_the_files_before_a_failure(host: FaultyHost) -> None:
    serve_openai(host, "gpt2-774M")
    del host.files[f"/774M/{DATA}"]
    with pytest.raises(OSError, match="404 Not Found"):
        download("gpt2-774M", "openai", mirror=host.url, pause=0.0)
    folder = download_folder("gpt2-774M", "openai")
    recorded = json.loads((folder / "manifest.json").read_text())["files"].keys()
    assert recorded == {"checkpoint", "encoder.json", "hparams.json"}
    with pytest.raises(FileNotFoundError, match="download gpt2-774M"):
        find_downloaded("gpt2-774M")


@needs_hub
def test_hub_files(command: Command, host: FaultyHost, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = noise(100_000)
    config, model = serve_hub(host, "gpt2-355M", weights)
    host.faults[model] = ["cut"]
    folder = download_folder("gpt2-355M", "hub")
    host.watched = folder / "model.safetensors"
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    done = command("download", "gpt2-355M", f"--mirror={host.url}")
    assert (done.code, done.out, done.err) == (0, f"{folder}\n", "")
    assert {path.name for path in folder.iterdir()} == {*HUB_FILES, "manifest.json"}
    assert (folder / "model.safetensors").read_bytes() == weights
    assert (folder / "config.json").read_bytes() == host.files[config]
    assert host.ranges(model) == [None, "bytes=50000-"]
    assert find_downloaded("gpt2-355M") == folder

    host.requests.clear()
    assert command("download", "gpt2-355M").code == 0
    assert host.requests == []


@needs_hub
def test_hub_download_reports_progress(host: FaultyHost) -> None:
    _, model = serve_hub(host, "gpt2-774M", noise(100_000))
    host.faults[model] = ["503", "flip"]  # found by the ETag
    progress: list[tuple[str, int, int | None]] = []
    folder = download(
        "gpt2-774M", mirror=host.url, on_bytes=lambda *args: progress.append(args), pause=0.0
    )
    assert progress[-1] == ("model.safetensors", 100_000, 100_000)
    assert (folder / "model.safetensors").read_bytes() == noise(100_000)


@needs_hub
@pytest.mark.parametrize(
    ("faults", "cause"),
    [
        (["404"], "404"),
        (["503"] * 9, "503"),
        (["html"] * 9, "should be of size"),
        (["flip"] * 9, "does not match its checksum sha256:"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_hub_file_that_is_wrong_is_refused(
    host: FaultyHost, faults: list[str], cause: str, nowhere: str
) -> None:
    _, model = serve_hub(host, "gpt2-774M", noise(10_000))
    host.faults[model] = faults
    with pytest.raises(OSError, match=cause) as caught:
        download("gpt2-774M", mirror=host.url, pause=0.0)
    assert nowhere.removeprefix("http://") in str(caught.value)  # the hub itself was tried next
    assert visible(download_folder("gpt2-774M", "hub")) == {"config.json", "manifest.json"}


@needs_hub
@pytest.mark.parametrize("name", ["gpt2-124M", "gpt2-1558M"])
def test_hub_files_are_verified_against_known_checksums(host: FaultyHost, name: str) -> None:
    serve_hub(host, name, noise(10_000))
    with pytest.raises(OSError, match=r"548,105,171|does not match its checksum sha256:0f8b28eb"):
        download(name, mirror=host.url, pause=0.0)
    assert "model.safetensors" not in visible(download_folder(name, "hub"))


@needs_hub
def test_a_web_page_is_refused_as_config(host: FaultyHost) -> None:
    config, _ = serve_hub(host, "gpt2-774M", noise(100))
    host.files[config] = b"<html>sign in</html>"
    with pytest.raises(OSError, match=r"config\.json of gpt2-774M .* a web page"):
        download("gpt2-774M", mirror=host.url, pause=0.0)


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["openai", pytest.param("hub", marks=needs_hub)])
@pytest.mark.parametrize("name", GPT2_SIZES)
def test_without_network_the_error_names_files_and_folder(
    command: Command, name: str, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    files = HUB_FILES if source == "hub" else OPENAI_FILES
    done = command("download", name, f"--host={source}")
    folder = download_folder(name, "hub" if source == "hub" else "openai")
    refused(
        done, f"of {name} cannot be downloaded", "refused", f"put {', '.join(files)} into {folder}"
    )
    assert not folder.exists()


def test_without_huggingface_hub(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    refused(command("download", "gpt2-124M"), "gpt-lightning[hub]", "--host openai")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("124M", "did you mean gpt2-124M?"),
        ("gpt2-1.5B", "did you mean gpt2-1558M?"),
        ("gpt2-meduim", "did you mean gpt2-medium?"),
        ("llama", "give one of gpt2-124M, gpt2-355M, gpt2-774M, gpt2-1558M"),
    ],
)
def test_unknown_size_is_refused(command: Command, tmp_path: Path, name: str, near: str) -> None:
    refused(command("download", name), f"{name}: is not a size of GPT-2", near)
    assert os.listdir(tmp_path) == []


def test_unknown_host_is_refused(command: Command) -> None:
    refused(command("download", "gpt2-124M", "--host=torrent"), "host", "torrent")


def test_out_is_the_folder_of_the_files(command: Command, host: FaultyHost, tmp_path: Path) -> None:
    files = serve_openai(host, "gpt2-774M")
    done = command("download", "gpt2-774M", "--host=openai", f"--mirror={host.url}", "--out=x")
    assert (done.code, done.out) == (0, "x\n"), done.err
    assert visible(tmp_path / "x") == {*files, "manifest.json"}
    assert not (tmp_path / "cache").exists()


def test_source_that_is_not_downloaded_names_the_command(command: Command) -> None:
    done = command("generate", "--from=gpt2-355M", "--prompt=a")
    refused(done, "gpt_lightning download gpt2-355M", str(download_folder("gpt2-355M", "hub")))
    assert "config.json and model.safetensors" in done.err


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("gpt2", "gpt2-124M"),
        ("gpt2-small", "gpt2-124M"),
        ("openai-community/gpt2", "gpt2-124M"),
        ("gpt2-medium", "gpt2-355M"),
        ("gpt2-large", "gpt2-774M"),
        ("gpt2-xl", "gpt2-1558M"),
    ],
)
def test_alias_of_a_size_works_everywhere(
    command: Command, name: str, size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(http_download.time, "sleep", lambda _: None)
    refused(command("download", name, "--host=openai"), f"of {size} cannot be downloaded")
    for arguments in (
        ["generate", f"--from={name}", "--prompt=a"],
        ["validate", f"--init_from={name}"],
        ["convert", name, "x.ckpt", "--format=lightning"],
        ["report", "sizes", "--from", name, "--prompt=a"],
    ):
        refused(command(*arguments), f"run python -m gpt_lightning download {size}")
    width = GPT2_SIZES[size].emb_dim
    done = command("plan", f"--init_from={name}", "--data.text=sample", "--model.config.emb_dim=8")
    refused(done, f"model.config.emb_dim is {width} there and 8 here")
    # a folder or file with that name has priority
    (tmp_path / name).mkdir(parents=True)
    refused(command("generate", f"--from={name}", "--prompt=a"), f"or {size} for the downloaded")
    (tmp_path / name).rmdir()
    (tmp_path / f"{name}.ckpt").write_bytes(b"")
    refused(
        command("generate", f"--from={name}", "--prompt=a"),
        f"{name}.ckpt: is not a torch.save file",
    )


def test_help_imports_neither_torch_nor_lightning() -> None:
    code = "from gpt_lightning.cli.main import main\ntry: main(['download', '--help'])\nexcept SystemExit: pass"
    done = python("-c", f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))")
    assert "--mirror" in done.stdout
    loaded = set(done.stderr.split())
    assert not {"torch", "lightning", "tensorflow", "requests", "huggingface_hub"} & loaded
    done = python(
        "-c",
        "import sys, gpt_lightning.pretrained.download; sys.stderr.write(' '.join(sys.modules))",
    )
    assert not {"torch", "lightning", "tensorflow"} & set(done.stderr.split())
