# SPDX-License-Identifier: Apache-2.0
"""What a robot whose questions are answered elsewhere knows by itself, and what it brings there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Question, Status
from tests.architectures import NAMES
from tests.engine.scenes import THINGS, room_frame
from tests.fleet.test_link import robot, show


@pytest.mark.parametrize("encode", ["local", "picture"])
def test_what_a_frame_that_is_no_view_takes_out_is_sent_before_anybody_asks(
    tiny_of: Any, url_of: Any, encode: str
) -> None:
    """The views are the same, and of them less is left; what the frame shows that is new is noted, with features or
    without."""
    name = NAMES[0]
    _, scene, _ = robot(url_of(name), tiny_of(name), **{"engine.encode": encode, "scene.min_change": 1000})
    offered: list[Any] = []
    scene.offer = lambda manifest, *_: offered.append(manifest)
    for index in (0, 1):
        scene.observe(room_frame(index, THINGS[1:]))
    scene.prepare()
    views = set(scene.poses)
    assert not scene.work_ahead and [entry.gone for entry in offered[-1].views] == [(), ()]
    scene.observe(replace(room_frame(0, THINGS[:1]), stamp_ns=10**10))
    assert set(scene.poses) == views and scene.memory.past.tombstones.gone
    assert scene.memory.past.tombstones.appeared
    assert scene.work_ahead
    scene.prepare()
    assert not scene.work_ahead and any(entry.gone for entry in offered[-1].views)
    assert bool(offered[-1].things) is (encode == "local")


def test_an_answer_about_a_place_that_nobody_saw_is_unsure_from_there_too(
    tiny_of: Any, url_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine does not know where the robot has looked. (Its random model never ends by itself.)"""
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    attempt = engine.attempt

    def ended(*of: Any) -> Any:
        answer, recalled = attempt(*of)
        return replace(answer, status=Status.OK, status_message=""), recalled

    monkeypatch.setattr(engine, "attempt", ended)
    seen, behind_the_wall = np.array([[0.05, 1.2, 0.6]]), np.array([[0.05, 2.6, 0.5]])
    assert engine.ask(scene, Question("What is this?", seen)).status is Status.OK
    answer = engine.ask(scene, Question("What is this?", behind_the_wall))
    assert (answer.status, answer.status_message) == (Status.UNSURE, "nobody has looked at the place")
