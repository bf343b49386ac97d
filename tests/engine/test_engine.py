# SPDX-License-Identifier: Apache-2.0
"""Scenes that share an engine: what happens to one is nothing to the other."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.budget.controller import BudgetConfig, Reuse
from adatoken3d_ros.engine.budget.latency import TERMS, LatencyModel
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.worker import Worker
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.scene.window import OriginMode

LIMIT = 20.0
CONFIGS = (
    SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0), max_new_tokens=4, budget=BudgetConfig(reuse=Reuse.PREFIX)),
    SessionConfig(
        key_frames=KeyFrameConfig(0.0, 0.0, max_views=2), max_new_tokens=3, origin_mode=OriginMode.AUTO, seed=5
    ),
)
STRATEGIES = ("ours", "random")
OPERATIONS = ("observe", "encode", "ask", "prepare", "clear", "strategy", "plans")


def do(scene: Scene, engine: Engine, operation: str, number: int, frame: Callable[..., PosedFrame]) -> Any:
    """One of the operations on a scene; what it shows to the outside."""
    if operation == "observe":
        return scene.observe(replace(frame(number % 5), stamp_ns=(number + 1) * 100_000_000))
    if operation == "encode":
        return scene.encode_pending()
    if operation == "ask":
        return told(engine.ask(scene, Question(f"What is at {number % 3}?")))
    if operation == "prepare":
        scene.prepare()
        return scene.prepared.built, scene.prepared.prefix is not None
    if operation == "strategy":
        name = ("none", "fastv", "ours")[number % 3]
        scene.set_strategy(default_strategy(name, engine.n_layers))
        return scene.strategy
    if operation == "plans":
        question = Question("What?", max_new_tokens=2)
        return scene.situation(question, scene.prompt(question)[0], pending=len(scene.memory.pending))
    return scene.clear()


def told(answer: Answer) -> Any:
    """What of an answer does not depend on the clock."""
    report = answer.report
    tokens = None if report is None else (report.retained.tolist(), report.contribution.tolist())
    return answer.text, answer.status, answer.status_message, answer.stamp_ns, answer.strategy, answer.boxes, tokens


@given(st.lists(st.tuples(st.booleans(), st.sampled_from(OPERATIONS)), min_size=4, max_size=24))
@settings(max_examples=40, deadline=None)
def test_interleaved_scenes_are_as_alone(tiny: Any, wall_frame: Any, steps: list[tuple[bool, str]]) -> None:
    shared = Engine(*tiny)
    together = [shared.open(config, default_strategy(name, shared.n_layers)) for config, name in pairs()]
    apart = [
        (engine := Engine(*tiny)).open(config, default_strategy(name, engine.n_layers)) for config, name in pairs()
    ]
    for number, (which, operation) in enumerate(steps):
        scene, alone = together[which], apart[which]
        found = do(scene, shared, operation, number, wall_frame)
        expected = do(alone, alone.runtime, operation, number, wall_frame)  # type: ignore[arg-type]
        assert found == expected, (which, operation)
    for scene, alone in zip(together, apart, strict=True):
        assert scene.poses.keys() == alone.poses.keys()
        a, b = scene.tokens(), alone.tokens()
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert torch.equal(a.features, b.features) and torch.equal(a.xyz, b.xyz)
        assert vars(scene.controller.lengths) == vars(alone.controller.lengths)


def pairs() -> Any:
    return zip(CONFIGS, STRATEGIES, strict=True)


def test_what_one_scene_learns_of_the_machine_holds_for_all_but_not_of_its_gates(tiny: Any) -> None:
    engine = Engine(*tiny)
    engine.latency = LatencyModel({name: [1e-3] * len(terms) for name, terms in TERMS.items()}, {"policy": "ours"})
    ours, same, other = (engine.open(strategy=default_strategy(name, 2)) for name in ("ours", "ours", "fastv"))
    one, two, three = (scene.controller.latency for scene in (ours, same, other))
    assert one is two is engine.latency and three is not None and three is not one
    assert three.ratios["encode"] is one.ratios["encode"] and three.ratios["prefill"] is not one.ratios["prefill"]
    other.set_strategy(default_strategy("ours", 2))
    assert other.controller.latency is one


def test_a_scene_of_another_engine_is_refused(tiny: Any) -> None:
    with pytest.raises(ValueError, match="belongs to another engine"):
        Engine(*tiny).ask(Engine(*tiny).open(), Question("What?"))


def test_questions_and_answers_can_be_sent_to_another_process(tiny: Any, wall_frame: Any) -> None:
    engine = Engine(*tiny)
    scene = engine.open(SessionConfig(max_new_tokens=2))
    scene.observe(wall_frame(0))
    answer = engine.ask(scene, Question("What is [0.5, 2, 1]?", clicks=np.array([[0.0, 2.0, 1.0]])))
    assert answer.status is Status.TRUNCATED
    sent = pickle.loads(pickle.dumps(answer))
    assert told(sent) == told(answer) and sent.times == answer.times and sent.decision == answer.decision
    assert np.array_equal(sent.question.clicks, answer.question.clicks)


# --- a worker with several scenes ---


class Gated:
    """An engine whose answers are released by hand; its scenes are names."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.started, self.release = threading.Semaphore(0), threading.Semaphore(0)

    def ask(self, scene: Any, question: Question, **_: Any) -> Answer:
        self.started.release()
        assert self.release.acquire(timeout=LIMIT)
        self.log.append(f"{scene.name} {question.text}")
        return Answer(question, Status.OK)


class Named:
    work_ahead = False

    def __init__(self, name: str) -> None:
        self.name = name


def test_scenes_take_turns() -> None:
    engine: Any = Gated()
    worker = Worker(lambda: engine)
    queues: Any = {name: worker.open(lambda _, name=name: Named(name)) for name in "abc"}  # type: ignore[misc]
    worker.start()
    for queue in queues.values():
        queue.ready.result(LIMIT)
    first = queues["a"].submit(Question("0"))
    assert engine.started.acquire(timeout=LIMIT)
    # One robot asks much, the others little: they do not wait for all of it.
    tickets = [first, *(queues["a"].submit(Question(f"{k}")) for k in (1, 2, 3))]
    tickets += [queues[name].submit(Question("0")) for name in "cb"]
    engine.release.release(10)
    for ticket in tickets:
        assert ticket.result.result(LIMIT).status is Status.OK
    assert engine.log == ["a 0", "b 0", "c 0", "a 1", "a 2", "a 3"]
    assert worker.stop(LIMIT)


def test_a_scene_that_cannot_be_made_costs_no_other() -> None:
    engine: Any = Gated()
    worker = Worker(lambda: engine)
    worker.start()

    def fail(_: Any) -> Any:
        raise ValueError("no such strategy")

    broken, good = worker.open(fail), worker.open(lambda _: Named("good"))  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="no such strategy"):
        broken.ready.result(LIMIT)
    refused = broken.submit(Question("What?")).result.result(LIMIT)
    assert refused.status is Status.BUSY and "no such strategy" in refused.status_message
    engine.release.release()
    assert good.submit(Question("What?")).result.result(LIMIT).status is Status.OK
    assert worker.stop(LIMIT)
    late = worker.open(lambda _: Named("late"))  # type: ignore[arg-type, return-value]
    with pytest.raises(RuntimeError, match="stopping"):
        late.ready.result(0)


def test_a_closed_scene_answers_what_it_owes_and_the_others_go_on() -> None:
    engine: Any = Gated()
    worker = Worker(lambda: engine)
    gone, stays = (worker.open(lambda _, name=name: Named(name)) for name in ("gone", "stays"))  # type: ignore
    worker.start()
    running = gone.submit(Question("runs"))
    assert engine.started.acquire(timeout=LIMIT)
    waiting, call = gone.submit(Question("waits")), gone.call(lambda scene: scene)
    worker.close(gone)
    assert waiting.result.result(0).status is Status.CANCELLED and running.cancelled
    with pytest.raises(RuntimeError, match="closed"):
        call.result(0)
    engine.release.release(2)
    assert stays.submit(Question("What?")).result.result(LIMIT).status is Status.OK
    assert running.result.result(LIMIT).status is Status.OK and gone.frames.total() == 0
    assert worker.stop(LIMIT)


def test_a_question_of_one_scene_ends_the_work_ahead_of_another(tiny: Any, wall_frame: Any) -> None:
    """Each scene's work ahead is done, and a question waits for none of it."""
    numbers = count()
    engine = Engine(*tiny)
    worker = Worker(lambda: engine, ahead=1.0)
    queues = [worker.open(lambda engine: engine.open(CONFIGS[0])) for _ in range(2)]
    worker.start()
    for queue in queues:
        queue.submit_frame(lambda: wall_frame(next(numbers)))
    answers = [queue.submit(Question("What?")).result.result(LIMIT) for queue in queues]
    assert [answer.status for answer in answers] == [Status.TRUNCATED] * 2
    assert worker.stop(LIMIT)
