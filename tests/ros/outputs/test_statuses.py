# SPDX-License-Identifier: Apache-2.0
"""Statuses on /diagnostics of a real node that trip by a fault that is put into it, and end with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

import numpy as np
import rclpy
from adatoken3d.msg import Answer
from diagnostic_msgs.msg import DiagnosticArray
from live_node import Live
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from ros_graph import Camera, claim_domain, synthetic_frame

from adatoken3d_ros.engine import runtime
from adatoken3d_ros.engine.budget.latency import FORMULA, TERMS, LatencyModel
from adatoken3d_ros.ros.node import SceneNode
from adatoken3d_ros.ros.outputs import diagnostics

OK, WARN, ERROR = diagnostics.OK, diagnostics.WARN, diagnostics.ERROR
SECOND = 1_000_000_000


class Watched(Live):
    """A node that is active, with a camera's publishers and what it says on /diagnostics."""

    def begin(self) -> None:
        self.told: list[Any] = []
        self.tester.create_subscription(DiagnosticArray, "/diagnostics", self.told.append, 10)
        self.eye = Camera(SimpleNamespace(node=self.tester))  # type: ignore[arg-type]  # only its node is used
        self.stamp = time.time_ns() - 3600 * SECOND
        assert self.configure(), self.node.engine.problem
        assert self.node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        self.wait(self.eye.matched, "the inputs")

    def see(self, task: str, level: bytes, text: str) -> None:
        """Waits for a status that is sent from now on."""
        self.told.clear()

        def found() -> bool:
            statuses = [s for message in self.told for s in message.status if s.name == f"adatoken3d: {task}"]
            return any(s.level == level and text in s.message for s in statuses)

        self.wait(found, f"{task} {level!r} {text!r}, not {self.told[-1:]}")

    def show(self, view: int, *, blind: bool = False) -> None:
        """Sends a frame and waits until the node is done with it."""
        before = self.node.inputs.fates.total()
        rgb, depth, K, T = synthetic_frame(view)
        self.stamp += SECOND
        self.eye.send(self.eye.messages(self.stamp, rgb, depth * (not blind), K, T))
        self.wait(lambda: self.node.inputs.fates.total() > before, f"frame {view}")

    def works(self) -> bool:
        return bool(self.ask().status in (Answer.OK, Answer.TRUNCATED))


@pytest.fixture
def watched(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """With a latency model that is made up."""
    domain, lock = claim_domain()
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    made_up = LatencyModel({name: [1e-4] * len(terms) for name, terms in TERMS.items()})
    monkeypatch.setattr(runtime, "latency_model", lambda *_: (made_up, False))
    rclpy.init(args=[], domain_id=domain)
    executor = SingleThreadedExecutor()
    node, tester = SceneNode(), Node("tester", use_global_arguments=False)
    for one in (node, tester):
        executor.add_node(one)
    live = Watched(node, tester, executor, tiny_model)
    live.put({"model.path": str(tiny_model), "pose.source": "pose_topic", "max_new_tokens": 4})
    live.put({"diagnostics.period": 0.05, "diagnostics.stale_after": 3600.0})
    live.begin()
    yield live
    node.close()
    tester.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()
    lock.close()


def test_memory_that_runs_low(watched: Watched) -> None:
    watched.show(0)
    for figures, level, text in (
        ((9, 100), WARN, "only 9.0% of the machine's memory is free"),
        ((2, 100), ERROR, "only 2.0% of the machine's memory is free"),
        ((50, 100, 9, 100), WARN, "only 9.0% of the GPU's memory is free"),
        ((50, 100, 2, 100), ERROR, "only 2.0% of the GPU's memory is free"),
        ((50, 100, 50, 100), OK, "1 MiB used"),
    ):
        found = diagnostics.Memory(2**20, *figures)
        watched.node.health.read_memory = lambda on_gpu, found=found: found  # type: ignore[misc]
        watched.see("memory", level, text)
    assert watched.works()


def test_frames_of_which_none_can_be_used(watched: Watched) -> None:
    watched.see("scene", WARN, "nothing has been seen yet")
    for view in range(10):
        watched.show(view, blind=True)
    watched.see("scene", ERROR, "frames come, but none has become a view: 10 no_depth")
    watched.see("inputs", ERROR, "the last frame had no valid depth")
    watched.show(10)
    watched.see("scene", OK, "1 key frames")
    watched.see("inputs", OK, "frames arrive")
    assert watched.works()


def test_budgets_that_are_missed(watched: Watched) -> None:
    """One of four, then three of six; a minute later they are forgotten."""
    watched.show(0)
    for budget in (1e-3, 600_000.0, 600_000.0, 600_000.0):
        assert watched.ask(latency_budget_ms=budget).budget_met == (budget > 1.0)
    # How fast it really is has nothing to do with what was made up.
    watched.node.engine.drift = dict  # type: ignore[method-assign]
    watched.see("latency", WARN, "25% of the latency budgets of the last minute were missed")
    for _ in range(2):
        watched.ask(latency_budget_ms=1e-3)
    watched.see("latency", ERROR, "50% of the latency budgets of the last minute were missed")
    watched.node.health.latency.clock = lambda: time.monotonic() + diagnostics.MISSED_SECONDS + 1.0
    watched.see("latency", OK, "median")
    assert watched.ask(latency_budget_ms=600_000.0).budget_met
    watched.see("latency", OK, "median")


def test_a_stage_that_drifts(watched: Watched) -> None:
    """Prefills that take other times than when they were measured, and again the same."""
    watched.show(0)
    assert watched.node.engine.queue is not None
    speed = watched.node.engine.queue.call(lambda session: session.controller.latency).result(60.0)
    assert speed is not None
    for ratio in speed.ratios.values():  # the view that was encoded took its own time
        ratio.value = 1.0
    terms = np.ones(len(TERMS[FORMULA["prefill"]]))
    drifted = "prefill takes {} times as long as when it was measured"
    for factor, level, text in (
        (3.0, WARN, drifted.format("3")),
        (0.1, ERROR, drifted.format("0.1")),
        (10.0, ERROR, drifted.format("10")),
        (1.0, OK, "no answer yet"),
    ):
        for _ in range(300):
            speed.observe("prefill", terms, factor * float(speed.fitted_seconds("prefill", terms)))
        watched.see("latency", level, text)
    assert watched.works()
