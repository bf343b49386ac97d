# SPDX-License-Identifier: Apache-2.0
"""A scene whose questions and views take until a gate is opened, for tests of the thread that owns it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.scene.keyframes import Verdict

LIMIT = 20.0  # seconds until a test that hangs fails


class GatedScene:
    """Scene and engine in one: answers when told to; notes what it was asked and shown."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.started = threading.Semaphore(0)
        self.release = threading.Semaphore(0)
        self.work_ahead = False
        self.preparing = threading.Semaphore(0)
        self.encoding = threading.Semaphore(0)
        self.encodes_endlessly = False
        self.arrived = -1.0

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Works until it is told to stop, or breaks."""
        self.log.append("prepare")
        self.preparing.release()
        if self.work_ahead == "broken":
            raise RuntimeError("no memory left")
        while not should_stop():
            pass

    def observe(self, frame: Any) -> Verdict:
        self.log.append(f"observe {frame.stamp_ns}")
        return Verdict.KEY_FRAME

    def encode_pending(self, should_stop: Callable[[], bool]) -> int:
        """Where it is said to be endless, it works until it is told to stop, or the test must have failed."""
        self.log.append("encode")
        self.encoding.release()
        end = time.monotonic() + 2 * LIMIT
        while self.encodes_endlessly and not should_stop() and time.monotonic() < end:
            pass
        return 1

    @property
    def runtime(self) -> GatedScene:
        return self

    def ask(
        self,
        scene: Any,
        question: Question,
        *,
        should_stop: Callable[[], bool],
        arrived: float,
        on_text: Callable[[str, int], None] | None,
        on_stage: Callable[[str], None],
    ) -> Answer:
        self.arrived = arrived
        on_stage("prefill")
        if on_text is not None:
            on_text("a chair", 2)
            self.log.append("text")
        self.started.release()
        if question.text == "explode":
            raise MemoryError("no memory left")
        assert self.release.acquire(timeout=LIMIT)
        self.log.append(f"ask {question.text}")
        return Answer(question, Status.CANCELLED if should_stop() else Status.OK)


def ask_and_wait_until_it_runs(queue: SceneQueue, scene: GatedScene, text: str) -> Any:
    ticket = queue.submit(Question(text))
    assert scene.started.acquire(timeout=LIMIT)
    return ticket
