# SPDX-License-Identifier: Apache-2.0
"""Replicas under a real Ray: a scene's questions come to one of them, and one that is killed costs no question."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.loading import open_scene
from adatoken3d_ros.fleet.loading import load_engine
from tests.architectures import NAMES
from tests.engine.scenes import room_frame
from tests.fleet.shared import LIMIT, TOKEN, free_port, plain


@pytest.fixture(scope="module")
def served(local_ray: Any, tiny_of: Callable[[str], Path]) -> Iterator[tuple[str, Path]]:
    """Where two replicas are, and their model."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    from adatoken3d_ros.fleet.deployment import application
    from adatoken3d_ros.fleet.door import DoorConfig
    from adatoken3d_ros.fleet.replica import ReplicaConfig

    path, port = tiny_of(NAMES[0]), free_port()
    config = ReplicaConfig(dict(plain(path)), replicas=2, door=DoorConfig(token=TOKEN), max_scenes=8)
    serve.shutdown()  # which another module may have left there, with a port of its own
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(application(config), name="fleet", route_prefix="/")
    yield f"http://127.0.0.1:{port}", path
    serve.shutdown()


def replicas() -> list[int]:
    """Processes of this Ray's replicas."""
    import psutil

    found = []
    for one in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ends meanwhile
            if one.status() != psutil.STATUS_ZOMBIE and "".join(one.cmdline()).startswith("ray::ServeReplica:fleet"):
                found.append(one.pid)
    return sorted(found)


def test_a_killed_replica_costs_no_question_and_its_scenes_are_made_whole(served: tuple[str, Path]) -> None:
    url, path = served
    robots = []
    for number in range(3):
        settings = plain(path, **{"engine.url": url, "engine.token": TOKEN, "engine.robot": f"robot{number}"})
        engine = load_engine(settings)
        scene = open_scene(engine, settings)
        for index in range(2):
            scene.observe(room_frame(index))
        robots.append((engine, scene))
    question = Question("What is there?", max_new_tokens=3)
    first = [engine.ask(scene, question) for engine, scene in robots]
    assert all(answer.status.answered for answer in first), [answer.status_message for answer in first]
    before = replicas()
    assert len(before) == 2
    answers: list[Any] = []
    asking = threading.Barrier(len(robots) + 1)

    def ask_on(engine: Any, scene: Any) -> None:
        asking.wait(LIMIT)
        answers.extend(engine.ask(scene, question) for _ in range(20))

    threads = [threading.Thread(target=ask_on, args=pair) for pair in robots]
    for thread in threads:
        thread.start()
    asking.wait(LIMIT)
    os.kill(before[0], signal.SIGKILL)
    for thread in threads:
        thread.join(4 * LIMIT)
        assert not thread.is_alive()
    assert len(answers) == 60
    # Each is answered, or says that the engine did not: nobody waits for ever.
    assert {answer.status for answer in answers} <= {Status.OK, Status.TRUNCATED, Status.UNSURE, Status.ERROR}
    last = [engine.ask(scene, question) for engine, scene in robots]
    for answer, again in zip(first, last, strict=True):
        assert again.status == answer.status and again.text == answer.text, again.status_message
        assert again.spatial_tokens == answer.spatial_tokens
