# SPDX-License-Identifier: Apache-2.0
"""One thread owns the model; other threads hand it frames and questions and do not wait."""

from __future__ import annotations

import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from adatoken3d_ros.engine.answer import Answer, Status
from adatoken3d_ros.engine.out_of_memory import describe, free_cached, is_out_of_memory
from adatoken3d_ros.engine.scene_queue import CLOSED, STOPPING, SceneQueue
from adatoken3d_ros.engine.tickets import Ticket
from adatoken3d_ros.settings import DEFAULTS
from adatoken3d_ros.text import described, quoted, shown

if TYPE_CHECKING:  # the engine brings torch with it, seconds of importing
    from adatoken3d_ros.engine.engine import Engine
    from adatoken3d_ros.engine.scene import Scene

logger = logging.getLogger(__name__)
T = TypeVar("T")


def _wake(queue: weakref.ref[SceneQueue]) -> None:
    if (known := queue()) is not None:
        known.call(_nothing, chore=True)


def _nothing(scene: Scene) -> None:
    pass


class DutyCycle:
    """Bounds the share of time, 0 to 1, that background work takes: after each piece it rests as that asks for."""

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
    """Runs an engine in a thread, for any number of scenes.

    First come calls that somebody waits for, then questions, chores and the newest frames; scenes take turns. While
    nobody wants anything, the engine works ahead: whatever a scene's next question needs that does not depend on it. A
    question ends that within one layer of a model.

    Args:
        make_engine: builds the engine (loads the model) inside the thread.
        ahead: largest share of the time that is spent on working ahead, 0 for none; encoding a key frame as it comes
            does not count.
        clock: seconds, monotonic; the engine must be built with the same.
        changed: wakes the thread.

    Attributes:
        ready: completed when the engine is built, or carries what went wrong.
        duty: what bounds the work ahead.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        ahead: float = DEFAULTS["budget.background"],
        clock: Callable[[], float] = time.monotonic,
        changed: threading.Condition | None = None,
    ) -> None:
        self.ready: Future[None] = Future()
        self._make_engine = make_engine
        self._clock = clock
        self._changed = changed or threading.Condition()
        self._queues: deque[SceneQueue] = deque()  # in the order of their turns
        self._unbuilt: deque[tuple[SceneQueue, Callable[[Engine], Scene]]] = deque()
        self._answering: SceneQueue | None = None  # whose question was taken and is not answered
        self._stopping = False
        self.duty = DutyCycle(ahead)
        self._thread = threading.Thread(target=self._run, name="adatoken3d-worker", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def open(self, make_scene: Callable[[Engine], Scene], **options: Any) -> SceneQueue:
        """Another scene for the engine, which `make_scene` builds inside the thread; see SceneQueue for the options.

        Any thread; before `start`, too. What goes wrong in building it is on `SceneQueue.ready` and costs no other
        scene.
        """
        queue = SceneQueue(self._changed, self._clock, **options)
        with self._changed:
            stopping = self._stopping
            if not stopping:
                self._unbuilt.append((queue, make_scene))
                self._changed.notify()
        if stopping:
            self._refuse(queue, RuntimeError(STOPPING))
        return queue

    def close(self, queue: SceneQueue) -> None:
        """Forgets a scene: what runs for it is cancelled, what waits is answered with CANCELLED. Any thread."""
        with self._changed:
            unbuilt = any(pair[0] is queue for pair in self._unbuilt)
            self._unbuilt = deque(pair for pair in self._unbuilt if pair[0] is not queue)
            if queue in self._queues:
                self._queues.remove(queue)
            queue.closed = queue.closed or CLOSED  # also for a scene that is being built
            if queue.running is not None:
                queue.running.cancel(CLOSED)
        queue.close(why=CLOSED)
        if unbuilt:
            queue.ready.set_exception(RuntimeError(CLOSED))

    def stop(self, timeout: float | None = None) -> bool:
        """Cancels what runs, answers what waits with CANCELLED and joins the thread; False if it is still busy."""
        with self._changed:
            self._stopping = True
            for queue in (*self._queues, *(queue for queue, _ in self._unbuilt)):
                queue.closed = queue.closed or STOPPING  # what comes from now on is refused at once
                if queue.running is not None:
                    queue.running.cancel(STOPPING)
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- the thread ---

    def _run(self) -> None:
        try:
            engine = self._make_engine()
        except BaseException as error:  # also what would end a program: somebody waits for `ready`
            self._end(error, Status.ERROR, f"the model could not be loaded: {shown(error)}")
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while True:
                try:
                    if not self._turn(engine):
                        break
                except Exception as error:  # costs what was done, not the thread
                    logger.exception("the worker failed between questions")
                    self._fail_running(described(error))
        finally:
            # However the thread ends, nobody may wait for it, now or later.
            self._fail_running("the worker has ended")
            self._end(RuntimeError("the worker has ended"), Status.CANCELLED, STOPPING)

    def _fail_running(self, why: str) -> None:
        """Answers the question that was taken and not answered, if there is one, of a scene that was closed, too."""
        if self._answering is not None:
            self._answering.answered(None, why)

    def _end(self, error: BaseException, status: Status, why: str) -> None:
        """Refuses all that waits, now and from now on."""
        with self._changed:
            self._stopping = True
            unbuilt, self._unbuilt = self._unbuilt, deque()
        for queue in list(self._queues):
            queue.close(status, why)
        for queue, _ in unbuilt:
            self._refuse(queue, error, status, why)

    def _refuse(
        self, queue: SceneQueue, error: BaseException, status: Status = Status.CANCELLED, why: str = STOPPING
    ) -> None:
        """Ends a queue whose scene cannot be built."""
        queue.close(status, why)
        queue.ready.set_exception(error)

    def _turn(self, engine: Engine) -> bool:
        """Waits for the next thing to do and does it; False if the worker is to end."""
        # Before the lock: this may cost as much as choosing the views of a question.
        ahead = self._with_work_ahead()
        with self._changed:
            rest = self.duty.rest(self._clock()) if ahead is not None else None
            # A bool: the queues that it is made of are emptied below.
            wanted = self._changed.wait_for(
                lambda: self._is_wanted() or any(queue.has_work for queue in self._queues), timeout=rest
            )
            if self._stopping:
                return False
            unbuilt = self._unbuilt.popleft() if self._unbuilt else None
            queue, call, ticket = (None, None, None) if unbuilt else self._choose()
            self._answering = queue if ticket else None
        if unbuilt is not None:
            self._build(engine, *unbuilt)
        elif not wanted:
            if ahead is not None and not ahead.closed:
                self._work_ahead(ahead)
        elif queue is None:
            pass  # what was wanted has been withdrawn
        elif call is not None:
            function, future = call
            try:
                future.set_result(function(queue.ready.result()))
            except Exception as error:
                future.set_exception(error)
        else:
            scene = queue.ready.result()
            self._take_frame(queue, scene, encode=ticket is None)
            if ticket is not None:
                queue.answered(self._answer(engine, queue, scene, ticket))
                # Hands over Python's lock: the asker would else wait until background work lets go of it.
                time.sleep(0)
        return True

    def _choose(self) -> tuple[SceneQueue | None, Any, Ticket | None]:
        """The queue whose turn it is, with its call or question; neither: its frame is to be taken."""
        for take in (SceneQueue.next_call, SceneQueue.next_question, partial(SceneQueue.next_call, chore=True)):
            for queue in self._queues:
                taken = take(queue)
                if taken is not None:
                    self._to_the_end(queue)
                    return (queue, None, taken) if isinstance(taken, Ticket) else (queue, taken, None)
        for queue in self._queues:
            if queue.has_work:
                self._to_the_end(queue)
                return queue, None, None
        return None, None, None

    def _to_the_end(self, queue: SceneQueue) -> None:
        self._queues.remove(queue)
        self._queues.append(queue)

    def _build(self, engine: Engine, queue: SceneQueue, make_scene: Callable[[Engine], Scene]) -> None:
        try:
            scene = make_scene(engine)
        except BaseException as error:  # somebody waits for `ready`
            self._refuse(queue, error, Status.ERROR, f"the scene could not be made: {shown(error)}")
            return
        scene.wake = partial(_wake, weakref.ref(queue))  # which holds the scene
        with self._changed:
            if not queue.closed:
                self._queues.append(queue)
        queue.ready.set_result(scene)

    def _take_frame(self, queue: SceneQueue, scene: Scene, *, encode: bool) -> None:
        offered = queue.take_frame()
        if offered is None:
            return
        source, view = offered
        no_memory, verdict, observed = False, None, None
        try:
            verdict = None if view is None else scene.announce(*view())
            if verdict is None:
                queue.cannot_prepare = False
                observed = source()
                verdict = scene.observe(observed)
            outcome = verdict.value
            if encode:
                # A view that a question interrupts waits on: the question's plan says whether it is encoded for it.
                scene.encode_pending(should_stop=self._is_wanted)
        except ValueError as error:
            waits = observed is not None and observed.stamp_ns not in scene.poses
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
        queue.count(outcome)

    def _with_work_ahead(self) -> SceneQueue | None:
        """The queue whose scene has work ahead, if there is time for it."""
        if not self.duty.share or self._is_wanted():
            return None
        for queue in list(self._queues):
            scene = queue.ready.result()
            if not queue.cannot_prepare and self._try_ahead(queue, lambda scene=scene: scene.work_ahead):  # type: ignore[misc]
                return queue
        return None

    def _work_ahead(self, queue: SceneQueue) -> None:
        began, scene = self._clock(), queue.ready.result()
        self._try_ahead(queue, lambda: scene.prepare(self._is_wanted))
        self.duty.worked(began, self._clock())

    def _try_ahead(self, queue: SceneQueue, work: Callable[[], T]) -> T | None:
        """What `work` returns; after an error nothing is done ahead until the scene changes."""
        result, no_memory = None, False
        try:
            result = work()
        except Exception as error:
            queue.cannot_prepare = True  # a question will say what is wrong
            no_memory = is_out_of_memory(error)
            logger.error("working ahead failed: %s", describe(error), exc_info=not no_memory)
        if no_memory:
            free_cached()
        return result

    def _is_wanted(self) -> bool:
        """Whether somebody waits for what the thread does in the background to end; frames and chores do not count."""
        return self._stopping or bool(self._unbuilt) or any(queue.wanted for queue in tuple(self._queues))

    def _answer(self, engine: Engine, queue: SceneQueue, scene: Scene, ticket: Ticket) -> Answer:
        on_text, on_stage = ticket.callbacks(queue.events)

        def should_stop() -> bool:
            for waiting in tuple(self._queues):
                waiting.refuse_expired()
            return ticket.cancelled

        try:
            if ticket.before is not None:
                ticket.before(scene)
            answer = engine.ask(
                scene,
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
            answer = replace(answer, status_message=f"{ticket.why}: {answer.status_message}")
        return answer
