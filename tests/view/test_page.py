# SPDX-License-Identifier: Apache-2.0
"""The live page in a real browser: ask, click, select, ask again without, play, compare, report."""

from __future__ import annotations

import io
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from adatoken3d_ros.cli.output import record_of_answer
from adatoken3d_ros.cli.view import serving
from adatoken3d_ros.engine.loading import load_engine
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.view.drawing import viewpoint
from adatoken3d_ros.view.local import LocalSource
from tests.engine.scenes import room_frame

viser = pytest.importorskip("viser", reason="viser is not installed")
zstandard = pytest.importorskip("zstandard", reason="viser is not installed")
connect = pytest.importorskip("websockets.sync.client", reason="viser is not installed").connect

WIDTH, HEIGHT = 800, 500  # of the browser: the CPU draws it
PANEL = 400  # pixels left of it, and below the notifications' HEAD
HEAD = 200
FOV = np.deg2rad(75)  # of a browser's camera at first
HANDSHAKE = (
    "GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    "Sec-WebSocket-Protocol: viser-v{version}\r\n\r\n"
)
TIMEOUT = 60_000  # milliseconds; a page is quicker


@pytest.fixture(scope="module")
def source(tiny_of: Callable[[str], Path]) -> Iterator[LocalSource]:
    given = {"model.path": str(tiny_of("llava3d")), "budget.warm_up": False, "max_new_tokens": 4}
    settings = Settings({**given, "scene.min_sharpness": 0.0})
    frames = [room_frame(index) for index in range(3)]
    made = LocalSource(load_engine(settings), settings, frames, record_of_answer)
    assert made.wait(60) and made.problem == ""
    yield made
    made.close()


@pytest.fixture(scope="module")
def address(source: LocalSource) -> Iterator[str]:
    with serving(source, "127.0.0.1", 0, None) as found:
        yield found


@pytest.fixture(scope="module")
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page as a browser has loaded it; its errors fail the last test."""
    from adatoken3d_ros.view import page as view

    problems: list[str] = []
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda told: problems.append(told.text) if "color buffer" in told.text else None)
    page.goto(address)
    button(page, "Ask").wait_for(timeout=TIMEOUT)
    page.wait_for_function("() => [...document.querySelectorAll('canvas')].some(c => c.width > 300)", timeout=TIMEOUT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(view, "STEP_SECONDS", 0.1)
        yield page
    page.close()
    assert problems == []


def colours(png: bytes) -> int:
    return len(np.unique(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3), axis=0))


def drawn(page: Any) -> bytes:
    """A picture of the scene without the panel: what is said there does not count."""
    return bytes(page.screenshot(clip={"x": 0, "y": HEAD, "width": PANEL, "height": HEIGHT - HEAD}))


def settled(page: Any) -> bytes:
    """A picture of the scene once everything that was told is drawn."""
    before = b""
    for _ in range(TIMEOUT // 700):
        if (now := drawn(page)) == before:
            return now
        before = now
        page.wait_for_timeout(700)  # longer than until the page looks at the scene again
    raise AssertionError("the scene never comes to rest")


def other(page: Any, before: bytes) -> bytes:
    """A picture of the scene once it is another than before."""
    for _ in range(TIMEOUT // 100):
        if (now := drawn(page)) != before:
            return now
        page.wait_for_timeout(100)
    raise AssertionError("the scene is drawn as before")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def told(page: Any, text: str) -> None:
    page.locator("#adatoken3d-answer", has_text=text).wait_for(timeout=TIMEOUT)


def test_a_question_a_click_and_tokens_left_out(page: Any, source: LocalSource) -> None:
    page.locator("form input").first.fill("What is <b>red</b>?")
    before = settled(page)
    button(page, "Ask").click()
    told(page, "What is <b>red</b>?")
    asked = page.locator("#adatoken3d-answer").inner_text()
    after = other(page, before)  # not frozen: coloured by layers now
    assert colours(before) > 100 and colours(after) > 100  # not empty

    # A point is clicked that is in sight, left of the panel.
    xyz = source.scene().xyz
    seen = project(xyz) * [WIDTH, HEIGHT]
    free = np.flatnonzero((seen > [20, HEAD]).all(axis=1) & (seen < [PANEL, HEIGHT - 20]).all(axis=1))
    x, y = seen[free[len(free) // 2]]
    page.mouse.click(x, y)
    page.locator("#adatoken3d-answer", has_not_text="red").wait_for(timeout=TIMEOUT)
    assert page.locator("#adatoken3d-answer").inner_text() != asked

    page.get_by_role("tab", name="Tokens").click()
    page.keyboard.down("Shift")
    page.mouse.move(20, HEAD + 10)
    page.mouse.down()
    page.mouse.move(PANEL, HEIGHT - 20, steps=4)
    page.mouse.up()
    page.keyboard.up("Shift")
    chosen = page.locator("#adatoken3d-chosen")
    page.wait_for_function(
        "() => !document.querySelector('#adatoken3d-chosen').innerText.startsWith('0 ')", timeout=TIMEOUT
    )
    count = int(chosen.inner_text().split()[0])
    assert 0 < count <= len(xyz)
    whole = settled(page)
    button(page, "Ask again without them").click()
    pair = page.locator("#adatoken3d-pair")
    pair.wait_for(timeout=TIMEOUT)
    text = pair.inner_text()
    assert f"without {count} tokens" in text and "probability of" in text
    counts = [int(cell.split(",")[0]) for cell in cells(pair, "tokens")]
    assert counts[0] > counts[1]
    assert any(cell != "+0.00" for cell in changes(pair))
    other(page, whole)


def project(xyz: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where points are in the picture of the page's first camera, 0 to 1."""
    eye, target = viewpoint(xyz)
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0, 0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    local = (xyz - eye) @ np.stack([right, down, forward], axis=1)
    tan = np.tan(FOV / 2)
    return 0.5 + local[:, :2] / local[:, 2:] / (2 * tan) / np.array([WIDTH / HEIGHT, 1.0])


def cells(pair: Any, name: str) -> list[str]:
    row = pair.locator("tr", has=pair.page.locator("td:first-child", has_text=name)).first
    return [str(text) for text in row.locator("td").all_inner_texts()[1:]]


def changes(pair: Any) -> list[str]:
    return [cell.partition("(")[2].rstrip(")") for cell in cells(pair, "probability of")[1:]]


def test_it_plays_compares_and_reports_and_others_see_it(page: Any, address: str) -> None:
    """Beside the browser there is a client that reads what it is sent, and one that never reads."""
    where = urlsplit(address)
    with ExitStack() as stack:
        silent = stack.enter_context(socket.create_connection((where.hostname, where.port)))
        silent.sendall(HANDSHAKE.format(path=where.path, version=viser.__version__).encode())
        protocol = [f"viser-v{viser.__version__}"]
        url = f"ws://{where.netloc}{where.path.rstrip('/')}"
        reading = stack.enter_context(connect(url, subprotocols=protocol, max_size=None))
        page.get_by_role("tab", name="Ask").click()
        page.locator("form input").first.fill("Where is it?")
        button(page, "Ask").click()
        told(page, "Where is it?")
        assert heard(reading, b"adatoken3d-answer", b"Where is it?")
        page.get_by_role("tab", name="Tokens").click()
        first = settled(page)
        button(page, "Play layer by layer").click()
        page.wait_for_function(
            "() => [...document.querySelectorAll('input')].some(i => i.value === '7')", timeout=TIMEOUT
        )
        assert settled(page) != first  # fewer tokens, whatever the panel shows
        page.get_by_role("tab", name="Compare").click()
        button(page, "Compare on the question").click()
        compared = page.locator("#adatoken3d-pair", has_text="Where is it?")
        compared.wait_for(timeout=TIMEOUT)
        left, right = compared.locator("th").all_inner_texts()[1:]
        assert left != right == "none"
        page.get_by_role("tab", name="Ask").click()
        with page.expect_download(timeout=TIMEOUT) as saved:
            button(page, "Report of this answer").click()
        assert "Where is it?" in Path(saved.value.path()).read_text()


def heard(client: Any, *texts: bytes) -> bool:
    """Whether one message of those that come holds all of these texts."""
    for _ in range(1000):
        message = client.recv(timeout=TIMEOUT / 1000)
        packed = int.from_bytes(message[8:16], "little")
        if all(text in zstandard.decompress(message[16 : 16 + packed]) for text in texts):
            return True
    return False
