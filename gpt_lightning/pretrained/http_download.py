"""One file from the first of several addresses that gives it: whole under its name, or not at all.

What was fetched before a connection broke is gone on with, in a later run too.
"""

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

# called with a file's name, its bytes so far and its bytes in all, where they are known
OnBytes = Callable[[str, int, int | None], None]

ATTEMPTS = 3  # at each host, without a byte more than before
_TIMEOUT = (10, 60)  # seconds to connect, and between two pieces
_BLOCK_BYTES = 1 << 18  # bytes; of a piece that breaks off nothing is kept
NOT_HERE = (401, 403, 404, 410)
_MOST = 10_000_000_000  # bytes of a file whose size nobody tells; the largest has 6.4 GB
_PAGE = (b"<!doctype", b"<html", b"<?xml")


class ExpectedFile(NamedTuple):
    """What is known of a file beforehand; sums as 'md5:…' or 'sha256:…'."""

    size: int | None = None
    digest: str | None = None


class NotAvailableError(requests.RequestException):
    """This host does not have the file; asking it again changes nothing."""


def fetch(
    urls: Sequence[str], path: Path, known: ExpectedFile, on_bytes: OnBytes, pause: float = 1.0
) -> None:
    """The first of ``urls`` that gives the file whole. Each is given up after three attempts that brought
    nothing, with what it gave until then kept for another run.

    Raises:
        OSError: None does, with the cause for each; or the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    causes = []
    for url in urls:
        furthest, failures = 0, 0
        while failures < ATTEMPTS:
            try:
                told = _fetch_once(url, part, known, on_bytes)
                check(part, known, told)
                move_into_place(part, path)
                _origin(part).unlink(missing_ok=True)
                return
            except requests.RequestException as error:
                last = error
            reached = part.stat().st_size if part.exists() else 0
            if not reached:
                _origin(part).unlink(missing_ok=True)
            failures = 0 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if isinstance(last, NotAvailableError):
                break
            if failures < ATTEMPTS:
                time.sleep(pause * 2 ** max(failures - 1, 0))
        causes.append(f"{urlsplit(url).netloc}: {brief(last)}")
    raise OSError(", ".join(causes)) from last


def _origin(part: Path) -> Path:
    """What says where ``part`` is from: only the rest of the same file may go behind it."""
    return part.with_suffix(".origin")


def _fetch_once(url: str, part: Path, known: ExpectedFile, on_bytes: OnBytes) -> str | None:
    """Go on with ``part``, or begin it; returns the sum that the host says the file has."""
    begun = _begun(url, part)
    have = part.stat().st_size if begun else 0
    headers = {"Accept-Encoding": "identity"}
    if begun and have:
        headers["Range"] = f"bytes={have}-"
    with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as answer:
        if answer.status_code in NOT_HERE:
            raise NotAvailableError(f"{answer.status_code} {answer.reason}")
        if answer.status_code == 416:  # nothing after what is here, which may be too much
            part.unlink()
            raise requests.ConnectionError(f"has no more bytes than {have:,}")
        if not answer.ok:
            raise requests.HTTPError(f"{answer.status_code} {answer.reason}")
        if "text/html" in answer.headers.get("Content-Type", ""):
            raise NotAvailableError("answers with a web page, not with the file")
        goes_on = answer.status_code == 206
        if goes_on and (
            not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            or answer.headers.get("ETag") != begun.get("etag")
        ):
            part.unlink()
            raise requests.ConnectionError("does not go on with the same file")
        if not goes_on:
            have = 0
            # the sum of the whole file, which an answer with a part of it does not tell
            begun = {
                "url": url,
                "etag": answer.headers.get("ETag"),
                "md5": answer.headers.get("Content-MD5"),
            }
            part.unlink(missing_ok=True)
            _origin(part).write_text(json.dumps(begun), encoding="utf-8")
        rest = answer.headers.get("Content-Length", "")
        if not rest.isdigit() and "chunked" not in answer.headers.get("Transfer-Encoding", ""):
            raise NotAvailableError("does not say how long the file is")
        size = have + int(rest) if rest.isdigit() else known.size
        if known.size not in (None, size):
            raise NotAvailableError(f"has {size:,} bytes of it, not {known.size:,}")
        if size and size - have > (free := shutil.disk_usage(part.parent).free):
            raise OSError(f"needs {size - have:,} bytes, the disk has {free:,} left")
        with part.open("ab") as file:
            for piece in answer.iter_content(_BLOCK_BYTES):
                have += len(piece)
                if have > (size or _MOST):
                    break
                file.write(piece)
                on_bytes(part.name[1 : -len(".part")], have, size)
    if have > (size or _MOST):
        part.unlink()
        raise NotAvailableError(f"goes on after {size or _MOST:,} bytes, which should be all")
    if size is not None and have < size:
        raise requests.ConnectionError(f"broke off after {have:,} of {size:,} bytes")
    return f"md5:{_hex(begun['md5'])}" if begun.get("md5") else None


def _begun(url: str, part: Path) -> dict[str, Any]:
    """What is known of the file that ``part`` is the beginning of, where it is from ``url``."""
    try:
        begun = json.loads(_origin(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(begun, dict) or begun.get("url") != url or not part.exists():
        return {}
    return begun


def _hex(md5: str) -> str:
    """Of a Content-MD5 header, which is in base64; one that is not equals no sum."""
    try:
        return base64.b64decode(md5).hex()
    except ValueError:
        return md5


def check(part: Path, known: ExpectedFile, told: str | None = None) -> None:
    """Remove a file that is not what it should be, and say so by a ``RequestException``.

    Args:
        told: The sum that the host says it has, as ``ExpectedFile.digest``.
    """
    with part.open("rb") as file:
        page = file.read(64).lstrip().lower().startswith(_PAGE)
    if page:
        part.unlink()
        raise NotAvailableError("answers with a web page, not with the file")
    size = part.stat().st_size
    cause = None
    if known.size not in (None, size):
        cause = f"gave {size:,} bytes, not {known.size:,}"
    for digest in (known.digest, told):
        if cause is None and digest and not has_digest(part, digest):
            cause = f"gave a file without the sum {digest}"
    if cause:
        part.unlink()
        raise requests.ConnectionError(cause)


def has_digest(path: Path, digest: str) -> bool:
    algorithm, _, expected = digest.partition(":")
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == expected


def brief(error: BaseException) -> str:
    """The innermost cause, which says what happened and not who noticed."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return re.sub(" for url.*", "", " ".join(str(error).split()))[:160] or type(error).__name__
