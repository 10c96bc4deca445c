"""A server with faults that the tests choose."""

import base64
import hashlib
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

HANGS_UP = ("another", "html", "no length")  # the client does not read these responses


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
                sent = rest[:length]
                self.wfile.write(sent[:-1])
                # a client that waits for the last byte must not have made the file
                if fault not in HANGS_UP and host.watched and host.watched.exists():
                    host.errors.append(f"{host.watched} exists before it is complete")
                self.wfile.write(sent[-1:])
                self.wfile.flush()
                if fault in ("cut", "long", "no length"):
                    self.close_connection = True
                    with suppress(OSError):  # the client was faster
                        self.connection.shutdown(socket.SHUT_RDWR)

    return Handler


def noise(size: int) -> bytes:
    return b"".join(hashlib.sha256(i.to_bytes(4)).digest() for i in range(size // 32 + 1))[:size]


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}
