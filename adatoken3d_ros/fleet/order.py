# SPDX-License-Identifier: Apache-2.0
"""In which order the questions of many robots are answered: the earliest deadline first, and nobody starves.

A question counts as due when its budget ends, at the latest `patience` seconds after it came; without a budget, then.
So what comes later than `patience` after a question never overtakes it. As a robot may have only so many questions
waiting, a question waits no longer than `patience` and the time of robots x limit answers, whatever the others ask.

A scene that came as pictures is made view by view before its question is answered: between two answers one view is, of
the scenes that wait for it in turn. So a question waits for a view more an answer, and for as much again for each view
of its own scene.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")
PATIENCE = 10.0  # seconds
_REMEMBERED = 32  # answers of a robot whose times are remembered


@dataclass(eq=False)
class Waiting(Generic[T]):
    """A question that waits.

    Attributes:
        what: whatever it is to its asker. robot: whose. arrived: when it came here, seconds.
        deadline: when its budget ends, on the same clock; infinite without one.
        views: of its scene that have to be made before it can be answered. turn: its place among those that have some.
    """

    what: T
    robot: str
    arrived: float
    deadline: float = math.inf
    number: int = 0
    views: int = 0
    turn: int = 0

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
        self._views: dict[str, deque[float]] = {}  # seconds that the last ones of a robot took
        self._turns = 0
        self.running: Waiting[T] | None = None
        self.viewing = False  # whether it is, or was last, a view that is made
        self.began = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def expected(self, robot: str) -> float:
        """Seconds that an answer to a robot is likely to take, by its last ones, else by all; 0 before any."""
        own = self._took.get(robot)
        known = own or [seconds for took in self._took.values() for seconds in took]
        return median(known) if known else 0.0

    def expected_view(self, robot: str) -> float:
        """Seconds that a view of a robot's scene is likely to take, by its last ones; 0 before any: a picture of
        another's says nothing of features."""
        own = self._views.get(robot)
        return median(own) if own else 0.0

    def ahead(self, entry: Waiting[T], now: float) -> tuple[int, float]:
        """How many questions are answered before `entry`, and the seconds that this, and its views, are likely to take
        at least."""
        others = [one for one in self._waiting if one is not self.running]
        before = [one for one in others if self._key(one) < self._key(entry) and one.views <= entry.views]
        if entry.views:
            made = [(one.robot, min(one.views, entry.views)) for one in (entry, *others)]
            views = sum(count * self.expected_view(robot) for robot, count in made)
        else:
            made = [(one.robot, one.views) for one in others if one.views]
            least = min((self.expected_view(robot) for robot, _ in made), default=0.0)
            views = min(len(before), sum(count for _, count in made)) * least
        seconds = self.left(now) + sum(self.expected(one.robot) for one in before) + views
        return len(before) + (self.running is not None), seconds

    def left(self, now: float) -> float:
        """Seconds that what is done at the moment, if anything, is likely to take still."""
        if self.running is None:
            return 0.0
        whole = self.expected_view if self.viewing else self.expected
        return max(0.0, whole(self.running.robot) - (now - self.began))

    def join(self, what: T, robot: str, now: float, deadline: float = math.inf, views: int = 0) -> Waiting[T]:
        """A question comes, with so many views of its scene to be made.

        Raises:
            Full: where its robot has `limit` waiting already, and where those before it, and its views, are likely to
                take longer than its budget; the message says how long.
        """
        if (mine := sum(one.robot == robot for one in self._waiting)) >= self.limit:
            raise Full(f"{mine} questions of {robot} are waiting already")
        entry = Waiting(what, robot, now, deadline, self._count, views, self._turns)
        count, seconds = self.ahead(entry, now)
        if (count or views) and now + seconds >= deadline:
            if views and (known := self._views.get(robot)):
                known.popleft()  # of what is always refused nothing would ever be measured again
            would, left = (seconds + self.expected(robot)) * 1e3, max(0.0, deadline - now) * 1e3
            own = f" and {views} views of its scene" if views else ""
            raise Full(
                f"{count} questions{own} come before it: it would take {would:.0f} ms from now on, {left:.0f} ms are "
                "left"
            )
        self._count += 1
        self._turns += 1
        self._waiting.append(entry)
        return entry

    def next(self, now: float) -> Waiting[T] | None:
        """The question that is answered next or, where it has `views`, waits on and has one of them made, unless
        something is done already; `ended` says that it was."""
        if self.running is not None or not self._waiting:
            return None
        whole = [entry for entry in self._waiting if not entry.views]
        parts = [entry for entry in self._waiting if entry.views]
        self.viewing = bool(parts) and not (whole and self.viewing)
        if self.viewing:
            self.running = min(parts, key=lambda entry: entry.turn)
            self.running.turn = self._turns
            self._turns += 1
        else:
            self.running = min(whole, key=self._key)
            self._waiting.remove(self.running)
        self.began = now
        return self.running

    def ended(self, now: float, *, measured: bool = True, views: int = 0) -> None:
        """The question that was taken has its answer, or a view more, and so many are to be made still; `measured`:
        what it took says what others will."""
        assert self.running is not None
        if self.viewing:
            self.running.views = views
        if measured:
            took = self._views if self.viewing else self._took
            took.setdefault(self.running.robot, deque(maxlen=_REMEMBERED)).append(now - self.began)
        self.running = None

    def leave(self, entries: Iterable[Waiting[T]]) -> None:
        """Questions that nobody waits for any more."""
        gone = {id(entry) for entry in entries}
        self._waiting = [entry for entry in self._waiting if id(entry) not in gone]

    def forget(self, robot: str) -> None:
        """What was remembered of a robot that has gone."""
        self._took.pop(robot, None)
        self._views.pop(robot, None)

    def late(self, now: float) -> list[Waiting[T]]:
        """Those whose budgets have ended while they waited; they wait no more."""
        found = [entry for entry in self._waiting if entry.deadline <= now]
        self.leave(found)
        return found

    def _key(self, entry: Waiting[T]) -> tuple[float, int]:
        return entry.due(self.patience), entry.number
