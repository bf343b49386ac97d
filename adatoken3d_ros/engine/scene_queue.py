# SPDX-License-Identifier: Apache-2.0
"""The queue of one scene: its newest frame, questions and calls, handed in from any thread without waiting."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import FrameTaken, Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.tickets import QuestionPolicy, Ticket
from adatoken3d_ros.settings import DEFAULTS

if TYPE_CHECKING:  # the scene brings torch with it, seconds of importing
    import numpy as np
    from numpy.typing import NDArray

    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame

    View = tuple[int, NDArray[np.float64]]

T = TypeVar("T")
STOPPING = "the engine is stopping"
CLOSED = "the scene was closed"


class SceneQueue:
    """The newest frame, the questions and the calls that wait for a scene. `Worker.open` makes it.

    All methods may be called from any thread and return at once; what is handed in happens in the worker's.

    Args:
        changed: guards the queue, and wakes the worker.
        clock: seconds, monotonic.
        policy: for questions that arrive during another of this scene.
        queue_limit: questions that may wait behind the one that is answered under QuestionPolicy.QUEUE.
        events: told the fate of every frame in any thread, and of a question's stages and text in the worker's.
        refuse_late: a question whose latency budget runs out while it waits behind another is answered
            BUDGET_INFEASIBLE then (within a layer or decode step of the other), not in its turn.

    Attributes:
        ready: the scene once it is built, or what went wrong.
        frames: how many frames had which fate.
        running: the question that is being answered.
    """

    def __init__(
        self,
        changed: threading.Condition,
        clock: Callable[[], float],
        *,
        policy: QuestionPolicy = QuestionPolicy.QUEUE,
        queue_limit: int = DEFAULTS["queue_limit"],
        events: Listeners | None = None,
        refuse_late: bool = False,
    ) -> None:
        self.policy = policy
        self.queue_limit = queue_limit
        self.ready: Future[Scene] = Future()
        self.frames: Counter[str] = Counter()
        self.running: Ticket | None = None
        self.closed = ""  # why it takes nothing any more
        self.cannot_prepare = False  # until a frame comes: a question will say what is wrong
        self._changed = changed
        self._clock = clock
        self.refuse_late = refuse_late
        self.events = events or Listeners()
        self._frame: tuple[Callable[[], PosedFrame], Callable[[], View] | None] | None = None
        self._questions: deque[Ticket] = deque()
        self._calls: deque[tuple[Callable[[Scene], Any], Future[Any]]] = deque()
        self._chores: deque[tuple[Callable[[Scene], Any], Future[Any]]] = deque()

    def submit_frame(self, source: Callable[[], PosedFrame], view: Callable[[], View] | None = None) -> None:
        """Offers the newest frame. Both functions are called in the worker's thread and may raise ValueError.

        Args:
            source: makes the frame.
            view: its stamp, nanoseconds, and T_world_camera (4, 4); if these already tell that the scene would not keep
                it, it is not made.
        """
        with self._changed:
            fate = "stopped" if self.closed else "superseded" if self._frame is not None else ""
            if not self.closed:
                self._frame = source, view
                self._changed.notify()
        if fate:
            self.count(fate)

    def submit(
        self,
        question: Question,
        *,
        before: Callable[[Scene], None] | None = None,
        number: int = 0,
        listener: Callable[[StageBegan | TextSoFar], object] | None = None,
        arrived: float | None = None,
    ) -> Ticket:
        """Hands in a question under the policy; the ticket's result is completed in every case.

        Args:
            question: what is asked.
            before: see Ticket.
            number: what events call the question.
            listener: told the events of this question alone.
            arrived: when it arrived, on the queue's clock; now if None.
        """
        ticket = Ticket(
            question, self._clock() if arrived is None else arrived, before, number, listener, withdraw=self._withdraw
        )
        refusal, replaced = "", []
        with self._changed:
            busy = len(self._questions) + (self.running is not None)
            if self.closed:
                refusal = self.closed
            elif self.policy is QuestionPolicy.REJECT and busy:
                refusal = "another question is being answered (question policy: reject)"
            elif self.policy is QuestionPolicy.QUEUE and busy > self.queue_limit:
                # One of them runs, or is about to.
                refusal = f"one is being answered, {busy - 1} questions are waiting already (question policy: queue)"
            else:
                if self.policy is QuestionPolicy.REPLACE:
                    replaced = [*self._questions, *filter(None, [self.running])]
                self._questions.append(ticket)
                self._changed.notify()
        for older in replaced:
            older.cancel("replaced by a newer question")
        if refusal:
            self.refuse(ticket, Status.BUSY, refusal)
        return ticket

    def call(self, function: Callable[[Scene], T], *, chore: bool = False) -> Future[T]:
        """Runs `function(scene)` in the worker's thread, before the questions that wait.

        A chore, which nobody waits for, comes after them, and once where the same one waits already.
        """
        future: Future[T] = Future()
        with self._changed:
            closed, calls = self.closed, self._chores if chore else self._calls
            for waiting, its_future in self._chores if chore else ():
                if waiting == function:
                    return its_future
            if not closed:
                calls.append((function, future))
                self._changed.notify()
        if closed:
            future.set_exception(RuntimeError(closed))
        return future

    @property
    def waiting(self) -> int:
        """Questions that wait or run."""
        with self._changed:
            return len(self._questions) + (self.running is not None)

    # --- for the worker, which holds the lock where nothing else is said ---

    @property
    def wanted(self) -> bool:
        """Whether somebody waits for a question or a call; frames and chores do not count."""
        return bool(self._questions or self._calls)

    @property
    def has_work(self) -> bool:
        """Whether anything waits."""
        return self.wanted or bool(self._chores) or self._frame is not None

    def next_call(self, *, chore: bool = False) -> tuple[Callable[[Scene], Any], Future[Any]] | None:
        """Takes the next call, or chore."""
        calls = self._chores if chore else self._calls
        return calls.popleft() if calls else None

    def next_question(self) -> Ticket | None:
        """Takes the next question, which then counts as running."""
        self.running = self._questions.popleft() if self._questions else None
        return self.running

    def take_frame(self) -> tuple[Callable[[], PosedFrame], Callable[[], View] | None] | None:
        """Takes the newest frame; without the lock."""
        with self._changed:
            offered, self._frame = self._frame, None
        return offered

    def answered(self, answer: Answer | None, why: str = "") -> None:
        """The running question, if any, has its answer; None: it failed, and says `why`. Without the lock."""
        with self._changed:
            ticket, self.running = self.running, None
        if ticket is not None and not ticket.result.done():
            ticket.result.set_result(answer or ticket.unanswered(Status.ERROR, why, self._clock()))

    def refuse_expired(self) -> None:
        """Answers the waiting questions whose budgets have run out, if they are not to wait; without the lock."""
        if not self.refuse_late or not self._questions:
            return
        now = self._clock()
        with self._changed:
            expired = [ticket for ticket in self._questions if now >= ticket.deadline]
            for ticket in expired:
                self._questions.remove(ticket)
        for ticket in expired:
            why = f"the latency budget of {ticket.question.latency_budget_ms:g} ms ran out behind another question"
            self.refuse(ticket, Status.BUDGET_INFEASIBLE, why)

    def close(self, status: Status = Status.CANCELLED, why: str = STOPPING) -> None:
        """Takes nothing any more; what waits is refused; without the lock."""
        with self._changed:
            self.closed = self.closed or why
            tickets, self._questions = list(self._questions), deque()
            calls = [*self._calls, *self._chores]
            self._calls.clear()
            self._chores.clear()
            left, self._frame = self._frame is not None, None
        if left:
            self.count("stopped")
        for ticket in tickets:
            self.refuse(ticket, status, why)
        for _, future in calls:
            future.set_exception(RuntimeError(why))

    def refuse(self, ticket: Ticket, status: Status, why: str) -> None:
        """Answers a question that no model has seen."""
        ticket.result.set_result(ticket.unanswered(status, why, self._clock()))

    def count(self, fate: str) -> None:
        """Counts and tells what became of a frame."""
        self.frames[fate.split(":")[0]] += 1
        self.events.tell(FrameTaken(fate))

    def _withdraw(self, ticket: Ticket) -> None:
        """Answers a cancelled question that waits; one that runs finds its flag set."""
        with self._changed:
            waits = ticket in self._questions
            if waits:
                self._questions.remove(ticket)
        if waits:
            self.refuse(ticket, Status.CANCELLED, ticket.why)
