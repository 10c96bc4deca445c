"""Download of one file over HTTP: resumed after an interruption, also in a later run; verified; complete or absent."""

import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

from gpt_lightning.storage.atomic import move_into_place

# called with a file's name, its bytes so far, and its total bytes or None
OnBytes = Callable[[str, int, int | None], None]

ATTEMPTS = 3  # at each host, in a row without progress
_TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
_CHUNK_BYTES = 1 << 18  # a chunk that is cut off is discarded
NOT_AVAILABLE_STATUS = (401, 403, 404, 410)
_MAX_BYTES = 10_000_000_000  # of a file of unknown size; the largest has 6.4 GB
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml")


class ExpectedFile(NamedTuple):
    """What is known about a file before its download. The checksum is 'md5:…' or 'sha256:…'."""

    size: int | None = None
    checksum: str | None = None


class NotAvailableError(requests.RequestException):
    """The host does not have the file; another attempt is useless."""


def fetch(
    urls: Sequence[str], path: Path, expected: ExpectedFile, on_bytes: OnBytes, pause: float = 1.0
) -> None:
    """Download the file from the first of ``urls`` that delivers it completely.

    A URL gets :data:`ATTEMPTS` attempts without progress. An incomplete file stays for a later run.

    Args:
        pause: Seconds before the second attempt; twice as long before the third.

    Raises:
        OSError: No URL delivers the file, with the cause for each; or the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    causes = []
    for url in urls:
        max_size, failures = 0, 0
        while failures < ATTEMPTS:
            try:
                host_checksum = _fetch_once(url, part, expected, on_bytes)
                verify(part, expected, host_checksum)
                move_into_place(part, path)
                _origin_file(part).unlink(missing_ok=True)
                return
            except requests.RequestException as error:
                last = error
            size = part.stat().st_size if part.exists() else 0
            if not size:
                _origin_file(part).unlink(missing_ok=True)
            failures = 0 if size > max_size else failures + 1
            max_size = max(max_size, size)
            if isinstance(last, NotAvailableError):
                break
            if failures < ATTEMPTS:
                time.sleep(pause * 2 ** max(failures - 1, 0))
        causes.append(f"{urlsplit(url).netloc}: {root_cause(last)}")
    raise OSError(", ".join(causes)) from last


def _origin_file(part: Path) -> Path:
    """The file with the origin of ``part``: only the rest of the same file may be appended to it."""
    return part.with_suffix(".origin")


def _fetch_once(url: str, part: Path, expected: ExpectedFile, on_bytes: OnBytes) -> str | None:
    """Resume ``part``, or start it. Returns the checksum that the host gives for the file, or ``None``."""
    origin = _read_origin(url, part)
    received = part.stat().st_size if origin else 0
    headers = {"Accept-Encoding": "identity"}
    if origin and received:
        headers["Range"] = f"bytes={received}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
        if response.status_code in NOT_AVAILABLE_STATUS:
            raise NotAvailableError(f"{response.status_code} {response.reason}")
        if response.status_code == 416:  # ``part`` is as long as the file, or longer
            part.unlink()
            raise requests.ConnectionError(f"has no more bytes than {received:,}")
        if not response.ok:
            raise requests.HTTPError(f"{response.status_code} {response.reason}")
        if "text/html" in response.headers.get("Content-Type", ""):
            raise NotAvailableError("answers with a web page, not with the file")
        is_resumed = response.status_code == 206
        if is_resumed and (
            not response.headers.get("Content-Range", "").startswith(f"bytes {received}-")
            or response.headers.get("ETag") != origin.get("etag")
        ):
            part.unlink()
            raise requests.ConnectionError("does not continue the same file")
        if not is_resumed:
            received = 0
            # the checksum of the complete file; a response with a range of it does not contain it
            origin = {
                "url": url,
                "etag": response.headers.get("ETag"),
                "md5": response.headers.get("Content-MD5"),
            }
            part.unlink(missing_ok=True)
            _origin_file(part).write_text(json.dumps(origin), encoding="utf-8")
        length = response.headers.get("Content-Length", "")
        if not length.isdigit() and "chunked" not in response.headers.get("Transfer-Encoding", ""):
            raise NotAvailableError("does not give the file's size")
        size = received + int(length) if length.isdigit() else expected.size
        if expected.size not in (None, size):
            raise NotAvailableError(f"has a file of {size:,} bytes, not {expected.size:,}")
        if size and size - received > (free := shutil.disk_usage(part.parent).free):
            raise OSError(f"needs {size - received:,} bytes, the disk has {free:,} left")
        with part.open("ab") as file:
            for chunk in response.iter_content(_CHUNK_BYTES):
                received += len(chunk)
                if received > (size or _MAX_BYTES):
                    break
                file.write(chunk)
                on_bytes(part.name[1 : -len(".part")], received, size)
    if received > (size or _MAX_BYTES):
        part.unlink()
        raise NotAvailableError(f"sends more than {size or _MAX_BYTES:,} bytes")
    if size is not None and received < size:
        raise requests.ConnectionError(f"broke off after {received:,} of {size:,} bytes")
    return f"md5:{_hex(origin['md5'])}" if origin.get("md5") else None


def _read_origin(url: str, part: Path) -> dict[str, Any]:
    """The recorded origin of ``part``; empty if there is none or it is another URL."""
    try:
        origin = json.loads(_origin_file(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(origin, dict) or origin.get("url") != url or not part.exists():
        return {}
    return origin


def _hex(md5: str) -> str:
    """A Content-MD5 header, which is base64, as hex. An invalid header stays, and matches no file."""
    try:
        return base64.b64decode(md5).hex()
    except ValueError:
        return md5


def verify(part: Path, expected: ExpectedFile, host_checksum: str | None = None) -> None:
    """Verify a file. One that is wrong is removed, and a ``RequestException`` has the cause.

    Args:
        host_checksum: The checksum that the host gives, in the format of ``ExpectedFile.checksum``.
    """
    with part.open("rb") as file:
        is_web_page = file.read(64).lstrip().lower().startswith(_WEB_PAGE)
    if is_web_page:
        part.unlink()
        raise NotAvailableError("answers with a web page, not with the file")
    size = part.stat().st_size
    cause = None
    if expected.size not in (None, size):
        cause = f"gave {size:,} bytes, not {expected.size:,}"
    for checksum in (expected.checksum, host_checksum):
        if cause is None and checksum and not matches_checksum(part, checksum):
            cause = f"gave a file that does not match its checksum {checksum}"
    if cause:
        part.unlink()
        raise requests.ConnectionError(cause)


def matches_checksum(path: Path, checksum: str) -> bool:
    """Whether the file has this checksum, 'md5:…' or 'sha256:…'."""
    algorithm, _, expected = checksum.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


def root_cause(error: BaseException) -> str:
    """The message of the innermost exception, in one short line."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return re.sub(" for url.*", "", " ".join(str(error).split()))[:160] or type(error).__name__
