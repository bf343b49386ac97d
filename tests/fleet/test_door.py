# SPDX-License-Identifier: Apache-2.0
"""The door: what comes in, what is turned away, with which words, and what it remembers."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest

from adatoken3d_ros.fleet import door, tokens
from adatoken3d_ros.fleet.door import ROBOT, SCENE, Door, DoorConfig, Refused

Asked = Callable[..., tuple[int, dict[str, Any], dict[str, str]]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of bytes that came."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps({"size": size}).encode()})


def asking(config: DoorConfig, clock: Callable[[], float] = lambda: 0.0) -> Asked:
    """A client of `echo` behind a door: (status, body, headers) of each request."""
    app = door.guard(echo, config, clock)

    def ask(*parts: bytes, length: bool = True, **headers: str) -> tuple[int, dict[str, Any], dict[str, str]]:
        named = {ROBOT: "r1", **{name.replace("_", "-"): value for name, value in headers.items() if name != "scene"}}
        if "scene" in headers:
            named[SCENE] = headers["scene"]
        if length:
            named.setdefault("content-length", str(sum(map(len, parts))))
        waiting = list(parts) or [b""]
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "headers": [(k.encode(), v.encode("latin-1")) for k, v in named.items()]}
        asyncio.run(app(scope, receive, send))
        start, body = sent
        return start["status"], json.loads(body["body"]), {k.decode(): v.decode() for k, v in start["headers"]}

    return ask


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer secre", "Bearer secret2", "Basic secret", "secret", "Bearer é"]
)
def test_without_the_token_nobody_comes_in(given: str) -> None:
    ask = asking(DoorConfig(token="secret"))
    status, told, headers = ask(**({"authorization": given} if given else {}))
    assert (status, told["error"], headers["www-authenticate"]) == (401, "token", "Bearer")
    assert "secret" not in told["message"]
    assert ask(authorization="Bearer secret")[0] == ask(authorization="bearer  secret ")[0] == 200


def test_a_token_of_ones_own_is_bound_to_a_name() -> None:
    """Nobody comes in by another's name, or by one that has no token, and all are told the same."""
    ask = asking(DoorConfig(tokens={"r1": "first", "r2": "second"}))
    assert ask(authorization="Bearer first")[0] == ask(authorization="Bearer second", **{ROBOT: "r2"})[0] == 200
    for name, token in (("r2", "first"), ("r1", "second"), ("r3", "first"), ("r3", ""), ("", "first"), ("r1", "")):
        status, told, _ = ask(authorization=f"Bearer {token}", **{ROBOT: name})
        assert (status, told["error"]) == (401, "token")
        assert told["message"] == f"the request bears no token, or not that of {name!r} (engine.token, engine.robot)"
    with pytest.raises(ValueError, match="cannot both hold"):
        DoorConfig(token="one", tokens={"r1": "first"})
    assert "secret" not in repr(DoorConfig(token="secret")) + repr(DoorConfig(tokens={"r1": "secret"}))


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the library's function, of values that are equally long whatever was sent."""
    seen = []

    def compare(one: bytes, other: bytes) -> bool:
        seen.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare)
    assert tokens.same("abc", "abc") and not tokens.same("", "abc") and not tokens.same("a" * 5000, "abc")
    assert seen == [(32, 32)] * 3


def test_a_body_is_bounded_by_what_it_says_and_by_what_comes() -> None:
    ask = asking(DoorConfig(max_body=10))
    assert ask(b"x" * 10)[:2] == (200, {"size": 10})
    status, told, _ = ask(b"x" * 11)
    assert (status, told) == (413, {"error": "size", "message": "the body has 11 bytes, 10 are allowed"})
    assert ask(b"x" * 6, b"x" * 4, length=False)[:2] == (200, {"size": 10})
    status, told, _ = ask(b"x" * 6, b"x" * 5, length=False)
    assert (status, told["message"]) == (413, "the body has more than 10 bytes, 10 are allowed")
    assert ask(content_length="-1")[0] == ask(content_length="ten")[0] == 400
    assert ask(content_length="9" * 5000)[0] == 413


def test_a_robot_may_ask_so_often() -> None:
    """A burst of 3 and 2 a second: after three requests the fourth waits half a second, another robot does not."""
    now = [100.0]
    ask = asking(DoorConfig(rate=2.0, burst=3), lambda: now[0])
    assert [ask()[0] for _ in range(3)] == [200] * 3
    status, told, headers = ask()
    assert (status, told["error"], headers["retry-after"]) == (429, "rate", "1")
    assert told["message"] == "r1 asks more often than 2 times a second; in 0.500 s it may again"
    assert ask(**{ROBOT: "r2"})[0] == 200
    now[0] += 0.5
    assert [ask()[0] for _ in range(2)] == [200, 429]
    now[0] += 1000.0
    assert [ask()[0] for _ in range(4)] == [200, 200, 200, 429]


def test_a_robot_has_so_many_scenes_and_none_of_another() -> None:
    now = [0.0]
    ask = asking(DoorConfig(scenes=2, idle_s=60.0), lambda: now[0])
    assert [ask(scene=name)[0] for name in ("a", "b", "a")] == [200] * 3
    status, told, headers = ask(scene="c")
    assert (status, told["error"], headers["retry-after"]) == (429, "scenes", "60")
    assert told["message"] == "r1 has 2 scenes already, 2 are allowed at a time"
    assert ask(scene="a", **{ROBOT: "r2"})[:2] == (403, {"error": "scene", "message": "scene a is not r2's"})
    now[0] = 59.0
    assert ask(scene="a")[0] == 200
    now[0] = 61.0  # b was last here 61 s ago
    assert [ask(scene="c")[0], ask(scene="b")[0]] == [200, 429]
    assert ask(scene="b", **{ROBOT: "r2"})[0] == 200  # it is nobody's now


def test_what_the_door_remembers_is_bounded() -> None:
    now = [0.0]
    looked = Door(DoorConfig(robots=2, idle_s=10.0), lambda: now[0])
    looked.check({ROBOT: "r1", SCENE: "a"})
    looked.check({ROBOT: "r2"})
    with pytest.raises(Refused, match="2 robots are here already; r3 has to wait") as refused:
        looked.check({ROBOT: "r3"})
    assert refused.value.retry_s == 10.0
    now[0] = 10.0
    looked.check({ROBOT: "r3", SCENE: "a"})  # r1 has gone, and its scene with it
    with pytest.raises(Refused, match="scene a is not r2's"):
        looked.check({ROBOT: "r2", SCENE: "a"})


@pytest.mark.parametrize("name", ["", " ", "../x", "a b", "é", "x" * 129, "a\nb"])
def test_names_are_plain(name: str) -> None:
    with pytest.raises(Refused, match=f"{ROBOT} .* is no robot's name") as refused:
        Door(DoorConfig()).check({ROBOT: name})
    assert refused.value.status == 400
    if name:
        with pytest.raises(Refused, match=f"{SCENE} .* is no scene's id"):
            Door(DoorConfig()).check({ROBOT: "r1", SCENE: name})


def test_what_is_no_request_does_not_come_in() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(door.guard(echo, DoorConfig())({"type": "websocket", "headers": []}, None, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("name", ["max_body", "rate", "burst", "scenes", "robots", "idle_s"])
def test_bounds_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0 must be positive"):
        DoorConfig(**{name: 0})
