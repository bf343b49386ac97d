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

from adatoken3d_ros.engine.answer import Answer, Question

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene


class QuestionPolicy(str, Enum):
    """What happens to a question that arrives while another one is being answered."""

    QUEUE = "queue"  # it waits, up to `queue_limit` of them; past that it is answered BUSY
    REPLACE = "replace"  # the older ones are answered CANCELLED
    REJECT = "reject"  # it is answered BUSY


@dataclass(eq=False)
class Ticket:
    """A question on its way; `result` is completed exactly once, from the worker's thread or from `submit`'s caller.

    `before` is called with the scene when it is the question's turn; an exception of it is an ERROR answer.
    """

    question: Question
    arrived: float
    before: Callable[[Scene], None] | None = None
    on_text: Callable[[str, int], None] | None = None
    on_stage: Callable[[str], None] | None = None
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
