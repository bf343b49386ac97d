# SPDX-License-Identifier: Apache-2.0
"""Latency budgets through the real node: questions by service while a camera streams at 10 Hz.

Whether budgets are kept on a given machine is for the benchmark; here the figures have to belong together.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from ros_graph import Camera, Graph, synthetic_frame

STAMP = 1_700_000_000_000_000_000
PERIOD = 0.1  # seconds


class Stream:
    """A camera that goes sideways, a frame each PERIOD; it is driven by the test's own waiting."""

    def __init__(self, graph: Graph) -> None:
        self._camera = Camera(graph)
        graph.wait(self._camera.matched, "the node's inputs")
        self.sent = 0
        graph.node.create_timer(PERIOD, self._send)

    def _send(self) -> None:
        self._camera.send(self._camera.messages(STAMP + self.sent * 100_000_000, *synthetic_frame(self.sent % 40)))
        self.sent += 1


def test_budgeted_questions_while_frames_stream(graph: Graph, tiny_model: Path) -> None:
    graph.start_node(tiny_model, diagnostics__period=0.1, max_new_tokens=16)
    reports = graph.collect(DiagnosticArray, "/diagnostics", 10)
    assert graph.transition("configure") and graph.transition("activate")
    stream = Stream(graph)
    graph.wait(lambda: stream.sent >= 3, "frames")

    def ask(budget: float) -> tuple[Answer, float]:
        request = AskScene.Request(question="What is there?", latency_budget_ms=budget)
        began = time.monotonic()
        answer = graph.call(AskScene, "/adatoken3d/ask", request).answer
        return answer, (time.monotonic() - began) * 1e3

    graph.wait(lambda: ask(0.0)[0].status != Answer.NO_SCENE, "a scene")
    for budget in (0.0, 1e6, 300.0, 100.0, 20.0, 1.0):
        answer, asked = ask(budget)
        assert answer.status in (Answer.OK, Answer.TRUNCATED), answer.status_message
        # The asker's clock sees the answer's own time and the way there and back, nothing less.
        assert 0 < answer.total_ms <= asked
        stages = [answer.queue_ms, answer.encode_ms, answer.tokens_ms, answer.prefill_ms, answer.decode_ms]
        assert sum(stages) == pytest.approx(answer.total_ms, rel=1e-3)
        assert answer.budget_met == (budget == 0.0 or answer.total_ms <= budget)
        assert answer.latency_budget_ms == pytest.approx(budget)
        assert math.isfinite(answer.predicted_ms) and answer.predicted_ms > 0
        assert "predicted" in answer.plan and "new views" in answer.plan
    assert "smallest feasible one is" in answer.status_message and not answer.budget_met

    def latency_task() -> bool:
        for array in reversed(reports):
            for status in array.status:
                keys = {pair.key for pair in status.values}
                if status.name == "adatoken3d: latency" and {"budgets_missed", "drift.prefill"} <= keys:
                    return bool(status.message)
        return False

    graph.wait(latency_task, "missed budgets and drift on /diagnostics")


def test_a_refused_budget_says_what_would_do_and_a_kept_prefix_answers(graph: Graph, tiny_model: Path) -> None:
    graph.start_node(tiny_model, budget__infeasible="refuse", budget__reuse="prefix", budget__background=1.0)
    assert graph.transition("configure") and graph.transition("activate")
    stream = Stream(graph)
    graph.wait(lambda: stream.sent >= 2, "frames")

    def ask(budget: float = 0.0) -> Answer:
        request = AskScene.Request(question="What is there?", latency_budget_ms=budget)
        return graph.call(AskScene, "/adatoken3d/ask", request).answer

    graph.wait(lambda: ask().status != Answer.NO_SCENE, "a scene")
    refused = ask(0.001)
    assert refused.status == Answer.BUDGET_INFEASIBLE and refused.text == ""
    assert "smallest feasible one is" in refused.status_message
    answered = ask()
    assert answered.strategy == "scene-prefix" and answered.retained_tokens == answered.spatial_tokens
