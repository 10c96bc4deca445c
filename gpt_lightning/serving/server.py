"""The HTTP server: address, ready line, and a stop that lets running requests end."""

import logging
import signal
import socket
from collections.abc import Callable, Sequence
from typing import Any, final

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute

from gpt_lightning.serving.access import AccessMiddleware, AccessRules
from gpt_lightning.serving.api_errors import APIError

DRAIN_SECONDS = 30  # for running requests, after SIGTERM or Ctrl-C


def build_app(routes: Sequence[BaseRoute], rules: AccessRules) -> Starlette:
    """The app with these routes. Every error has OpenAI's form."""
    return Starlette(
        routes=routes,
        middleware=[Middleware(AccessMiddleware, rules=rules)],
        exception_handlers={HTTPException: _answer_http_error},
    )


async def _answer_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = {
        404: "this address does not exist; POST /v1/completions completes a text",
        405: "this method is not allowed here",
    }.get(error.status_code, error.detail)
    return APIError(error.status_code, message, headers=error.headers).response()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on ``host``; port 0 takes a free one.

    Raises:
        ValueError: The port is in use, or the host is not one of this machine.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port: {port} is out of range; give 0 (a free one) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ValueError(f"host: {host} is not known ({error.strerror}); try 127.0.0.1") from error
    listener = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows: two servers could share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(_bind_error(host, port, error)) from error
    return listener


def _bind_error(host: str, port: int, error: OSError) -> str:
    import errno

    if error.errno in (errno.EADDRINUSE, getattr(errno, "WSAEADDRINUSE", -1)):
        other = port + 1 if port < 2**16 - 1 else port - 1
        return f"port: {port} is in use, maybe by another explore or serve; give --port {other}, or --port 0 for a free one"
    if error.errno in (errno.EACCES, getattr(errno, "WSAEACCES", -1)):
        return f"port: {port} is not allowed ({error.strerror}); give --port 8501, or --port 0 for a free one"
    return f"host: cannot listen on {host} ({error.strerror}); try 127.0.0.1"


def url_of(listener: socket.socket, host: str) -> str:
    """The address of a server, for a browser."""
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    name = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return f"http://{name}:{listener.getsockname()[1]}"


@final
class _Server(uvicorn.Server):
    """uvicorn's server, which calls ``on_ready`` when it accepts requests."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def run_server(app: Starlette, listener: socket.socket, on_ready: Callable[[], None]) -> int:
    """Serve until SIGTERM or Ctrl-C, let running requests end, and return the exit code, 143 or 130."""
    received: list[int] = []
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=logging.CRITICAL,  # with_error_answers logs our faults
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_SECONDS,
        h11_max_incomplete_event_size=64 * 1024,
        http="h11",
        ws="none",
        loop="asyncio",
    )

    def remember(signum: int, frame: Any) -> None:
        received.append(signum)

    # uvicorn stops at these signals and then raises them again, for us
    previous = {s: signal.signal(s, remember) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        _Server(config, on_ready).run(sockets=[listener])
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if signal.SIGTERM in received:
        return 143
    return 130 if received else 0
