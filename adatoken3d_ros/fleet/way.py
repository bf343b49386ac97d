# SPDX-License-Identifier: Apache-2.0
"""How long the way to a shared engine and back takes, by what was measured lately."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from statistics import median

_LATELY = 9  # measurements: the middle one follows a link within five of them, and not what was slow once


class Way:
    """Seconds that the network has of a question's budget. Any thread."""

    def __init__(self) -> None:
        self._exchanges: deque[float] = deque(maxlen=_LATELY)
        self._answers: deque[float] = deque(maxlen=_LATELY)

    @property
    def seconds(self) -> float:
        """There, with all that a scene is described by, and back with a whole answer; 0 before anything is known."""
        return _middle(self._exchanges) + _middle(self._answers)

    def met(self, seconds: float) -> None:
        """A first request took so long: what was measured before says nothing any more."""
        self._exchanges.clear()
        self._answers.clear()
        self._exchanges.append(seconds)

    def exchanged(self, seconds: float) -> None:
        """So long it took from connecting to the first of a response, for a request without bodies."""
        self._exchanges.append(seconds)

    def answered(self, seconds: float) -> None:
        """So long a question took, but for what the engine needed; what no exchange takes is the rest of its answer."""
        self._answers.append(max(0.0, seconds - _middle(self._exchanges)))

    def refused(self) -> None:
        """A budget was too short, so no answer tells whether they take so long still: the oldest is forgotten."""
        with suppress(IndexError):
            self._answers.popleft()


def _middle(measured: deque[float]) -> float:
    known = tuple(measured)  # at once: another thread may add to it
    return median(known) if known else 0.0
