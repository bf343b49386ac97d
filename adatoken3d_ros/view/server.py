# SPDX-License-Identifier: Apache-2.0
"""viser's server, which knows no users, for those alone who know the address.

The address has a token as its path. A request for any other path, for the page or for the socket, is refused before
viser sees it. viser has no place for that, so the function that it opens its socket with is wrapped while it starts; if
that has not been called then, nothing is served.
"""

from __future__ import annotations

import contextlib
import functools
import hmac
import io
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, TypeVar
from urllib.parse import urlsplit

import viser
import websockets.asyncio.server
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

T = TypeVar("T")
LOOPBACK = "127.0.0.1"
FEWEST_LETTERS = 16  # of a token that somebody chose
_TOLD = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_STARTING = threading.Lock()


class ServerError(ValueError):
    """A host or token that cannot be used, or a viser that cannot be guarded; the message names it."""


def check_token(token: str | None, host: str) -> str:
    """The token to use: a new one for None; an empty one, which lets everybody in, on this machine alone.

    Raises:
        ServerError: for one that is too short or has other letters than an address may, or none on another host.
    """
    if token is None:
        return secrets.token_urlsafe(24)
    if not token:
        if not is_loopback(host):
            raise ServerError(f"without a token the view can be opened on this machine only, not on {host!r}")
        return ""
    if len(token) < FEWEST_LETTERS or not token.replace("-", "").replace("_", "").isalnum() or not token.isascii():
        raise ServerError(f"a token must have at least {FEWEST_LETTERS} letters, digits, - or _, got {len(token)}")
    return token


def check_place(host: str, port: int) -> None:
    """Whether a server can listen there, for viser waits for ever for one that cannot.

    Raises:
        ServerError: for a port that there is not, or a host that is no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ServerError(f"--port {port} must be from 0 to 65535")
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        for family, kind, _, _, where in found:
            with socket.socket(family, kind) as probe:
                probe.bind(where)
    except (OSError, UnicodeError) as error:
        raise ServerError(f"nothing can listen on --host {host!r}: {error}") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def start(host: str, port: int, token: str, label: str = "adatoken3d") -> viser.ViserServer:
    """A server that listens; on another port where that one is taken. Port 0: a free one.

    Raises:
        ServerError: as `check_place`, or if this viser opens its socket in another way.
    """
    check_place(host, port)
    guarded = threading.Event()

    def serve(real: Callable[..., T], *args: Any, process_request: Any = None, **options: Any) -> T:
        guarded.set()
        return real(*args, process_request=_guard(token, process_request), **options)

    with _STARTING:
        module: Any = websockets.asyncio.server
        real = module.serve
        module.serve = functools.partial(serve, real)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints an address without the token
                server = viser.ViserServer(host=host, port=port, label=label, verbose=False)
        finally:
            module.serve = real
    if not guarded.is_set():
        stop(server)
        raise ServerError(f"viser {viser.__version__} starts in a way that cannot be guarded")
    # A browser may ask viser for a public address, through somebody else's machine.
    server.request_share_url = _never  # type: ignore[method-assign]
    return server


def stop(server: viser.ViserServer) -> None:
    """Ends it, without its saying so."""
    with contextlib.redirect_stdout(io.StringIO()):
        server.stop()


def address(server: viser.ViserServer, token: str) -> str:
    """Where people find it."""
    host = server.get_host()
    shown = LOOPBACK if host in ("0.0.0.0", "::", "localhost") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{server.get_port()}/{token + '/' if token else ''}"


def _guard(token: str, inner: Callable[..., Response | None]) -> Callable[..., Response | None]:
    """Lets through what knows the token, without it, and comes from the server's own page."""
    head = f"/{token}" if token else ""
    logging.getLogger("websockets.server").addFilter(_not_a_failure)

    def process(connection: Any, request: Request) -> Response | None:
        path, query, tail = request.path.partition("?")
        begun, rest = path[: len(head)], path[len(head) :]
        known = hmac.compare_digest(begun.encode(), head.encode()) and (not rest or rest.startswith("/"))
        if not known:
            return _refused("This address needs its token: open the one that adatoken3d printed.\n")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.headers.get("Host"):
            return _refused("Another site's page may not come in.\n")
        request.path = (rest or "/") + query + tail
        response = inner(connection, request)
        if response is not None:
            for name, value in _TOLD.items():
                response.headers[name] = value
        return response

    return process


def _never(verbose: bool = True) -> None:
    logging.getLogger(__name__).warning("somebody asked for a public address of the view; there is none")


def _refused(why: str) -> Response:
    body = why.encode()
    head = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(body)), "Connection": "close"}
    return Response(HTTPStatus.FORBIDDEN, "Forbidden", Headers({**head, **_TOLD}), body)


def _not_a_failure(record: logging.LogRecord) -> bool:
    """A handshake that was refused, or a port scan, is nothing to write a traceback about."""
    return not record.getMessage().startswith(("opening handshake failed", "connection rejected"))
