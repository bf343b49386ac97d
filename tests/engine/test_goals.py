# SPDX-License-Identifier: Apache-2.0
"""Goals of answers, with the tiny model: as configured, and from where the robot is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine import knowing
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.scene_memory import SceneMemory
from adatoken3d_ros.scene.goal import Goal, GoalConfig
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, Verdict
from adatoken3d_ros.settings import Settings
from tests.engine.scenes import ask, load_scene, room_frame

MakeSession = Callable[..., Scene]
EVERY = SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0))
THERE = np.array([[0.05, 1.2, 0.6]])  # on a box
GONE_NS, SOON = 10**10, 5 * 10**8
AWAY = np.array([[0, -1, 0, 1.0], [1, 0, 0, 0.5], [0, 0, 1, 0.4], [0, 0, 0, 1.0]])
STEP = np.array([[1, 0, 0, 0.001], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])  # 1 mm along x


def test_goals_are_as_configured(make_session: MakeSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make_session(EVERY)
    monkeypatch.setattr(SceneMemory, "floor", property(lambda _: 0.0))
    for index in range(6):
        session.observe(room_frame(index))
    answer = ask(session, Question("What?", THERE, max_new_tokens=2))
    assert answer.goal is None or answer.goal[2, 3] == pytest.approx(0.0, abs=0.02)
    session.config = replace(session.config, goal=GoalConfig(clearance=3.0))
    narrow = ask(session, Question("What?", THERE, max_new_tokens=2))
    assert narrow.goal is None and "3 m radius" in narrow.goal_reason


def test_a_goal_is_one_that_can_be_got_to_from_where_the_robot_is_now(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is where the newest frame was taken, not the newest view: it may have come back to a place that it knew."""
    asked: list[Any] = []
    monkeypatch.setattr(knowing, "find_goal", lambda *args: asked.append(args[2]) or Goal(None))
    session = make_session(SessionConfig(key_frames=KeyFrameConfig(max_disagreement=0.2)))

    def camera() -> list[float]:
        ask(session, Question("What?", THERE, max_new_tokens=2))
        return [round(float(x), 3) for x in asked[-1]]

    for index in (0, 1, 2):
        session.observe(room_frame(index))
    session.encode_pending()
    first, last = ([0.6 * index, 0.0, 1.0] for index in (0, 2))
    assert camera() == last
    back = replace(room_frame(0), stamp_ns=GONE_NS)
    assert session.memory.observe(back) is Verdict.TOO_SIMILAR and camera() == first
    T = room_frame(2).T_world_camera
    assert session.memory.announce(GONE_NS + SOON, T) is Verdict.TOO_SIMILAR and camera() == last
    session.memory.observe(replace(back, stamp_ns=2 * GONE_NS))
    wrong = replace(room_frame(1), T_world_camera=AWAY @ room_frame(1).T_world_camera, stamp_ns=2 * GONE_NS + SOON)
    assert session.memory.observe(wrong) is Verdict.DISAGREES and camera() == first
    session.move({stamp: STEP @ pose for stamp, pose in session.poses.items()})
    assert camera() == [0.001, 0.0, 1.0]
    session.clear()
    session.observe(room_frame(1))
    session.encode_pending()
    assert camera() == [0.6, 0.0, 1.0]


def test_settings_of_goals_arrive(tiny_directory: Path) -> None:
    given = {"goal.distance": 1.5, "goal.clearance": 0.5, "goal.height": 0.4, "memory.moved_within": 7.0}
    scene = load_scene(Settings({"model.path": str(tiny_directory), "budget.warm_up": False, **given}))
    assert scene.config.goal == GoalConfig(1.5, 0.5, 0.4)
    assert scene.memory.past.tombstones.moved_within == 7.0
