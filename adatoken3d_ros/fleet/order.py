# SPDX-License-Identifier: Apache-2.0
"""In which order the questions of many robots are answered: the earliest deadline first, and nobody starves.

A question counts as due when its budget ends, at the latest `patience` seconds after it came; without a budget, then.
So what comes later than `patience` after a question never overtakes it. As a robot may have only so many questions
waiting, a question waits no longer than `patience` and the time of robots x limit answers, whatever the others ask.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 10.0  # seconds
_REMEMBERED = 32  # answers of a robot whose times are remembered


@dataclass(frozen=True, eq=False)
class Waiting(Generic[T]):
    """A question that waits.

    Attributes:
        what: whatever it is to its asker. robot: whose. arrived: when it came here, seconds.
        deadline: when its budget ends, on the same clock; infinite without one.
    """

    what: T
    robot: str
    arrived: float
    deadline: float = math.inf
    number: int = field(default=0)

    def due(self, patience: float) -> float:
        """When it counts as due."""
        return min(self.deadline, self.arrived + patience)


class Full(Exception):
    """A question that is not taken; the message says why."""


class Line(Generic[T]):
    """The questions that wait, and how long they are likely to. Not thread safe.

    Args:
        patience: see the module, seconds. limit: questions of one robot that may wait.
    """

    def __init__(self, patience: float = PATIENCE, limit: int = 8) -> None:
        self.patience, self.limit = patience, limit
        self._waiting: list[Waiting[T]] = []
        self._count = 0
        self._took: dict[str, deque[float]] = {}
        self.running: Waiting[T] | None = None
        self.began = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def expected(self, robot: str) -> float:
        """Seconds that an answer to a robot is likely to take, by its last ones, else by all; 0 before any."""
        own = self._took.get(robot)
        known = own or [seconds for took in self._took.values() for seconds in took]
        return median(known) if known else 0.0

    def ahead(self, entry: Waiting[T], now: float) -> tuple[int, float]:
        """How many questions are answered before `entry`, and the seconds that this is likely to take."""
        before = [one for one in self._waiting if self._key(one) < self._key(entry)]
        seconds = self.left(now) + sum(self.expected(one.robot) for one in before)
        return len(before) + (self.running is not None), seconds

    def left(self, now: float) -> float:
        """Seconds that the question that is being answered, if any, is likely to take still."""
        return 0.0 if self.running is None else max(0.0, self.expected(self.running.robot) - (now - self.began))

    def join(self, what: T, robot: str, now: float, deadline: float = math.inf) -> Waiting[T]:
        """A question comes.

        Raises:
            Full: where its robot has `limit` waiting already, and where those before it are likely to take longer than
                its budget; the message says how long.
        """
        if (mine := sum(one.robot == robot for one in self._waiting)) >= self.limit:
            raise Full(f"{mine} questions of {robot} are waiting already")
        entry = Waiting(what, robot, now, deadline, self._count)
        count, seconds = self.ahead(entry, now)
        if count and now + seconds >= deadline:
            would, left = (seconds + self.expected(robot)) * 1e3, max(0.0, deadline - now) * 1e3
            raise Full(
                f"{count} questions come before it: it would take {would:.0f} ms from now on, {left:.0f} ms are left"
            )
        self._count += 1
        self._waiting.append(entry)
        return entry

    def next(self, now: float) -> Waiting[T] | None:
        """Takes the question that is answered next, unless one is; `ended` says that it was."""
        if self.running is not None or not self._waiting:
            return None
        self.running, self.began = min(self._waiting, key=self._key), now
        self._waiting.remove(self.running)
        return self.running

    def ended(self, now: float, *, measured: bool = True) -> None:
        """The question that was taken has its answer; `measured`: what it took says what others will."""
        assert self.running is not None
        if measured:
            took = self._took.setdefault(self.running.robot, deque(maxlen=_REMEMBERED))
            took.append(now - self.began)
        self.running = None

    def leave(self, entries: Iterable[Waiting[T]]) -> None:
        """Questions that nobody waits for any more."""
        gone = {id(entry) for entry in entries}
        self._waiting = [entry for entry in self._waiting if id(entry) not in gone]

    def forget(self, robot: str) -> None:
        """What was remembered of a robot that has gone."""
        self._took.pop(robot, None)

    def late(self, now: float) -> list[Waiting[T]]:
        """Those whose budgets have ended while they waited; they wait no more."""
        found = [entry for entry in self._waiting if entry.deadline <= now]
        self.leave(found)
        return found

    def _key(self, entry: Waiting[T]) -> tuple[float, int]:
        return entry.due(self.patience), entry.number
