# SPDX-License-Identifier: Apache-2.0
"""The stages that a question goes through, and how long each took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class StageTimes:
    """Disjoint stages in milliseconds; `total` runs from the question's arrival to its answer.

    `queue` is waiting and choosing a plan.
    """

    queue: float = 0.0
    encode: float = 0.0
    tokens: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0
    total: float = 0.0


STAGES = ("queue", "encode", "tokens", "prefill", "decode")  # of StageTimes, in their order


class Stopwatch:
    """Disjoint stages from the question's arrival on."""

    def __init__(self, clock: Callable[[], float], arrived: float, on_stage: Callable[[str], None]) -> None:
        self.arrived = arrived
        self.clock = clock
        self._on_stage = on_stage
        self.stage = "queue"
        self._since = arrived
        self._ms: dict[str, float] = {}

    def begin(self, stage: str) -> None:
        self._close()
        self.stage = stage
        self._on_stage(stage)

    @property
    def stage_seconds(self) -> float:
        """Seconds since the present stage began."""
        return self.clock() - self._since

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done within belongs to no stage and not to the total: it is wanted beside the answer."""
        began = self.clock()
        try:
            yield
        finally:
            took = self.clock() - began
            self._since += took
            self.arrived += took

    def finish(self) -> StageTimes:
        self._close()
        return StageTimes(**self._ms, total=(self._since - self.arrived) * 1e3)

    def _close(self) -> None:
        now = self.clock()
        # A stage comes twice where memory ran out and the question was begun anew.
        self._ms[self.stage] = self._ms.get(self.stage, 0.0) + (now - self._since) * 1e3
        self._since = now
