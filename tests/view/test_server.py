# SPDX-License-Identifier: Apache-2.0
"""Who may come in, and a browser that does not read."""

from __future__ import annotations

import base64
import http.client
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

viser = pytest.importorskip("viser", reason="viser is not installed")

from adatoken3d_ros.view import server as guarded  # noqa: E402
from adatoken3d_ros.view.page import Page  # noqa: E402
from adatoken3d_ros.view.server import ServerError, address, check_token, start  # noqa: E402
from adatoken3d_ros.view.source import Shown  # noqa: E402

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    made = start("127.0.0.1", 0, TOKEN)
    yield made
    made.stop()


def get(server: Any, path: str, **headers: str) -> tuple[int, str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.get_port(), timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.read().decode(errors="replace"), response.headers


def knock(server: Any, path: str, origin: str | None = None) -> tuple[socket.socket, str]:
    """Asks for the socket as a browser does; the connection, of which nothing more is read, and the status line."""
    raw = socket.create_connection(("127.0.0.1", server.get_port()), timeout=10)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host = f"127.0.0.1:{server.get_port()}"
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "Upgrade: websocket", "Connection: Upgrade",
             f"Sec-WebSocket-Key: {base64.b64encode(bytes(16)).decode()}", "Sec-WebSocket-Version: 13",
             f"Sec-WebSocket-Protocol: viser-v{viser.__version__}"]  # fmt: skip
    lines += [f"Origin: {origin}"] if origin else []
    raw.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
    head = b""
    while not head.endswith(b"\r\n"):
        head += raw.recv(1)
    return raw, head.decode().strip()


@pytest.mark.parametrize("path", ["/", "/index.html", "/0123456789abcdeX/", "/0123456789abcde", f"/{TOKEN}more/", "//"])
def test_without_the_token_nobody_comes_in(server: Any, path: str) -> None:
    status, text, _ = get(server, path)
    assert status == 403 and "token" in text
    raw, line = knock(server, path)
    raw.close()
    assert " 403 " in line


def test_with_it_the_page_and_the_socket_are_there(server: Any) -> None:
    assert address(server, TOKEN) == f"http://127.0.0.1:{server.get_port()}/{TOKEN}/"
    status, text, headers = get(server, f"/{TOKEN}/")
    assert status == 200 and "<html" in text.lower()
    assert headers["Referrer-Policy"] == "no-referrer" and headers["X-Frame-Options"] == "DENY"
    assert get(server, f"/{TOKEN}/../../etc/passwd")[0] == get(server, f"/{TOKEN}/%2e%2e/secret")[0] == 404
    raw, line = knock(server, f"/{TOKEN}", f"http://127.0.0.1:{server.get_port()}")
    raw.close()
    assert " 101 " in line


def test_other_sites_pages_stay_outside(server: Any) -> None:
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null"):
        raw, line = knock(server, f"/{TOKEN}", origin)
        raw.close()
        assert " 403 " in line


def test_nobody_gets_a_public_address(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert server.request_share_url() is None
    assert "there is none" in caplog.text


@pytest.mark.parametrize(
    ("token", "host", "named"),
    [
        ("short", "127.0.0.1", "at least 16"),
        ("with a blank in it", "127.0.0.1", "at least 16"),
        ("", "0.0.0.0", "this machine only"),
    ],
)
def test_tokens_that_cannot_be_used(token: str, host: str, named: str) -> None:
    with pytest.raises(ServerError, match=named):
        check_token(token, host)


def test_tokens_are_made_and_may_be_left_out_at_home() -> None:
    made = {check_token(None, "0.0.0.0") for _ in range(3)}
    assert len(made) == 3 and min(map(len, made)) >= 32
    assert check_token("", "127.0.0.1") == check_token("", "localhost") == check_token("", "::1") == ""


def test_a_viser_that_cannot_be_guarded_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    class Other:
        def __init__(self, **options: Any) -> None: ...

        def stop(self) -> None:
            stopped.append(True)

    monkeypatch.setattr(guarded.viser, "ViserServer", Other)
    with pytest.raises(ServerError, match="cannot be guarded"):
        start("127.0.0.1", 0, TOKEN)
    assert stopped


def test_a_browser_that_does_not_read_holds_nothing_up(server: Any) -> None:
    """What is told replaces what was told before; nothing piles up for it, and others get what is newest."""
    shown = server.gui.add_html("")
    raw, line = knock(server, f"/{TOKEN}")
    assert " 101 " in line
    buffer = server._websock_server.get_message_buffer()

    def tell(number: int) -> int:
        shown.content = f"{number} " + "x" * 100_000  # 50 MB in all
        server.scene.add_point_cloud("/tokens", np.full((1000, 3), number), (1, 2, 3))
        return len(buffer.message_from_id)

    tell(0)
    assert len({tell(number) for number in range(1, 501)}) == 1
    assert shown.content.startswith("500 ")
    raw.close()


class Empty:
    """A source whose scene comes later, and far from the origin."""

    strategies, budget_ms, click_question = ("ours", "none"), 60_007.0, "What is at {p}?"  # more than is usual
    shown = Shown()

    def scene(self) -> Shown:
        return self.shown

    def cancel(self) -> None: ...


def test_the_page_begins_where_the_scene_is(server: Any) -> None:
    source = Empty()
    page = Page(server, source)  # type: ignore[arg-type]
    try:
        xyz = np.random.default_rng(0).uniform((98, 48, 0), (102, 52, 2), (100, 3)).astype(np.float32)
        source.shown = Shown(xyz, np.zeros((100, 3), np.uint8), np.zeros(100, np.int64), stamp_ns=1)
        page._scene = source.shown
        page._redraw(everything=True)
        assert page._budget.value == 60_010 and page._question("What?").latency_budget_ms == 60_007.0
        page._budget.value = 60_000
        assert page._question("What?").latency_budget_ms == 60_000.0
        np.testing.assert_allclose(server.initial_camera.look_at, (100, 50, 1), atol=0.2)
        assert 1 < np.linalg.norm(server.initial_camera.position - server.initial_camera.look_at) < 8
    finally:
        page.close()
