# SPDX-License-Identifier: Apache-2.0
"""Questions that wait for one scene: their order, their limit, and what becomes of those that are given up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.tickets import QuestionPolicy
from tests.engine.gated import LIMIT, GatedScene, ask_and_wait_until_it_runs
from tests.engine.scenes import working


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
