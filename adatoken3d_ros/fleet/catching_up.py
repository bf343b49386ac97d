# SPDX-License-Identifier: Apache-2.0
"""While nobody asks, scenes become what their robots have said: a view at a time, of each in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from adatoken3d_ros.fleet.scenes import Held
from adatoken3d_ros.fleet.wire import Manifest


class CatchingUp:
    """The scenes that are behind. Not thread safe: of the loop's thread.

    The worker has one view of them at a time: what it had itself it would make between any two questions.

    Args:
        busy: whether somebody asks. soon: has a function called with these values, in the loop's thread.
    """

    def __init__(self, busy: Callable[[], bool], soon: Callable[..., object]) -> None:
        self._busy, self._soon = busy, soon
        self._behind: deque[Held] = deque()
        self._making = False

    def told(self, held: Held, scene: Manifest) -> None:
        """A scene is to become this."""
        held.told = scene
        if held not in self._behind:
            self._behind.append(held)
        self.go_on()

    def go_on(self) -> None:
        """Gives the worker the next view, unless it has one or somebody asks."""
        if self._behind and not self._making and not self._busy():
            held, self._making = self._behind.popleft(), True
            one = held.queue.call(held.catch_up, chore=True)
            one.add_done_callback(lambda future: self._soon(self._made, held, future))

    def gone(self, held: Held) -> None:
        """A scene was given up."""
        with suppress(ValueError):
            self._behind.remove(held)

    def _made(self, held: Held, one: Future[bool]) -> None:
        self._making = False
        if one.exception() is None and one.result() and held not in self._behind:
            self._behind.append(held)
        self.go_on()
