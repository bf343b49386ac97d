# SPDX-License-Identifier: Apache-2.0
"""A question on its way through the worker, and what happens to one that comes during another."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.stages import StageTimes

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene


class QuestionPolicy(str, Enum):
    """What happens to a question that arrives while another one is being answered."""

    QUEUE = "queue"  # it waits, up to `queue_limit` of them; past that it is answered BUSY
    REPLACE = "replace"  # the older ones are answered CANCELLED
    REJECT = "reject"  # it is answered BUSY


@dataclass(eq=False)
class Ticket:
    """A question on its way; `result` is completed exactly once, from any thread.

    `before` is called with the scene when it is the question's turn; an exception of it is an ERROR answer.
    `listener` is told the events of this question, which call it by its `number`.
    """

    question: Question
    arrived: float
    before: Callable[[Scene], None] | None = None
    number: int = 0
    listener: Callable[[StageBegan | TextSoFar], object] | None = None
    result: Future[Answer] = field(default_factory=Future)
    withdraw: Callable[[Ticket], None] = field(default=lambda ticket: None, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event)
    why: str = ""

    def cancel(self, why: str = "cancelled by the caller") -> None:
        """Ends the answer: at once if the question waits, within one decode step if it runs; it then says CANCELLED."""
        self.why = self.why or why
        self._stop.set()
        self.withdraw(self)

    @property
    def cancelled(self) -> bool:
        return self._stop.is_set()

    @property
    def deadline(self) -> float:
        """When its budget has run out; never for one without, or with one that makes no sense."""
        budget = self.question.latency_budget_ms or 0.0
        return self.arrived + budget / 1e3 if budget > 0 else math.inf

    def callbacks(self, events: Listeners) -> tuple[Callable[[str, int], None] | None, Callable[[str], None]]:
        """For `Engine.ask`: tell the text so far (None if nobody would hear it) and each stage as it begins."""
        also = () if self.listener is None else (self.listener,)

        def on_text(text: str, tokens: int) -> None:
            events.tell(TextSoFar(self.number, text, tokens), *also)

        def on_stage(stage: str) -> None:
            events.tell(StageBegan(self.number, stage), *also)

        return on_text if also or events.wanted(TextSoFar) else None, on_stage

    def unanswered(self, status: Status, why: str, now: float) -> Answer:
        """The answer of a question that no model has seen, at a time in seconds."""
        waited = (now - self.arrived) * 1e3
        budget = self.question.latency_budget_ms
        times = StageTimes(queue=waited, total=waited)
        return Answer(self.question, status, status_message=why, times=times, budget_met=not budget or waited <= budget)
