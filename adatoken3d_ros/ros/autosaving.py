# SPDX-License-Identifier: Apache-2.0
"""The node's scene in files that are written by themselves, and taken up when it starts again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from adatoken3d_ros.engine.autosave import State, Versions, state_of
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.scene_services import DIRECTORY, scene_directory
from adatoken3d_ros.text import described

PERIOD, KEPT, RESTORE = "scene.autosave_period", "scene.autosave_versions", "scene.restore"
TICK = 0.25  # seconds between two looks at whether it is time


class Autosave:
    """Has the scene packed by the worker, for milliseconds, and written by a thread of its own.

    Args:
        node: its name is that of the files. group: of the timer.
        parameters: the node's.
        engine: whose worker owns the scene.
        clock: seconds, monotonic.

    Attributes:
        versions: the node's files.
        saved: files that were written.
    """

    def __init__(
        self,
        node: Node,
        group: CallbackGroup,
        parameters: Parameters,
        engine: EngineOwner,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._engine = engine
        self._clock = clock
        self._last = clock()
        self._state: State | None = None
        self._busy = threading.Lock()
        self.saved = 0
        self.versions = Versions(scene_directory(parameters[DIRECTORY]), node.get_fully_qualified_name())
        engine.versions = self.versions
        # Steady, so that simulated time that stands still does not keep a scene from being saved.
        node.create_timer(TICK, self.tick, callback_group=group, clock=Clock(clock_type=ClockType.STEADY_TIME))

    @property
    def busy(self) -> bool:
        """Whether the scene is being saved."""
        return self._busy.locked()

    def tick(self) -> None:
        """Begins to save the scene if it is time."""
        period, queue = self._parameters[PERIOD], self._engine.queue
        if not period or queue is None or self._clock() - self._last < period or not self._busy.acquire(blocking=False):
            return
        self._last = self._clock()
        queue.call(self._pack, chore=True).add_done_callback(self._packed)

    def finish(self, seconds: float = 0.5) -> None:
        """Saves what has changed since, before the scene is given up; waits no longer than this for the worker."""
        queue = self._engine.queue
        if not self._parameters[PERIOD] or queue is None or not self._busy.acquire(timeout=seconds):
            return
        try:
            found = queue.call(partial(self._pack, ending=True)).result(seconds)
        except Exception:  # the worker is busy or has ended: what was saved last is there
            found = None
        if found is None:
            self._busy.release()
        else:
            state, packed = found
            self._write(state, packed, self._parameters[KEPT])

    def _pack(self, scene: Any, *, ending: bool = False) -> Any:
        """Runs in the worker's thread; None where there is nothing new."""
        state = state_of(scene)
        if not len(scene.memory) or not state.is_new(self._state, ending=ending):
            return None
        return state, scene.memory.packed(self._parameters["scene.frame_id"])

    def _packed(self, future: Any) -> None:
        """Runs in the worker's thread."""
        if future.cancelled() or future.exception() is not None or future.result() is None:
            if not future.cancelled() and (error := future.exception()) is not None:
                self._failed(error)
            self._busy.release()
            return
        state, packed = future.result()
        kept = self._parameters[KEPT]
        threading.Thread(
            target=self._write, args=(state, packed, kept), name="adatoken3d-autosave", daemon=True
        ).start()

    def _write(self, state: State, packed: Any, kept: int) -> None:
        try:
            self.versions.write(packed, kept)
            self._state = state
            self.saved += 1
        except Exception as error:  # a full disk costs the file, not the thread or the next one
            self._failed(error)
        finally:
            self._busy.release()

    def _failed(self, error: BaseException) -> None:
        self._node.get_logger().warning(
            f"the scene could not be saved: {described(error)}", throttle_duration_sec=WARN_SECONDS
        )
