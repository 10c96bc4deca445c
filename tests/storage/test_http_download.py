"""Download of one file: resumed, restarted, retried and verified."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faulty_host import FaultyHost, noise, visible
from gpt_lightning.storage import http_download
from gpt_lightning.storage.http_download import ExpectedFile, fetch


def quietly(name: str, result: int, size: int | None) -> None: ...


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


def test_a_response_that_is_too_long_is_refused(
    one: Callable[..., bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match="sends more than 90 bytes"):
        one("chunked", "chunked", expected=ExpectedFile(90))
    monkeypatch.setattr(http_download, "_MAX_BYTES", 5_000)
    with pytest.raises(OSError, match="sends more than 5,000 bytes"):
        one("chunked")
    assert not visible(tmp_path)


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
