# SPDX-License-Identifier: Apache-2.0
"""The door of the service: who comes in, how often, with how much, and about which scenes.

Plain ASGI around the service's own application; it knows nothing of Ray. Whoever is turned away gets a status and a
JSON object with the keys `error` (a word) and `message` (a sentence that names the value and the bound).
"""

from __future__ import annotations

import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from adatoken3d_ros.fleet.tokens import bearer, refusal, same
from adatoken3d_ros.text import quoted

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

ROBOT = "x-robot"  # header: the robot's name
SCENE = "serve_multiplexed_model_id"  # header: the scene's id, by which Ray Serve finds the replica that holds it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/~-]{0,127}")


@dataclass(frozen=True)
class DoorConfig:
    """The bounds.

    Attributes:
        token: what every request has to bear; empty: nobody is asked for one.
        tokens: in its place, by robot: whoever is called otherwise, or bears another's, does not come in.
        max_body: bytes of a request's body.
        rate, burst: requests a second of a robot in the long run, and at once.
        scenes: of a robot at a time. robots: at a time.
        idle_s: after so many seconds without a request a scene, or a robot, makes room for another.
    """

    token: str = field(default="", repr=False)
    tokens: Mapping[str, str] = field(default_factory=dict, repr=False)
    max_body: int = 16 * 2**20
    rate: float = 50.0
    burst: int = 200
    scenes: int = 16
    robots: int = 256
    idle_s: float = 600.0

    @property
    def asks(self) -> bool:
        """Whether nobody comes in without a token."""
        return bool(self.token or self.tokens)

    def __post_init__(self) -> None:
        if self.token and self.tokens:
            raise ValueError("a token for all robots and one for each cannot both hold")
        for name in ("max_body", "rate", "burst", "scenes", "robots", "idle_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive")


class Refused(Exception):
    """A request that does not come in: an HTTP status, a word and a sentence; retry_s: when it would, if ever."""

    def __init__(self, status: int, error: str, message: str, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.status, self.error, self.retry_s = status, error, retry_s


def guard(app: App, config: DoorConfig, clock: Callable[[], float] = time.monotonic) -> App:
    """The application behind a door."""
    door = Door(config, clock)

    async def guarded(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        started = False

        async def told(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
            door.check(headers)
            await app(scope, counted(receive, config.max_body), told)
        except Refused as refused:
            if started:  # too late for a status; the connection ends
                raise
            await respond(send, refused)

    return guarded


@dataclass
class _Robot:
    """What the door remembers of a robot: requests that it may still make, when it and its scenes were here."""

    left: float
    seen: float
    scenes: OrderedDict[str, float] = field(default_factory=OrderedDict)


class Door:
    """Looks at the headers of each request. What it remembers is bounded by its configuration."""

    def __init__(self, config: DoorConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._robots: OrderedDict[str, _Robot] = OrderedDict()
        self._owners: dict[str, str] = {}

    def check(self, headers: MutableMapping[str, str]) -> None:
        """Lets a request in, by its headers with names in small letters, or raises Refused."""
        config, now = self._config, self._clock()
        name = headers.get(ROBOT, "")
        expected = config.tokens.get(name, "") if config.tokens else config.token
        given = bearer(headers.get("authorization", ""))
        if config.asks and not (same(given, expected) and expected):
            raise Refused(401, "token", refusal(name))
        length = headers.get("content-length", "0")
        if not length.isdecimal():
            raise Refused(400, "length", f"content-length {quoted(length)} is no number")
        if len(length) > 19 or int(length) > config.max_body:
            raise too_large(length, config.max_body)
        if not _NAME.fullmatch(name):
            raise Refused(400, "robot", f"{ROBOT} {quoted(name)} is no robot's name: 1 to 128 of A-Z a-z 0-9 . _ / ~ -")
        robot = self._robot(name, now)
        robot.left = min(float(config.burst), robot.left + (now - robot.seen) * config.rate)
        robot.seen = now
        if robot.left < 1.0:
            wait = (1.0 - robot.left) / config.rate
            message = f"{name} asks more often than {config.rate:g} times a second; in {wait:.3f} s it may again"
            raise Refused(429, "rate", message, wait)
        robot.left -= 1.0
        if scene := headers.get(SCENE, ""):
            self._scene(name, robot, scene, now)

    def _robot(self, name: str, now: float) -> _Robot:
        if (robot := self._robots.get(name)) is None:
            if len(self._robots) >= self._config.robots:
                oldest = next(iter(self._robots))
                if (wait := self._robots[oldest].seen + self._config.idle_s - now) > 0:
                    message = f"{self._config.robots} robots are here already; {name} has to wait until one has gone"
                    raise Refused(429, "robots", message, wait)
                for scene in self._robots.pop(oldest).scenes:
                    del self._owners[scene]
            robot = self._robots[name] = _Robot(float(self._config.burst), now)
        self._robots.move_to_end(name)
        return robot

    def _scene(self, name: str, robot: _Robot, scene: str, now: float) -> None:
        if not _NAME.fullmatch(scene):
            raise Refused(400, "scene", f"{SCENE} {quoted(scene)} is no scene's id: 1 to 128 of A-Z a-z 0-9 . _ / ~ -")
        if self._owners.get(scene, name) != name:
            raise Refused(403, "scene", f"scene {scene} is not {name}'s")
        if scene not in robot.scenes and len(robot.scenes) >= self._config.scenes:
            oldest = next(iter(robot.scenes))
            if (wait := robot.scenes[oldest] + self._config.idle_s - now) > 0:
                message = f"{name} has {len(robot.scenes)} scenes already, {self._config.scenes} are allowed at a time"
                raise Refused(429, "scenes", message, wait)
            del robot.scenes[oldest], self._owners[oldest]
        robot.scenes[scene], self._owners[scene] = now, name
        robot.scenes.move_to_end(scene)


def counted(receive: Receive, limit: int) -> Receive:
    """`receive` that raises Refused once more bytes have come than `limit`: a body need not say how long it is."""
    total = 0

    async def counting() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise too_large(f"more than {limit}", limit)
        return message

    return counting


def too_large(size: str, limit: int) -> Refused:
    """The refusal of a body of `size` bytes."""
    return Refused(413, "size", f"the body has {size[:24]} bytes, {limit} are allowed")


async def respond(send: Send, refused: Refused) -> None:
    """Tells who is turned away why."""
    body = json.dumps({"error": refused.error, "message": str(refused)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_s is not None:
        headers.append((b"retry-after", str(max(1, -int(-refused.retry_s // 1))).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
