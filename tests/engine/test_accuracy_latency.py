# SPDX-License-Identifier: Apache-2.0
"""Accuracy against latency, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.pruning.policies import POLICY_NAMES
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from benchmarks._accuracy_latency import measure, strategies, thinned

FAST = Strategy("fast", "ours", Schedule.of([1], [0.1]))
SLOW = Strategy("slow", "ours", Schedule())
RIVAL = Strategy("rival", "fastv", Schedule.of([1], [0.5]))


class Session:
    """Answers with the strategy's name; the rival takes as long as the scene has questions before it."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.asked = 0

    def clear(self) -> None:
        self.shown.append("clear")

    def set_strategy(self, strategy: Strategy) -> None:
        self.strategy = strategy

    def ask(self, scene: Session, question: Question) -> Answer:
        self.asked += 1
        ms = {"fast": 10.0, "slow": 30.0, "rival": float(self.asked)}[self.strategy.name]
        return Answer(question, Status.OK, text=self.strategy.name, times=StageTimes(total=ms))


def test_points_by_hand() -> None:
    session: Any = Session()
    scenes: Any = [
        (lambda one: one.shown.append("first"), [SimpleNamespace(question="a"), SimpleNamespace(question="b")]),
        (lambda one: one.shown.append("second"), [SimpleNamespace(question="c")]),
    ]
    done: list[int] = []
    right = {("a", "slow"), ("b", "slow"), ("c", "fast"), ("a", "rival")}
    found = measure(
        session,
        session,
        scenes,
        [SLOW, FAST, RIVAL],
        lambda qa, text: float((qa.question, text) in right),
        lambda: done.append(1),
    )
    assert session.shown == ["clear", "first", "clear", "second"] and len(done) == 3
    assert found["ours"] == [
        {"ms": 10.0, "accuracy": 1 / 3, "questions": 3.0},
        {"ms": 30.0, "accuracy": 2 / 3, "questions": 3.0},
    ]
    assert found["fastv"] == [{"ms": 6.0, "accuracy": 1 / 3, "questions": 3.0}]


def test_every_rival_is_measured_once_per_schedule() -> None:
    asked = strategies([SLOW, FAST], "ours", 12, (0.5, 1.0, 2.0))
    assert asked[:2] == [SLOW, FAST]
    assert {one.policy for one in asked} == set(POLICY_NAMES) - {"none"}
    keys = [(one.policy, one.schedule) for one in asked]
    assert len(set(keys)) == len(keys)


def test_thinned_keeps_both_ends() -> None:
    many = [Strategy(str(i), "ours", Schedule()) for i in range(12)]
    assert [one.name for one in thinned(many, 4)] == ["0", "4", "7", "11"]
    assert len(thinned(many[:2], 6)) == 2
