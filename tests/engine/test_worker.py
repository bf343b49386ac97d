# SPDX-License-Identifier: Apache-2.0
"""The worker's promises, with a scene whose every step the test releases by hand. No sleeping."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.events import FrameTaken, Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.worker import DutyCycle, Worker
from adatoken3d_ros.scene.keyframes import Verdict
from tests.engine.gated import LIMIT, GatedScene, ask_and_wait_until_it_runs
from tests.engine.scenes import working


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


def test_what_comes_while_the_last_question_ends_is_refused_at_once(scene: GatedScene) -> None:
    worker, queue = working(scene)
    worker.start()
    first = ask_and_wait_until_it_runs(queue, scene, "first")
    assert not worker.stop(timeout=0)  # the scene holds the thread
    assert queue.submit(Question("late")).result.result(0).status == Status.BUSY
    with pytest.raises(RuntimeError, match="stopping"):
        queue.call(lambda s: None).result(0)
    assert not first.result.done()
    scene.release.release()
    assert worker.stop(LIMIT)
    assert first.result.result(0).status == Status.CANCELLED


def test_a_scene_that_is_closed_before_it_is_made_leaves_nobody_waiting(scene: GatedScene) -> None:
    worker, _ = working(scene)
    other = worker.open(lambda engine: pytest.fail("made"))
    early = other.submit(Question("early"))
    worker.close(other)
    assert early.result.result(0).status == Status.CANCELLED
    with pytest.raises(RuntimeError, match="closed"):
        other.ready.result(0)
    worker.start()
    assert worker.stop(LIMIT)


def test_closing_a_scene_cancels_what_it_is_asked(make_queue: Any, scene: GatedScene) -> None:
    worker, queue = working(scene)
    worker.start()
    running = ask_and_wait_until_it_runs(queue, scene, "first")
    worker.close(queue)
    assert running.cancelled
    scene.release.release()
    answer = running.result.result(LIMIT)
    assert (answer.status, answer.status_message[:20]) == (Status.CANCELLED, "the scene was closed")
    assert worker.stop(LIMIT)


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
