# SPDX-License-Identifier: Apache-2.0
"""A robot's connection to a shared engine: requests over HTTP(S), bounded in size and time, and what went wrong."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adatoken3d_ros.fleet import wire
from adatoken3d_ros.fleet.door import ROBOT, SCENE
from adatoken3d_ros.fleet.way import Way
from adatoken3d_ros.fleet.wire import WireError
from adatoken3d_ros.text import quoted, shown

CONNECT = 3.0  # seconds
PATIENCE = 5.0  # seconds without a line after which a connection counts as broken
_PIECE = 64 * 2**10  # bytes of which the connection has to take so many within this
_BUFFERED = 4 * _PIECE  # that it may hold, since an answer counts from when it has taken the last
_LOOK = 0.005  # seconds between two looks whether somebody waits still
_MOST_HELLO = 8 * 2**20
_MOST_REASON = 64 * 2**10


class LinkError(Exception):
    """A shared engine that does not do what it was asked; the message says why."""


class Unreachable(LinkError):
    """It cannot be reached, or the connection broke: another attempt may do."""


class Missing(LinkError):
    """It lacks bodies of the scene."""

    def __init__(self, bodies: Sequence[str]) -> None:
        super().__init__(f"{len(bodies)} bodies are missing")
        self.bodies = tuple(bodies)


class Stopped(Exception):
    """Nobody waits any more."""


@dataclass(frozen=True)
class Address:
    """Where a shared engine is, and how one comes in.

    Attributes:
        url: http or https, host and port. token: empty for none. ca_file: certificates; empty: the system's.
        robot: what the robot is called.
    """

    url: str
    token: str = ""
    ca_file: str = ""
    robot: str = ""


class Link:
    """Requests to one shared engine. Any thread.

    Args:
        address: where it is.
        clock: seconds, monotonic.

    Attributes:
        way: how long the way there and back takes; each exchange without bodies measures it, its connection included.

    Raises:
        ValueError: for certificates that cannot be read.
    """

    def __init__(self, address: Address, clock: Callable[[], float] = time.monotonic) -> None:
        self.address, self._clock = address, clock
        parts = urlsplit(address.url)
        self._host, self._port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        self._tls: ssl.SSLContext | None = None
        if parts.scheme == "https":
            try:
                self._tls = ssl.create_default_context(cafile=address.ca_file or None)
            except (OSError, ssl.SSLError) as error:
                raise ValueError(f"engine.ca_file {Path(address.ca_file)}: {shown(error)}") from error
        self.way = Way()
        self._names = _Names(self._host, self._port)

    def hello(self, patience: float = PATIENCE, should_stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """What the engine says of itself; raises LinkError after so many seconds without a word, too, and Stopped."""
        began = self._clock()
        with (
            _watched(should_stop) as watch,
            self._exchange("GET", wire.HELLO, b"", "", patience, watch, measured=False) as response,
        ):
            content = _json(response, _MOST_HELLO)
        self.way.met(self._clock() - began)
        if (version := content.get("version")) != wire.VERSION:
            raise LinkError(f"it speaks version {quoted(version)}, this program {wire.VERSION}")
        return content

    def put(
        self,
        scene: str,
        content: dict[str, Any],
        bodies: Sequence[bytes],
        patience: float = PATIENCE,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[str]:
        """Sends bodies of a scene; those that are missing still.

        Args:
            patience: seconds; of PATIENCE a link may be as slow as it likes, if it moves: else all has to go in them.
            should_stop: as of `ask`.

        Raises:
            LinkError, Stopped: see there.
        """
        data = wire.framed(content, bodies)
        with (
            _watched(should_stop) as watch,
            self._exchange("POST", wire.VIEWS, data, scene, patience, watch, measured=not bodies) as response,
        ):
            missing = _json(response, wire.MOST_TEXT).get("missing")
        if not isinstance(missing, list):
            raise LinkError(f"it misses {quoted(missing)}")
        return missing

    def ask(
        self,
        scene: str,
        content: dict[str, Any],
        bodies: Sequence[bytes],
        *,
        patience: float = PATIENCE,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[tuple[dict[str, Any], bytes]]:
        """The events of an answer as they come, the last with the bytes behind it.

        Args:
            patience: seconds without a line after which the connection counts as broken.
            should_stop: looked at every few milliseconds, from looking up the name on: True closes the connection,
                which ends the answer there.

        Raises:
            Missing: bodies of the scene are. Unreachable, LinkError: see there. Stopped: should_stop() was true.
        """
        data, bare = wire.framed(content, bodies), len(bodies) == 1  # the question's places
        with (
            _watched(should_stop) as watch,
            self._exchange("POST", wire.ASK, data, scene, patience, watch, measured=bare) as response,
        ):
            while True:
                watch.look()
                line = _read(response.readline, wire.MOST_LINE)
                if not line.endswith(b"\n"):
                    raise Unreachable("the connection broke before the answer's end")
                try:
                    event = wire.read_json(line)
                except WireError as error:
                    raise LinkError(str(error)) from error
                size = event.get("bytes", 0)
                if type(size) is not int or not 0 <= size <= wire.MOST_REPORT:
                    raise LinkError(f"an answer with {quoted(size)} bytes behind it")
                tail = _read(response.read, size) if size else b""
                if len(tail) < size:
                    raise Unreachable("the connection broke within the answer's tokens")
                yield event, tail
                if event.get("event") == "done":
                    return

    def _exchange(
        self,
        method: str,
        path: str,
        data: bytes,
        scene: str,
        patience: float,
        watch: _Watch,
        *,
        measured: bool,
    ) -> _Response:
        """Sends a request; its response, with status 200. `measured`: its time is the way's. Raises LinkError."""
        address, connection, began = self.address, self._connection(min(CONNECT, patience), watch), self._clock()
        headers = {ROBOT: address.robot, "Content-Type": "application/octet-stream"}
        headers |= {SCENE: scene} if scene else {}
        headers |= {"Authorization": f"Bearer {address.token}"} if address.token else {}
        body: bytes | Iterator[bytes] | None = data or None
        if data and patience >= PATIENCE:  # no budget ends sooner: megabytes over a slow radio may take their time
            headers["Content-Length"] = str(len(data))
            body = (data[at : at + _PIECE] for at in range(0, len(data), _PIECE))
        try:
            end = time.monotonic() + patience
            connection.connect()
            sock = connection.sock
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            hurried = patience < PATIENCE  # where a budget ends all has to go, and the first word to come, within it
            sock.settimeout(max(_LOOK, end - time.monotonic()) if hurried else patience)
            if not isinstance(body, bytes | None):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFERED)
            connection.request(method, path, body=body, headers=headers)
            sock.settimeout(max(_LOOK, end - time.monotonic()) if hurried else patience)
            response = connection.getresponse()
            sock.settimeout(patience)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unreachable(f"{address.url} cannot be reached: {shown(error) or type(error).__name__}") from error
        if measured:
            self.way.exchanged(self._clock() - began)
        if response.status == 200:
            return _Response(connection, response)
        with _Response(connection, response):
            self._refused(response)
        raise AssertionError

    def _connection(self, timeout: float, watch: _Watch) -> http.client.HTTPConnection:
        made: Any = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        made.default_port = 80 if self._tls is None else 443
        made._create_connection = partial(self._connected, watch)  # where http.client has socket.create_connection
        return made

    def _connected(self, watch: _Watch, address: object, timeout: float, source: object = None) -> socket.socket:
        """As `socket.create_connection`, but within the timeout, and with TLS; raises OSError, Stopped."""
        plain = self._names.connected(timeout, watch)
        if self._tls is None:
            return plain
        secure = self._tls.wrap_socket(plain, server_hostname=self._host, do_handshake_on_connect=False)
        watch.over(secure)
        try:
            secure.do_handshake()
        except OSError:
            secure.close()
            raise
        return secure

    def _refused(self, response: http.client.HTTPResponse) -> None:
        status = response.status
        try:
            content = json.loads(_read(response.read, _MOST_REASON))
            word, why = str(content["error"]), shown(content["message"]) if "message" in content else ""
        except (ValueError, LookupError, TypeError):  # of a proxy, whose replica has died, or is not there yet
            kind = Unreachable if status >= 500 else LinkError
            raise kind(f"{self.address.url} answers with status {status}") from None
        if status == 428 and word == "missing":
            raise Missing([str(name) for name in content.get("bodies", [])])
        raise LinkError(f"{self.address.url} refuses it: {why}")


class _Names:
    """Connections to a host whose name may take long to be looked up: without a network a resolver waits for many
    seconds, and has no timeout. It is asked in a thread of its own; where it is late the last answer counts."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._lock = threading.Lock()
        self._asked: Future[list[Any]] | None = None
        self._known: list[Any] = []

    def connected(self, timeout: float, watch: _Watch) -> socket.socket:
        """A connection within the timeout in all; raises OSError, Stopped."""
        end = time.monotonic() + timeout
        problem: OSError = OSError(f"{quoted(self._host)} has no address")
        found = self._found(timeout / 2, watch)
        for place, (family, kind, protocol, _, where) in enumerate(found):
            try:
                one = socket.socket(family, kind, protocol)
            except OSError as error:  # such as of IPv6 where there is none
                problem = error
                continue
            watch.over(one)
            try:
                one.settimeout(max(0.001, (end - time.monotonic()) / (len(found) - place)))  # the next ones have theirs
                one.connect(where)
            except OSError as error:
                one.close()
                problem = error
            else:
                one.settimeout(max(0.001, end - time.monotonic()))  # for a handshake
                return one
        raise problem

    def _found(self, seconds: float, watch: _Watch) -> list[Any]:
        with self._lock:
            if self._asked is None or self._asked.done():
                self._asked = Future()
                threading.Thread(target=self._ask, args=(self._asked,), name="adatoken3d-name", daemon=True).start()
            asked = self._asked
        end = time.monotonic() + seconds
        while not wait([asked], _LOOK).done and time.monotonic() < end:
            watch.look()
        try:
            self._known = asked.result(0.0)
        except (OSError, FutureTimeout) as error:
            if not self._known:
                if isinstance(error, OSError) and not isinstance(error, FutureTimeout):
                    raise
                raise TimeoutError(f"the name {quoted(self._host)} was not found within {seconds:.1f} s") from error
        return self._known

    def _ask(self, asked: Future[list[Any]]) -> None:
        try:
            asked.set_result(socket.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM))
        except OSError as error:
            asked.set_exception(error)
        except UnicodeError as error:
            asked.set_exception(OSError(f"{quoted(self._host)} is no name: {shown(error, 80)}"))


class _Watch:
    """Looks, in a thread of its own, whether somebody waits still, and ends a connection as soon as nobody does: who
    reads from it finds it broken there, and not with the next line."""

    def __init__(self, should_stop: Callable[[], bool]) -> None:
        self._should_stop = should_stop
        self._socket: socket.socket | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="adatoken3d-watch", daemon=True)
        self.stopped = False

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()  # before the connection's number is another's

    def over(self, connection: socket.socket) -> None:
        """This connection is ended then."""
        self._socket = connection

    def look(self) -> None:
        """Raises Stopped if nobody waits any more."""
        if self.stopped or self._should_stop():
            raise Stopped

    def _run(self) -> None:
        while not self._done.wait(_LOOK):
            if self._socket is not None and (self.stopped or self._should_stop()):
                self.stopped = True
                with suppress(OSError):  # it is closed, or not connecting yet: then the next time
                    # Of the socket beneath TLS: the thread that reads is in the middle of that.
                    socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


@contextmanager
def _watched(should_stop: Callable[[], bool]) -> Iterator[_Watch]:
    """What is raised within it since the watch broke the connection is Stopped."""
    with _Watch(should_stop) as watch:
        try:
            yield watch
        except LinkError:
            if watch.stopped:
                raise Stopped from None
            raise


class _Response:
    """A response whose connection is closed at the end."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response

    def __enter__(self) -> http.client.HTTPResponse:
        return self._response

    def __exit__(self, *exception: object) -> None:
        self._response.close()
        self._connection.close()


def _read(read: Callable[[int], bytes], most: int) -> bytes:
    try:
        return read(most)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unreachable(f"the connection broke: {shown(error) or type(error).__name__}") from error


def _json(response: http.client.HTTPResponse, most: int) -> dict[str, Any]:
    try:
        return wire.read_json(_read(response.read, most))
    except WireError as error:
        raise LinkError(str(error)) from error
