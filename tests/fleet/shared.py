# SPDX-License-Identifier: Apache-2.0
"""An engine behind HTTP in a thread of the tests' process; Ray is not needed for that."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from adatoken3d_ros.settings import Settings

TOKEN = "only-for-tests"
LIMIT = 30.0


def free_port() -> int:
    """Of this machine, at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def listening(app: Any, port: int = 0) -> Iterator[int]:
    """An ASGI application on a port of this machine."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + LIMIT
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        thread.join(LIMIT)


def plain(path: Any, **more: Any) -> Settings:
    """Settings of a tiny checkpoint, by which every frame that is shown counts."""
    return Settings({
        "model.path": str(path),
        "model.self_test": False,
        "budget.warm_up": False,
        "max_new_tokens": 4,
        "scene.min_gain": 0.0,
        "scene.min_sharpness": 0.0,
        "scene.max_disagreement": 0.0,
        **more,
    })  # fmt: skip


def unlike(one: Any, other: Any, tolerance: float = 0.0) -> list[str]:
    """Names of the fields of two values of one kind, and of what is in them, that differ; numbers that are not whole
    may by this share of the larger one. NaN is like NaN."""
    if type(one) is not type(other) and not (isinstance(one, (int, float)) and isinstance(other, (int, float))):
        return [f": {one!r}, {other!r}"]
    if isinstance(one, np.ndarray):
        if one.dtype != other.dtype or one.shape != other.shape:
            return [f": {one.dtype} {one.shape}, {other.dtype} {other.shape}"]
        near = np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
        if not near and one.dtype.kind == "f":
            near = np.allclose(one, other, tolerance, tolerance * max(1e-300, float(np.abs(one).max())), equal_nan=True)
        return [] if near else [f": {one}, {other}"]
    if is_dataclass(one):
        names = [field.name for field in fields(one)]
        found = {name: unlike(getattr(one, name), getattr(other, name), tolerance) for name in names}
        return [f".{name}{what}" for name, all_of_it in found.items() for what in all_of_it]
    if isinstance(one, tuple):
        if len(one) != len(other):
            return [f": {one!r}, {other!r}"]
        pairs = enumerate(zip(one, other, strict=True))
        return [f"[{place}]{what}" for place, (a, b) in pairs for what in unlike(a, b, tolerance)]
    if isinstance(one, float):
        same = one == other or (math.isnan(one) and math.isnan(other)) or math.isclose(one, other, rel_tol=tolerance)
        return [] if same else [f": {one!r}, {other!r}"]
    return [] if one == other else [f": {one!r}, {other!r}"]


def held_up(replica: Any, monkeypatch: Any) -> tuple[threading.Event, threading.Event]:
    """Has a replica wait before it turns to a question: what is set once it has one, and what lets it go on."""
    there, go_on, before = threading.Event(), threading.Event(), replica._before
    monkeypatch.setattr(replica, "_before", lambda *of: (there.set(), go_on.wait(LIMIT), before(*of)))
    return there, go_on
