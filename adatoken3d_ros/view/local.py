# SPDX-License-Identifier: Apache-2.0
"""The view's source in this process: an engine in a thread, and a thread that shows it frames."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError
from functools import partial
from typing import Any

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import StageBegan, TextSoFar
from adatoken3d_ros.engine.loading import open_scene, strategy_names, strategy_of
from adatoken3d_ros.engine.pictures import Pictures
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.tickets import Ticket
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.settings import Settings
from adatoken3d_ros.text import shown
from adatoken3d_ros.view.report import Reported, reported
from adatoken3d_ros.view.source import Ages, Shown, SourceError, Told

logger = logging.getLogger(__name__)


class LocalSource:
    """See `Source`.

    Args:
        engine: answers; its thread is this object's.
        settings: of the scene.
        frames: that are shown to it, one after the other, while questions are answered.
        record: an answer under the names of its message.
        command: the line that asks a question again by a strategy.
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        frames: Iterable[PosedFrame],
        record: Callable[[Answer], dict[str, Any]],
        command: Callable[[Question, str], str] = lambda question, strategy: "adatoken3d ask",
    ) -> None:
        usual = settings["strategy"]
        self.strategies = tuple(dict.fromkeys((usual, *strategy_names(engine))))
        self.budget_ms = float(settings["latency_budget_ms"])
        self.click_question = str(settings["click_question"])
        self._command = command
        self.problem = ""  # why no more frames come; empty at their end
        self._record = record
        self._pictures, self._ages, self._shown = Pictures(), Ages(), Shown()
        self._ticket: Ticket | None = None
        self._closed = threading.Event()
        self._worker = Worker(lambda: engine)
        self._queue: SceneQueue = self._worker.open(lambda engine: open_scene(engine, settings))
        self._worker.start()
        self._feeder = threading.Thread(target=self._feed, args=(frames,), name="adatoken3d-frames", daemon=True)
        self._feeder.start()

    def scene(self) -> Shown:
        return self._shown

    def ask(self, question: Question, strategy: str, on_text: Told, on_stage: Told) -> Reported:
        def use(scene: Scene) -> None:
            scene.set_strategy(strategy_of(scene.runtime, strategy or self.strategies[0]))

        def listen(event: StageBegan | TextSoFar) -> None:
            if isinstance(event, TextSoFar):
                on_text(event.text)
            else:
                on_stage(event.stage)

        try:
            self._ticket = self._queue.submit(question, before=use, listener=listen)
            answer = self._ticket.result.result()
            return self._queue.call(lambda scene: reported(self._record(answer), answer.report, scene)).result()
        except (RuntimeError, CancelledError) as error:
            raise SourceError(shown(error)) from error
        finally:
            self._ticket = None

    def command(self, question: Question, strategy: str) -> str:
        return self._command(question, strategy)

    def cancel(self) -> None:
        if (ticket := self._ticket) is not None:
            ticket.cancel("stopped in the view")

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until all frames have been shown; False if they have not."""
        self._feeder.join(timeout)
        return not self._feeder.is_alive()

    def close(self) -> None:
        self._closed.set()
        self._worker.stop(5.0)

    def _feed(self, frames: Iterable[PosedFrame]) -> None:
        """Each frame waits for the one before; a question that comes waits for one frame at most that waits already."""
        try:
            for frame in frames:
                if self._closed.is_set():
                    return
                self._queue.call(partial(self._take, frame)).result()
        except Exception as error:
            if not self._closed.is_set():
                self.problem = shown(error)
                logger.error("no more frames: %s", self.problem)

    def _take(self, frame: PosedFrame, scene: Scene) -> None:
        """In the thread of the engine."""
        scene.observe(frame)
        scene.encode_pending()
        if frame.stamp_ns not in scene.poses:
            return
        self._pictures.add(frame, scene)
        tokens = scene.tokens()
        if tokens is None:
            return
        xyz, count = tokens.xyz.float().cpu().numpy(), tokens.count.cpu().numpy()
        self._shown = Shown(
            xyz,
            tokens.rgb.cpu().numpy(),
            self._ages.of(xyz, count, scene.stamp_ns),
            self._pictures.of(scene),
            scene.stamp_ns,
        )
