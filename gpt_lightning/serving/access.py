"""Who may use the server: checks of Host, Origin, token and body size before a request is read."""

import hmac
import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gpt_lightning.serving.api_errors import APIError

MAX_BODY = 4 * 2**20  # bytes

# a page needs nothing from elsewhere, and nobody may frame it
SECURITY_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class AccessRules:
    """What a request must have.

    Attributes:
        host_names: Names by which clients may call the server, in lower case. On loopback, IP addresses must be of loopback.
        is_loopback: Whether only this machine reaches the server.
        token: What ``Authorization: Bearer`` must have; ``None``: the header is not read.
        public_paths: Paths that need no token: a page that asks for the token.
    """

    host_names: frozenset[str]
    is_loopback: bool
    token: str | None = field(default=None, repr=False)
    public_paths: Callable[[str], bool] = lambda path: False


def access_rules(
    host: str, token: str | None, public_paths: Callable[[str], bool] = lambda path: False
) -> AccessRules:
    """Rules of a server that listens on ``host``, a name or an IP address.

    Raises:
        ValueError: Other machines reach it, and there is no token.
    """
    is_loopback = host_is_loopback(host)
    if not is_loopback and token is None:
        raise ValueError(
            f"host: other machines reach {host}, and there is no token; set GPT_LIGHTNING_TOKEN or give --token_file"
        )
    names = {"localhost", host.lower()}
    if not is_loopback:
        names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
    return AccessRules(frozenset(names), is_loopback, token, public_paths)


def host_is_loopback(host: str) -> bool:
    """Whether ``host`` is a name or address of this machine that other machines do not reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@final
class AccessMiddleware:
    """ASGI app that refuses requests against ``rules``, and adds headers that keep browsers safe to all answers."""

    def __init__(self, app: ASGIApp, rules: AccessRules) -> None:
        self._app = app
        self._rules = rules

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                added = [(k.encode(), v.encode()) for k, v in SECURITY_HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        limited = _LimitedBody(receive)
        try:
            self._check(scope, Headers(scope=scope))
            await self._app(scope, limited, send_with_headers)
        except APIError as error:
            if started:
                raise
            await error.response()(scope, receive, send_with_headers)

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Raise :class:`APIError` if the request is not allowed."""
        hosts = headers.getlist("host")
        # a name that an attacker's page made point to this machine is not one of ours (DNS rebinding)
        if len(hosts) != 1 or not self._is_known_host(hosts[0]):
            raise APIError(
                403, "Host: this name is not allowed; use the address that the server shows"
            )
        for origin in headers.getlist("origin"):
            if origin.lower() != f"{scope['scheme']}://{hosts[0].lower()}":
                raise APIError(403, "Origin: pages of other sites are not allowed")
        token = self._rules.token
        if token is not None and not self._rules.public_paths(scope["path"]):
            given = " ".join(headers.getlist("authorization"))
            scheme, _, credentials = given.partition(" ")
            is_right = hmac.compare_digest(credentials.strip().encode(), token.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise APIError(
                    401,
                    "Authorization: the token is missing or wrong; send 'Authorization: Bearer TOKEN'",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY:
            raise _body_too_large()

    def _is_known_host(self, header: str) -> bool:
        try:
            name = (urlsplit(f"//{header}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._rules.host_names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # an address cannot be made to point elsewhere
        return address.is_loopback or not self._rules.is_loopback


@final
class _LimitedBody:
    """``receive`` of a request whose body has a limit."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._num_bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        if self._num_bytes > MAX_BODY:
            raise _body_too_large()
        return message


def _body_too_large() -> APIError:
    message = f"the body is larger than {MAX_BODY // 2**20} MiB; send less"
    return APIError(413, message, code="request_too_large", headers={"Connection": "close"})


def read_token(environment: str | None, file_content: bytes | None) -> str | None:
    """The token from a file or the environment; ``None`` if neither has one.

    Raises:
        ValueError: It is empty, or has characters that an HTTP header cannot carry.
    """
    content = None if file_content is None else file_content.decode(errors="replace")
    for name, value in (("token_file", content), ("GPT_LIGHTNING_TOKEN", environment)):
        if value is not None:
            token = value.strip()
            if not token or not token.isascii() or not token.isprintable() or " " in token:
                raise ValueError(
                    f"{name}: must have one token of ASCII characters without blanks; write one into it"
                )
            return token
    return None
