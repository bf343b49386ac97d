# SPDX-License-Identifier: Apache-2.0
"""Robots at one engine: whose question and which views come when, and none is lost."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.fleet.scenes import HeldScene
from tests.architectures import NAMES
from tests.fleet.shared import LIMIT, held_up
from tests.fleet.test_link import robot, show


def test_a_question_whose_robot_leaves_while_it_waits_is_counted(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, as the one that it waits behind is, when that ends."""
    replica = replica_of(NAMES[0])
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    there, go_on = held_up(replica, monkeypatch)
    counted: list[str] = []
    changed = threading.Condition()

    def record(name: str, status: str, *of: Any) -> None:
        with changed:
            counted.append(f"{name} {status}")
            changed.notify_all()

    monkeypatch.setattr(replica, "_record", record)
    first = threading.Thread(target=engine.ask, args=(scene, Question("What is there?")))
    first.start()
    assert there.wait(LIMIT)
    _, other, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]), **{"engine.robot": "leaver"})
    show(other, 0)
    waits: list[bool] = []

    def gives_up() -> bool:
        waits.extend([True] * len(replica.line))
        return bool(waits)

    left = other.runtime.ask(other, Question("What is there?"), should_stop=gives_up)
    assert left.status == Status.CANCELLED
    with changed:
        assert changed.wait_for(lambda: counted == ["leaver CANCELLED"], LIMIT), counted
        go_on.set()
        assert changed.wait_for(lambda: len(counted) > 1, LIMIT)
    first.join(LIMIT)
    assert len(counted) == 2 and counted[1].startswith("tester ")


@pytest.mark.parametrize("ends", ["refused at once", "given up"])
def test_views_that_a_question_has_no_time_for_are_made_for_the_next_one(
    ends: str, url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A robot that stands still sends nothing new: else each of its questions would find as many, and be refused."""
    replica, made, become = replica_of(NAMES[0]), threading.Event(), HeldScene.become
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0, 1)
    monkeypatch.setattr(HeldScene, "become", lambda *of: (become(*of), made.set()))
    with monkeypatch.context() as patch:
        if ends == "given up":
            patch.setattr(replica, "_advance", lambda: None)
        else:
            join = replica.line.join
            patch.setattr(replica.line, "join", lambda what, name, now, end, views: join(what, name, now, now, views))
        question = Question("What is there?", latency_budget_ms=60e3)
        waits = list[bool]()

        def gives_up() -> bool:
            waits.extend([True] * (len(replica.line) if ends == "given up" else 0))
            return bool(waits)

        answer = engine.ask(scene, question, should_stop=gives_up)
        assert answer.status == (Status.CANCELLED if ends == "given up" else Status.BUDGET_INFEASIBLE)
    assert made.wait(LIMIT)
    held = next(one for one in replica.scenes.all() if one.name == scene.name)
    assert len(held.queue.ready.result().manifest.views) == 2
    assert engine.ask(scene, question).status.answered


def test_another_robots_pictures_hold_a_question_up_by_one_view(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are encoded in turn with others' questions, and all of them before the question about them is answered."""
    replica, done = replica_of(NAMES[0]), list[str]()
    _, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    _, other, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]), **{"engine.encode": "picture", "engine.robot": "pictures"})
    show(scene, 0)
    show(other, 0, 1, 2)
    assert scene.runtime.ask(scene, Question("What is there?")).status.answered
    begun, go_on, encode = threading.Event(), threading.Event(), replica.engine.model.encode_views

    def slowly(pictures: Any, **more: Any) -> Any:
        begun.set()
        go_on.wait(LIMIT)
        done.extend(["view"] * len(pictures))
        return encode(pictures, **more)

    monkeypatch.setattr(replica.engine.model, "encode_views", slowly)
    monkeypatch.setattr(replica, "_record", lambda name, status, *of: done.append(f"{name} {Status[status].answered}"))
    threads = [
        threading.Thread(target=one.runtime.ask, args=(one, Question("What is there?"))) for one in (other, scene)
    ]
    threads[0].start()
    assert begun.wait(LIMIT)
    threads[1].start()
    deadline = time.monotonic() + LIMIT
    while len(replica.line) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    for thread in threads:
        thread.join(LIMIT)
    assert done == ["view", "tester True", "view", "view", "pictures True"]


def test_while_somebody_asks_no_view_is_made_that_nobody_waits_for(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one that is begun is made; the others of its scene wait until the answer is there."""
    replica, done, changed = replica_of(NAMES[0]), list[str](), threading.Condition()
    scene, other = (
        robot(url_of(NAMES[0]), tiny_of(NAMES[0]), **{"engine.encode": "picture", "engine.robot": name})[1]
        for name in ("asks", "sends")
    )
    begun, go_on, encode = threading.Event(), threading.Event(), replica.engine.model.encode_views

    def tell(what: str) -> None:
        with changed:
            done.append(what)
            changed.notify_all()

    def slowly(pictures: Any, **more: Any) -> Any:
        begun.set()
        go_on.wait(LIMIT)
        tell("view")
        return encode(pictures, **more)

    monkeypatch.setattr(replica.engine.model, "encode_views", slowly)
    monkeypatch.setattr(replica, "_record", lambda name, status, *of: tell("answer" * Status[status].answered))
    for one in (scene, other):
        show(one, 0, 1, 2)
    other.prepare()
    assert begun.wait(LIMIT)
    asks = threading.Thread(target=scene.runtime.ask, args=(scene, Question("What is there?")))
    asks.start()
    deadline = time.monotonic() + LIMIT
    while replica.line.running is None and time.monotonic() < deadline:
        time.sleep(0.01)
    go_on.set()
    asks.join(LIMIT)
    with changed:
        assert changed.wait_for(lambda: len(done) == 7, LIMIT), done
    assert done == ["view"] * 4 + ["answer"] + ["view"] * 2
