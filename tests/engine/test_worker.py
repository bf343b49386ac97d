# SPDX-License-Identifier: Apache-2.0
"""The worker's promises, with a scene whose every step the test releases by hand. No sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import FrameTaken, Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.scene_queue import SceneQueue
from adatoken3d_ros.engine.tickets import QuestionPolicy
from adatoken3d_ros.engine.worker import DutyCycle, Worker
from adatoken3d_ros.scene.keyframes import Verdict
from tests.engine.scenes import working

LIMIT = 20.0  # seconds until a test that hangs fails


class GatedScene:
    """Scene and engine in one: answers when told to; notes what it was asked and shown."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.started = threading.Semaphore(0)
        self.release = threading.Semaphore(0)
        self.work_ahead = False
        self.preparing = threading.Semaphore(0)
        self.encoding = threading.Semaphore(0)
        self.encodes_endlessly = False
        self.arrived = -1.0

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Works until it is told to stop, or breaks."""
        self.log.append("prepare")
        self.preparing.release()
        if self.work_ahead == "broken":
            raise RuntimeError("no memory left")
        while not should_stop():
            pass

    def observe(self, frame: Any) -> Verdict:
        self.log.append(f"observe {frame.stamp_ns}")
        return Verdict.KEY_FRAME

    def encode_pending(self, should_stop: Callable[[], bool]) -> int:
        """Where it is said to be endless, it works until it is told to stop, or the test must have failed."""
        self.log.append("encode")
        self.encoding.release()
        end = time.monotonic() + 2 * LIMIT
        while self.encodes_endlessly and not should_stop() and time.monotonic() < end:
            pass
        return 1

    @property
    def runtime(self) -> GatedScene:
        return self

    def ask(
        self,
        scene: Any,
        question: Question,
        *,
        should_stop: Callable[[], bool],
        arrived: float,
        on_text: Callable[[str, int], None] | None,
        on_stage: Callable[[str], None],
    ) -> Answer:
        self.arrived = arrived
        on_stage("prefill")
        if on_text is not None:
            on_text("a chair", 2)
            self.log.append("text")
        self.started.release()
        if question.text == "explode":
            raise MemoryError("no memory left")
        assert self.release.acquire(timeout=LIMIT)
        self.log.append(f"ask {question.text}")
        return Answer(question, Status.CANCELLED if should_stop() else Status.OK)


@pytest.fixture
def scene() -> GatedScene:
    return GatedScene()


@pytest.fixture
def make_queue(scene: GatedScene) -> Iterator[Callable[..., SceneQueue]]:
    workers: list[Worker] = []

    def make(**options: Any) -> SceneQueue:
        worker, queue = working(scene, **options)
        worker.start()
        queue.ready.result(LIMIT)
        workers.append(worker)
        return queue

    yield make
    for worker in workers:
        scene.release.release(100)
        assert worker.stop(LIMIT)


def ask_and_wait_until_it_runs(queue: SceneQueue, scene: GatedScene, text: str) -> Any:
    ticket = queue.submit(Question(text))
    assert scene.started.acquire(timeout=LIMIT)
    return ticket


def test_queue_answers_in_order_and_refuses_past_its_limit(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue(policy=QuestionPolicy.QUEUE, queue_limit=1)
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    second = queue.submit(Question("second"))
    third = queue.submit(Question("third")).result.result(0)
    assert third.status == Status.BUSY and "1 questions are waiting" in third.status_message
    assert queue.waiting == 2
    scene.release.release(2)
    assert first.result.result(LIMIT).status == Status.OK
    assert second.result.result(LIMIT).status == Status.OK
    assert scene.log == ["ask first", "ask second"]


@pytest.mark.parametrize("limit", [0, 1])
def test_the_limit_is_on_those_that_wait_behind_another(scene: GatedScene, limit: int) -> None:
    _, queue = working(scene, queue_limit=limit)  # nothing runs yet
    tickets = [queue.submit(Question(f"{i}")) for i in range(limit + 2)]
    assert [ticket.result.done() for ticket in tickets] == [False] * (limit + 1) + [True]
    refused = tickets[-1].result.result(0)
    assert refused.status == Status.BUSY and f"{limit} questions are waiting already" in refused.status_message


def test_nobody_may_wait_under_a_limit_of_zero(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue(queue_limit=0)
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    assert queue.submit(Question("second")).result.result(0).status == Status.BUSY
    scene.release.release()
    assert first.result.result(LIMIT).status == Status.OK


def test_reject_refuses_at_once_while_one_runs(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue(policy=QuestionPolicy.REJECT)
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    assert queue.submit(Question("second")).result.result(0).status == Status.BUSY
    scene.release.release()
    assert first.result.result(LIMIT).status == Status.OK


def test_replace_cancels_the_older_ones_and_each_is_answered(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue(policy=QuestionPolicy.REPLACE)
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    second, third = queue.submit(Question("second")), queue.submit(Question("third"))
    scene.release.release(3)
    assert first.result.result(LIMIT).status == Status.CANCELLED
    skipped = second.result.result(LIMIT)
    assert skipped.status == Status.CANCELLED and "replaced by a newer question" in skipped.status_message
    assert third.result.result(LIMIT).status == Status.OK
    assert "ask second" not in scene.log


def test_cancelling_a_waiting_question_answers_it_without_running_it(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue()
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    second = queue.submit(Question("second"))
    second.cancel()
    assert second.result.result(0).status == Status.CANCELLED  # at once, while the first still runs
    scene.release.release(2)
    assert first.result.result(LIMIT).status == Status.OK
    assert scene.log == ["ask first"]


def test_what_a_question_needs_before_it_is_done_in_its_turn_and_on_its_time(
    make_queue: Any, scene: GatedScene
) -> None:
    now = [10.0]
    queue = make_queue(clock=lambda: now[0])
    first = ask_and_wait_until_it_runs(queue, scene, "first")

    def use(s: GatedScene) -> None:
        s.log.append("use")
        now[0] += 5.0

    def broken(s: GatedScene) -> None:
        raise ValueError("no such option")

    now[0] = 12.0
    second, third = queue.submit(Question("second"), before=use), queue.submit(Question("third"), before=broken)
    now[0] = 20.0
    scene.release.release(2)
    first.result.result(LIMIT), second.result.result(LIMIT)
    assert scene.log == ["ask first", "use", "ask second"] and scene.arrived == 12.0
    failed = third.result.result(LIMIT)
    assert failed.status == Status.ERROR and failed.status_message == "ValueError: no such option"


@pytest.mark.parametrize("refuse", [True, False])
def test_a_question_whose_budget_runs_out_while_it_waits_is_told_then(
    make_queue: Any, scene: GatedScene, refuse: bool
) -> None:
    now, step, stepped = [0.0], threading.Semaphore(0), threading.Semaphore(0)

    def ask(scene: Any, question: Question, *, should_stop: Callable[[], bool], **_: Any) -> Answer:
        scene.started.release()
        for _layer in range(2):
            assert step.acquire(timeout=LIMIT)
            should_stop()
            stepped.release()
        return Answer(question, Status.OK)

    scene.ask = ask  # type: ignore[method-assign]
    queue = make_queue(refuse_late=refuse, clock=lambda: now[0])
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    late = queue.submit(Question("late", latency_budget_ms=1000.0))
    # These are left to the scene: with more time, with none to keep, and one that makes no sense.
    others = [queue.submit(Question("other", latency_budget_ms=budget)) for budget in (2000.0, None, -5.0)]
    done = []
    for now[0] in (0.9, 1.1):
        step.release()
        assert stepped.acquire(timeout=LIMIT)
        done.append(late.result.done())
    assert done == [False, refuse] and not any(other.result.done() for other in others)
    step.release(100)
    assert {ticket.result.result(LIMIT).status for ticket in (first, *others)} == {Status.OK}
    answer = late.result.result(LIMIT)
    assert answer.status == (Status.BUDGET_INFEASIBLE if refuse else Status.OK)
    if refuse:
        assert answer.times.queue == answer.times.total == pytest.approx(1100.0) and not answer.budget_met
        assert "1000 ms ran out behind another question" in answer.status_message


def test_chores_come_after_the_questions_that_wait_and_calls_before(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue()
    first = ask_and_wait_until_it_runs(queue, scene, "first")

    def show(s: GatedScene) -> None:
        s.log.append("show")

    chores = [queue.call(show, chore=True) for _ in range(3)]
    second = queue.submit(Question("second"))
    queue.call(lambda s: s.log.append("save"))
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=1))
    scene.release.release(2)
    first.result.result(LIMIT), second.result.result(LIMIT)
    chores[-1].result(LIMIT)
    assert scene.log == ["ask first", "save", "observe 1", "ask second", "show"]
    assert all(chore.done() for chore in chores)
    queue.call(show, chore=True).result(LIMIT)  # once more, now that it does not wait any more
    assert scene.log[-2:] == ["show", "show"]


def test_newest_frame_wins_and_every_frame_is_accounted_for(make_queue: Any, scene: GatedScene) -> None:
    outcomes: list[str] = []
    queue = make_queue(events=Listeners().add(FrameTaken, lambda told: outcomes.append(told.fate)))
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    for stamp in (1, 2, 3):
        queue.submit_frame(lambda stamp=stamp: SimpleNamespace(stamp_ns=stamp))
    second = queue.submit(Question("second"))
    scene.release.release(2)
    first.result.result(LIMIT), second.result.result(LIMIT)
    # The frame that waits is seen before the next question, and only the newest of the three.
    assert scene.log == ["ask first", "observe 3", "ask second"]
    assert outcomes == ["superseded", "superseded", Verdict.KEY_FRAME.value]
    assert queue.frames.total() == 3


def test_a_bad_frame_is_counted_with_its_reason_and_the_next_one_works(make_queue: Any, scene: GatedScene) -> None:
    outcomes: list[str] = []
    queue = make_queue(events=Listeners().add(FrameTaken, lambda told: outcomes.append(told.fate)))

    def bad() -> Any:
        raise ValueError("encoding 'yuv422' is not supported")

    queue.submit_frame(bad)
    queue.call(lambda s: None).result(LIMIT)
    ask_and_wait_until_it_runs(queue, scene, "sync")
    assert outcomes == ["error: encoding 'yuv422' is not supported"]
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=7))
    scene.release.release(2)
    queue.submit(Question("again")).result.result(LIMIT)
    assert "observe 7" in scene.log


def test_a_frame_that_would_not_be_kept_is_not_made(make_queue: Any, scene: GatedScene) -> None:
    outcomes: list[str] = []
    queue = make_queue(events=Listeners().add(FrameTaken, lambda told: outcomes.append(told.fate)))
    scene.announce = lambda stamp_ns, pose: Verdict.TOO_SIMILAR if pose == "known" else None
    for stamp, pose in ((1, "known"), (2, "new")):
        queue.submit_frame(lambda stamp=stamp: SimpleNamespace(stamp_ns=stamp), lambda of=(stamp, pose): of)
        queue.call(lambda s: None).result(LIMIT)
        ask_and_wait_until_it_runs(queue, scene, "sync")
        scene.release.release()

    def malformed() -> Any:
        raise ValueError("step 5")

    queue.submit_frame(lambda: pytest.fail("made"), malformed)
    queue.submit(Question("last"))
    scene.release.release()
    queue.call(lambda s: None).result(LIMIT)
    assert [entry for entry in scene.log if entry.startswith("observe")] == ["observe 2"]
    assert outcomes == ["too_similar", "key_frame", "error: step 5"]


def test_a_frame_that_waits_when_the_worker_stops_is_counted(scene: GatedScene) -> None:
    outcomes: list[str] = []
    events = Listeners().add(FrameTaken, lambda told: outcomes.append(told.fate))
    worker, queue = working(scene, events=events)
    worker.start()
    running = ask_and_wait_until_it_runs(queue, scene, "long")
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=1))
    scene.release.release()
    assert worker.stop(LIMIT) and running.result.done()
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=2))
    assert sorted(outcomes) in (["key_frame", "stopped"], ["stopped", "stopped"])


def test_an_exception_is_an_error_answer_and_the_worker_lives_on(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue()
    answer = queue.submit(Question("explode")).result.result(LIMIT)
    assert answer.status == Status.ERROR and "MemoryError: no memory left" in answer.status_message
    scene.release.release()
    assert queue.submit(Question("fine")).result.result(LIMIT).status == Status.OK


def test_whoever_is_told_the_fate_of_frames_may_fail(make_queue: Any, scene: GatedScene) -> None:
    """In the worker's thread and in the caller's: the frame is counted, the thread lives on and answers."""
    queue = make_queue(events=Listeners().add(FrameTaken, lambda told: 1 // 0))
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=1))
    assert scene.encoding.acquire(timeout=LIMIT)
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    for stamp in (2, 3):
        queue.submit_frame(lambda stamp=stamp: SimpleNamespace(stamp_ns=stamp))  # type: ignore[misc]
    scene.release.release()
    assert first.result.result(LIMIT).status == Status.OK
    assert queue.frames["superseded"] == 1 and queue.frames["key_frame"] >= 1


def test_who_asked_is_told_of_that_question_and_listeners_of_all(make_queue: Any, scene: GatedScene) -> None:
    told: list[Any] = []
    queue = make_queue(events=Listeners().add(TextSoFar, told.append).add(StageBegan, told.append))
    own: list[Any] = []
    scene.release.release(2)
    for number, listener in ((7, own.append), (8, None)):
        queue.submit(Question("What?"), number=number, listener=listener).result.result(LIMIT)
    assert own == [StageBegan(7, "prefill"), TextSoFar(7, "a chair", 2)]
    assert told == [*own, StageBegan(8, "prefill"), TextSoFar(8, "a chair", 2)]


def test_text_is_not_written_for_nobody(make_queue: Any, scene: GatedScene) -> None:
    queue = make_queue()
    scene.release.release(2)
    queue.submit(Question("silent")).result.result(LIMIT)
    assert scene.log == ["ask silent"]
    queue.submit(Question("heard"), listener=lambda event: 1 // 0).result.result(LIMIT)
    assert scene.log == ["ask silent", "text", "ask heard"]


def test_a_defect_between_questions_costs_that_turn(
    make_queue: Any, scene: GatedScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question that was taken is an ERROR, and the next one is answered."""
    queue = make_queue()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("nobody foresaw this")

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "_take_frame", broken)
        answer = queue.submit(Question("first")).result.result(LIMIT)
    assert (answer.status, answer.status_message) == (Status.ERROR, "RuntimeError: nobody foresaw this")
    scene.release.release()
    assert queue.submit(Question("second")).result.result(LIMIT).status == Status.OK


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_when_the_thread_ends_nobody_waits_for_it(scene: GatedScene) -> None:
    """Not even by what ends programs: what it ran, what waited and what comes later is answered."""
    worker, queue = working(scene)
    worker.start()
    worker.ready.result(LIMIT)

    def end(scene: Any) -> None:
        raise SystemExit(1)

    first = queue.submit(Question("first"), before=end)
    second = queue.submit(Question("second"))
    assert first.result.result(LIMIT).status == Status.ERROR
    assert second.result.result(LIMIT).status in (Status.CANCELLED, Status.BUSY)
    assert worker.stop(LIMIT)
    assert queue.submit(Question("third")).result.result(LIMIT).status == Status.BUSY


def test_stop_answers_everything(scene: GatedScene) -> None:
    worker, queue = working(scene)
    worker.start()
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    second = queue.submit(Question("second"))
    chore = queue.call(lambda s: None, chore=True)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    while not first.cancelled:
        pass
    scene.release.release()
    stopper.join(LIMIT)
    assert first.result.result(0).status == Status.CANCELLED
    assert second.result.result(0).status == Status.CANCELLED
    assert queue.submit(Question("late")).result.result(0).status == Status.BUSY
    with pytest.raises(RuntimeError, match="stopping"):
        queue.call(lambda s: None).result(0)
    with pytest.raises(RuntimeError, match="stopping"):
        chore.result(0)


def test_a_model_that_cannot_be_loaded_is_reported_and_questions_are_answered() -> None:
    def fail() -> Any:
        raise OSError("no such directory: /models/none")

    worker = Worker(fail)
    queue = worker.open(lambda engine: engine)
    early = queue.submit(Question("early"))
    worker.start()
    with pytest.raises(OSError, match="/models/none"):
        queue.ready.result(LIMIT)
    assert early.result.result(LIMIT).status == Status.ERROR
    assert "/models/none" in early.result.result(LIMIT).status_message
    assert worker.stop(LIMIT)


def test_a_question_ends_the_work_ahead_and_is_answered(make_queue: Any, scene: GatedScene) -> None:
    scene.work_ahead = True
    queue = make_queue()
    assert scene.preparing.acquire(timeout=LIMIT)
    scene.release.release()
    ticket = queue.submit(Question("now"))
    assert ticket.result.result(LIMIT).status == Status.OK
    assert scene.log[:2] == ["prepare", "ask now"]
    # Calls do not wait for it either.
    assert queue.call(lambda s: "called").result(LIMIT) == "called"


def test_a_question_ends_the_encoding_of_a_frame_and_is_answered(make_queue: Any, scene: GatedScene) -> None:
    scene.encodes_endlessly = True
    queue = make_queue()
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=1))
    assert scene.encoding.acquire(timeout=LIMIT)
    scene.release.release()
    assert queue.submit(Question("now")).result.result(LIMIT).status == Status.OK
    assert scene.log == ["observe 1", "encode", "ask now"]


def test_after_work_ahead_the_worker_rests_as_its_share_of_time_asks(scene: GatedScene) -> None:
    now, rested = [0.0], threading.Event()
    rests: list[float | None] = []

    class Rest(threading.Condition):
        """Notes how long it may wait, and then waits for somebody."""

        def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
            rests.append(timeout)
            if timeout == 0.0:
                return False
            if timeout is not None:  # None: the scene is not built yet
                rested.set()
            return super().wait_for(predicate, LIMIT)

    def prepare(should_stop: Callable[[], bool]) -> None:
        now[0] += 2.0
        # Without a rest it would be asked again and again.
        scene.work_ahead = now[0] < 20.0

    scene.work_ahead, scene.prepare = True, prepare  # type: ignore[method-assign]
    worker, _ = working(scene, ahead=0.25, clock=lambda: now[0], changed=Rest())
    worker.start()
    assert rested.wait(LIMIT) and worker.stop(LIMIT)
    assert rests[1:3] == [0.0, 6.0]


def test_without_a_share_of_time_nothing_is_done_ahead(make_queue: Any, scene: GatedScene) -> None:
    scene.work_ahead = True
    queue = make_queue(ahead=0.0)
    scene.release.release()
    assert queue.submit(Question("now")).result.result(LIMIT).status == Status.OK
    queue.call(lambda s: None).result(LIMIT)
    assert scene.log == ["ask now"]


def test_work_ahead_that_fails_is_tried_again_with_the_next_frame(make_queue: Any, scene: GatedScene) -> None:
    scene.work_ahead = "broken"  # type: ignore[assignment]
    queue = make_queue(ahead=1.0)
    assert scene.preparing.acquire(timeout=LIMIT)
    for _ in range(3):
        queue.call(lambda s: None).result(LIMIT)
    assert scene.log == ["prepare"]
    queue.submit_frame(lambda: SimpleNamespace(stamp_ns=1))
    assert scene.preparing.acquire(timeout=LIMIT)
    scene.release.release()
    assert queue.submit(Question("fine")).result.result(LIMIT).status == Status.OK


def test_whether_there_is_work_ahead_is_asked_without_keeping_others_waiting(scene: GatedScene) -> None:
    asked, release = threading.Event(), threading.Event()

    class Slow(GatedScene):
        @property
        def work_ahead(self) -> bool:
            asked.set()
            release.wait(2 * LIMIT)
            return False

        @work_ahead.setter
        def work_ahead(self, _: bool) -> None:
            pass

    slow = Slow()
    worker, queue = working(slow)
    worker.start()
    assert asked.wait(LIMIT)
    others: list[Any] = []
    other = threading.Thread(target=lambda: others.append(queue.submit(Question("now"))), daemon=True)
    other.start()
    other.join(LIMIT)
    assert others and not release.is_set()
    release.set()
    slow.release.release()
    assert others[0].result.result(LIMIT).status == Status.OK
    assert worker.stop(LIMIT)


def test_an_error_while_looking_for_work_ahead_leaves_the_worker_alive(
    make_queue: Any, scene: GatedScene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> bool:
        raise RuntimeError("no views cover the scene")

    monkeypatch.setattr(GatedScene, "work_ahead", property(broken, lambda *_: None), raising=False)
    queue = make_queue()
    scene.release.release()
    assert queue.submit(Question("now")).result.result(LIMIT).status == Status.OK
    assert "prepare" not in scene.log


def test_the_duty_cycle_by_hand() -> None:
    duty = DutyCycle(0.25)
    assert duty.rest(10.0) == 0.0
    duty.worked(10.0, 12.0)  # 2 s are a quarter of 8 s
    assert (duty.rest(12.0), duty.rest(15.0), duty.rest(18.0), duty.rest(30.0)) == (6.0, 3.0, 0.0, 0.0)
    assert DutyCycle(0.0).rest(0.0) is None
    always = DutyCycle(1.0)
    always.worked(0.0, 5.0)
    assert always.rest(5.0) == 0.0
    for share in (-0.1, 1.1):
        with pytest.raises(ValueError, match=str(share)):
            DutyCycle(share)
