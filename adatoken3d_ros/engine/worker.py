# SPDX-License-Identifier: Apache-2.0
"""One thread owns the model. Everybody else hands it frames and questions and is never kept waiting."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import FrameTaken, Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.out_of_memory import describe, free_cached, is_out_of_memory
from adatoken3d_ros.engine.tickets import QuestionPolicy, Ticket
from adatoken3d_ros.text import described, quoted, shown

if TYPE_CHECKING:  # the session brings torch with it, seconds of importing
    import numpy as np
    from numpy.typing import NDArray

    from adatoken3d_ros.engine.session import SceneSession
    from adatoken3d_ros.scene.frames import PosedFrame

logger = logging.getLogger(__name__)
T = TypeVar("T")


class DutyCycle:
    """Bounds the share of time that background work takes: after each piece it rests as long as that asks for.

    Args:
        share: 0 (never) to 1 (always).
    """

    def __init__(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"a share of time must be between 0 and 1, got {share}")
        self.share = share
        self._free_at = -math.inf

    def worked(self, began: float, ended: float) -> None:
        """A piece of work was done between these times, seconds."""
        if self.share:
            self._free_at = ended + (ended - began) * (1 / self.share - 1)

    def rest(self, now: float) -> float | None:
        """Seconds until the next piece may begin; None for never."""
        return max(0.0, self._free_at - now) if self.share else None


class Worker:
    """Runs a SceneSession in a thread: first calls that somebody waits for, then questions, chores, the newest frame.

    While nobody wants anything, the session works ahead: whatever the next question needs that does not depend on it.
    A question ends that within one layer of a model.

    Args:
        make_session: builds the session (loads the model) inside the thread.
        policy: for questions that arrive during another.
        queue_limit: questions that may wait behind the one that is answered under QuestionPolicy.QUEUE.
        events: told the fate of every frame in any thread, and of a question's stages and text in the worker's.
        ahead: largest share of the time that is spent on working ahead, 0 for none; encoding a key frame as it comes
            does not count.
        refuse_late: a question whose latency budget runs out while it waits behind another is answered
            BUDGET_INFEASIBLE then (within a layer or decode step of the other), not in its turn.
        clock: seconds, monotonic; the session must be built with the same.
    """

    def __init__(
        self,
        make_session: Callable[[], SceneSession],
        *,
        policy: QuestionPolicy = QuestionPolicy.QUEUE,
        queue_limit: int = 8,
        events: Listeners | None = None,
        ahead: float = 0.5,
        refuse_late: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.policy = policy
        self.queue_limit = queue_limit
        self.ready: Future[None] = Future()
        self.frames: Counter[str] = Counter()
        self._events = events or Listeners()
        self._make_session = make_session
        self.refuse_late = refuse_late
        self._clock = clock
        self._changed = threading.Condition()
        self._frame: tuple[Callable[[], PosedFrame], Callable[[], tuple[int, NDArray[np.float64]]] | None] | None = None
        self._questions: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._calls: deque[tuple[Callable[[SceneSession], Any], Future[Any]]] = deque()
        self._chores: deque[tuple[Callable[[SceneSession], Any], Future[Any]]] = deque()
        self._stopping = False
        self.duty = DutyCycle(ahead)
        self._cannot_prepare = False
        self._thread = threading.Thread(target=self._run, name="adatoken3d-worker", daemon=True)

    def start(self) -> None:
        """Starts the thread; `ready` is completed when the session is built, or carries what went wrong."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """Cancels what runs, answers what waits with CANCELLED and joins the thread; False if it is still busy."""
        with self._changed:
            self._stopping = True
            if self._running is not None:
                self._running.cancel("the node is stopping")
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- called from any thread, return at once ---

    def submit_frame(
        self, source: Callable[[], PosedFrame], view: Callable[[], tuple[int, NDArray[np.float64]]] | None = None
    ) -> None:
        """Offers the newest frame. Both functions are called in the worker's thread and may raise ValueError.

        Args:
            source: makes the frame.
            view: its stamp, nanoseconds, and T_world_camera (4, 4); if these already tell that the session would not
                keep it, it is not made.
        """
        with self._changed:
            fate = "stopped" if self._stopping else "superseded" if self._frame is not None else ""
            if not self._stopping:
                self._frame = source, view
                self._changed.notify()
        if fate:
            self._count(fate)

    def submit(
        self,
        question: Question,
        *,
        before: Callable[[SceneSession], None] | None = None,
        number: int = 0,
        listener: Callable[[StageBegan | TextSoFar], object] | None = None,
    ) -> Ticket:
        """Hands in a question under the policy; the ticket's result is completed in every case.

        Args:
            question: what is asked.
            before: see Ticket.
            number: what events call the question.
            listener: told the events of this question alone.
        """
        ticket = Ticket(question, self._clock(), before, number, listener, withdraw=self._withdraw)
        refusal, replaced = "", []
        with self._changed:
            busy = len(self._questions) + (self._running is not None)
            if self._stopping:
                refusal = "the node is stopping"
            elif self.policy is QuestionPolicy.REJECT and busy:
                refusal = "another question is being answered (question policy: reject)"
            elif self.policy is QuestionPolicy.QUEUE and busy > self.queue_limit:
                # One of them runs, or is about to.
                refusal = f"one is being answered, {busy - 1} questions are waiting already (question policy: queue)"
            else:
                if self.policy is QuestionPolicy.REPLACE:
                    replaced = [*self._questions, *filter(None, [self._running])]
                self._questions.append(ticket)
                self._changed.notify()
        for older in replaced:
            older.cancel("replaced by a newer question")
        if refusal:
            ticket.result.set_result(ticket.unanswered(Status.BUSY, refusal, self._clock()))
        return ticket

    def call(self, function: Callable[[SceneSession], T], *, chore: bool = False) -> Future[T]:
        """Runs `function(session)` in the worker's thread, before the questions that wait.

        A chore, which nobody waits for, comes after them, and once where the same one waits already.
        """
        future: Future[T] = Future()
        with self._changed:
            stopping, calls = self._stopping, self._chores if chore else self._calls
            for waiting, its_future in self._chores if chore else ():
                if waiting == function:
                    return its_future
            if not stopping:
                calls.append((function, future))
                self._changed.notify()
        if stopping:
            future.set_exception(RuntimeError("the worker is stopping"))
        return future

    @property
    def waiting(self) -> int:
        """Questions that wait or run."""
        with self._changed:
            return len(self._questions) + (self._running is not None)

    # --- the thread ---

    def _run(self) -> None:
        try:
            session = self._make_session()
        except BaseException as error:  # also what would end a program: somebody waits for `ready`
            with self._changed:
                self._stopping = True
            self._refuse_waiting(Status.ERROR, f"the model could not be loaded: {shown(error)}")
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while True:
                try:
                    if not self._turn(session):
                        break
                except Exception as error:  # costs what was done, not the thread
                    logger.exception("the worker failed between questions")
                    self._fail_running(described(error))
        finally:
            # However the thread ends, nobody may wait for it, now or later.
            with self._changed:
                self._stopping = True
            self._fail_running("the worker has ended")
            self._refuse_waiting(Status.CANCELLED, "the node is stopping")

    def _turn(self, session: SceneSession) -> bool:
        """Waits for the next thing to do and does it; False if the worker is to end."""
        # Before the lock: this may cost as much as choosing the views of a question.
        ahead = self._has_work_ahead(session)
        with self._changed:
            rest = self.duty.rest(self._clock()) if ahead else None
            # A bool: the queues that it is made of are emptied below.
            wanted = self._changed.wait_for(
                lambda: self._frame is not None or bool(self._chores) or self._is_wanted(), timeout=rest
            )
            if self._stopping:
                return False
            call = self._calls.popleft() if self._calls else None
            ticket = self._questions.popleft() if call is None and self._questions else None
            if call is None and ticket is None and self._chores:
                call = self._chores.popleft()
            self._running = ticket
        if call is not None:
            function, future = call
            try:
                future.set_result(function(session))
            except Exception as error:
                future.set_exception(error)
            return True
        if not wanted:
            self._work_ahead(session)
            return True
        self._take_frame(session, encode=ticket is None)
        if ticket is not None:
            answer = self._answer(session, ticket)
            with self._changed:
                self._running = None
            ticket.result.set_result(answer)
            # Hands over Python's lock: the asker would else wait until background work lets go of it.
            time.sleep(0)
        return True

    def _fail_running(self, why: str) -> None:
        """Answers the question that was taken and not answered, if there is one."""
        with self._changed:
            ticket, self._running = self._running, None
        if ticket is not None and not ticket.result.done():
            ticket.result.set_result(ticket.unanswered(Status.ERROR, why, self._clock()))

    def _withdraw(self, ticket: Ticket) -> None:
        """Answers a cancelled question that waits; one that runs finds its flag set."""
        with self._changed:
            waits = ticket in self._questions
            if waits:
                self._questions.remove(ticket)
        if waits:
            ticket.result.set_result(ticket.unanswered(Status.CANCELLED, ticket._why, self._clock()))

    def _refuse_expired(self) -> None:
        """Answers the waiting questions whose budgets have run out."""
        now = self._clock()
        with self._changed:
            expired = [ticket for ticket in self._questions if now >= ticket.deadline]
            for ticket in expired:
                self._questions.remove(ticket)
        for ticket in expired:
            why = f"the latency budget of {ticket.question.latency_budget_ms:g} ms ran out behind another question"
            ticket.result.set_result(ticket.unanswered(Status.BUDGET_INFEASIBLE, why, self._clock()))

    def _take_frame(self, session: SceneSession, *, encode: bool) -> None:
        with self._changed:
            offered, self._frame = self._frame, None
        if offered is None:
            return
        source, view = offered
        no_memory, verdict, observed = False, None, None
        try:
            verdict = None if view is None else session.foresee(*view())
            if verdict is None:
                self._cannot_prepare = False
                observed = source()
                verdict = session.observe(observed)
            outcome = verdict.value
            if encode:
                # A view that a question interrupts waits on: the question's plan says whether it is encoded for it.
                session.encode_pending(should_stop=self._is_wanted)
        except ValueError as error:
            waits = observed is not None and observed.stamp_ns not in session.poses
            if verdict is None or (verdict.value == "key_frame" and waits):
                outcome = f"error: {error}"
            else:
                logger.error("a view that waited could not be used: %s", error)
        except Exception as error:
            no_memory = is_out_of_memory(error)
            outcome = f"error: {describe(error)}" + " (the view waits to be encoded)" * no_memory
            if no_memory:
                logger.error("%s", outcome)
            else:
                logger.exception("a frame could not be encoded")
        if no_memory:
            free_cached()
        self._count(outcome)

    def _has_work_ahead(self, session: SceneSession) -> bool:
        if self._cannot_prepare or not self.duty.share or self._is_wanted():
            return False
        return bool(self._try_ahead(lambda: session.work_ahead))

    def _work_ahead(self, session: SceneSession) -> None:
        began = self._clock()
        self._try_ahead(lambda: session.prepare(self._is_wanted))
        self.duty.worked(began, self._clock())

    def _try_ahead(self, work: Callable[[], T]) -> T | None:
        """What `work` returns; after an error nothing is done ahead until the scene changes."""
        result, no_memory = None, False
        try:
            result = work()
        except Exception as error:
            self._cannot_prepare = True  # a question will say what is wrong
            no_memory = is_out_of_memory(error)
            logger.error("working ahead failed: %s", describe(error), exc_info=not no_memory)
        if no_memory:
            free_cached()
        return result

    def _is_wanted(self) -> bool:
        """Whether somebody waits for what the thread does in the background to end; frames and chores do not count."""
        return bool(self._questions or self._calls or self._stopping)

    def _answer(self, session: SceneSession, ticket: Ticket) -> Answer:
        on_text, on_stage = ticket.callbacks(self._events)

        def should_stop() -> bool:
            if self.refuse_late and self._questions:
                self._refuse_expired()
            return ticket.cancelled

        try:
            if ticket.before is not None:
                ticket.before(session)
            answer = session.ask(
                ticket.question,
                arrived=ticket.arrived,
                on_text=on_text,
                on_stage=on_stage,
                should_stop=should_stop,
            )
        except Exception as error:
            logger.exception("the question %s failed", quoted(ticket.question.text))
            return ticket.unanswered(Status.ERROR, described(error), self._clock())
        if answer.status == Status.CANCELLED:
            answer = replace(answer, status_message=f"{ticket._why}: {answer.status_message}")
        return answer

    def _refuse_waiting(self, status: Status, why: str) -> None:
        with self._changed:
            tickets, self._questions = list(self._questions), deque()
            calls = [*self._calls, *self._chores]
            self._calls.clear()
            self._chores.clear()
            left, self._frame = self._frame is not None, None
        if left:
            self._count("stopped")
        for ticket in tickets:
            ticket.result.set_result(ticket.unanswered(status, why, self._clock()))
        for _, future in calls:
            future.set_exception(RuntimeError(why))

    def _count(self, outcome: str) -> None:
        self.frames[outcome.split(":")[0]] += 1
        self._events.tell(FrameTaken(outcome))
