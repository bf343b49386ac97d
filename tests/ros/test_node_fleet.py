# SPDX-License-Identifier: Apache-2.0
"""A node whose engine is elsewhere, over real DDS: its answers are those of a node with the engine inside, while the
engine is killed and comes back, too."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from live_node import Live

from adatoken3d_ros.engine.answer import Status
from tests.engine.scenes import room_frame

pytest.importorskip("uvicorn", reason="without the extra fleet")
_SERVER = """
import sys
import uvicorn
from adatoken3d_ros.fleet.replica import Replica, ReplicaConfig

path, port = sys.argv[1:]
replica = Replica(ReplicaConfig({"model.path": path, "budget.warm_up": False, "model.self_test": False}))
server = uvicorn.Server(uvicorn.Config(replica, "127.0.0.1", int(port), log_level="error", lifespan="off"))

class Telling(type(server)):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

server.__class__ = Telling
server.run()
"""


@pytest.fixture
def start_server(tiny_model: Path) -> Iterator[Callable[[int], tuple[Any, int]]]:
    """Starts an engine in a process of its own on a port, 0 for any; waits until it listens."""
    started: list[subprocess.Popen[str]] = []

    def start(port: int = 0) -> tuple[Any, int]:
        command = [sys.executable, "-c", _SERVER, str(tiny_model), str(port)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def activate(live: Live, **settings: Any) -> None:
    live.put({"max_new_tokens": 4, "scene.min_sharpness": 0.0, **settings})
    assert live.configure(), live.node.engine.problem
    live.node.trigger_activate()


def feed(live: Live, frames: list[Any]) -> None:
    """The same key frames for each node, in the worker's thread."""
    queue = live.node.engine.queue
    assert queue is not None

    def show(scene: Any) -> None:
        for frame in frames:
            scene.observe(frame)
        scene.encode_pending()

    future = queue.call(show)
    live.wait(future.done, "the frames")
    future.result()


@pytest.mark.timeout(240)
def test_a_node_answers_as_with_the_engine_inside_and_outlives_a_killed_one(
    live: Live, start_server: Callable[..., tuple[Any, int]]
) -> None:
    room_frames = [room_frame(index) for index in range(3)]
    activate(live)
    feed(live, room_frames)
    inside = live.ask(max_new_tokens=4)
    assert inside.status in (Status.OK, Status.TRUNCATED)
    server, port = start_server()
    for encode in ("picture", "local"):
        live.node.trigger_deactivate()
        live.node.trigger_cleanup()
        activate(live, **{"engine.url": f"http://127.0.0.1:{port}", "engine.encode": encode})
        assert live.node.engine.model_id == inside.model_id
        feed(live, room_frames)
        answer = live.ask(max_new_tokens=4)
        for name in ("status", "model_id", "strategy", "spatial_tokens", "retained_tokens", "verdict"):
            assert getattr(answer, name) == getattr(inside, name), (encode, name, answer.status_message)
    assert answer.text == inside.text  # a JPEG of noise is not the picture
    server.kill()  # -9
    server.wait()
    late = live.ask(max_new_tokens=4, latency_budget_ms=2000.0)
    assert late.status == Status.ERROR and "cannot be reached" in late.status_message
    start_server(port)
    again = live.ask(max_new_tokens=4)
    assert (again.status, again.text) == (answer.status, answer.text), again.status_message
