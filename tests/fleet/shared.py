# SPDX-License-Identifier: Apache-2.0
"""An engine behind HTTP in a thread of the tests' process; Ray is not needed for that."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from adatoken3d_ros.settings import Settings

TOKEN = "only-for-tests"
LIMIT = 30.0


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
