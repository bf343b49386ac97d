# SPDX-License-Identifier: Apache-2.0
"""Every message meets its fate and is counted once, over all that a node goes through; and the quality of service."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("rclpy")

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import ReliabilityPolicy
from ros_graph import Camera, Graph, synthetic_frame

from adatoken3d_ros.ros.inputs.accounting import TopicWarnings
from benchmarks._ros import unaccounted

SECOND = 1_000_000_000
OVERRIDES = "qos_overrides./{}.subscription.{}"


def told(diagnostics: list[Any]) -> dict[str, str]:
    """The newest counters."""
    statuses = diagnostics[-1].status if diagnostics else []
    tasks = [status for status in statuses if status.name.endswith((": inputs", ": scene"))]
    return {pair.key: pair.value for status in tasks for pair in status.values}


def test_counters_add_up_over_a_node_s_life(graph: Graph, tiny_model: Path) -> None:
    process = graph.start_node(
        tiny_model,
        diagnostics__period=0.05,
        pose__timeout=0.2,
        **{OVERRIDES.format("rgb/image", "reliability"): "best_effort", OVERRIDES.format("rgb/image", "depth"): 40},
    )
    diagnostics: list[Any] = graph.collect(DiagnosticArray, "/diagnostics", 10)
    camera = Camera(graph)
    assert graph.transition("configure")
    stamps = iter(range(100, 10_000))

    def send(view: int, **spoilt: Any) -> None:
        messages = camera.messages(next(stamps) * SECOND // 2, *synthetic_frame(view))
        for name, value in spoilt.items():
            if value is None:
                del messages[name]
            else:
                setattr(messages[name], *value)
        camera.send(messages)

    def count(name: str, at_least: int) -> None:
        graph.wait(lambda: int(told(diagnostics).get(name, 0)) >= at_least, f"{name} to be {at_least}")

    for life in (1, 2):
        assert graph.transition("activate")
        graph.wait(camera.matched, "the inputs")
        (rgb,) = graph.node.get_subscriptions_info_by_topic("/rgb/image")
        (depth,) = graph.node.get_subscriptions_info_by_topic("/depth/image")
        policies = (rgb.qos_profile.reliability, depth.qos_profile.reliability)
        assert policies == (ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE)
        for view in range(2):
            send(2 * life + view)
            count("frames.key_frame", 2 * (life - 1) + view + 1)
        send(2 * life)
        count("frames.too_similar", life)
        send(9, rgb=("encoding", "strange"))
        count("frames.error", life)
        send(9, depth=None)
        send(9, pose=None)
        for _ in range(2):
            send(2 * life)
        count("pairs.dropped.no_pose", life)
        count("dropped.rgb/image.unmatched", life)
        send(9, pose=None)
        graph.wait(lambda: told(diagnostics)["pairs.waiting"] == "1", "a pair without a pose")
        assert graph.transition("deactivate")
        count("pairs.dropped.stopped", life)
    graph.wait(lambda: not any(unaccounted(told(diagnostics)).values()), "counters that add up")
    values = told(diagnostics)
    # Nine views in each life, one of them without depth.
    assert (values["received.rgb/image"], values["received.depth/image"]) == ("18", "16")
    assert float(values["accepted.age_ms.p95"]) >= float(values["accepted.age_ms.p50"])
    assert values["frames.key_frame"] == "4", process.log


def test_a_quality_of_service_that_there_is_not_is_refused_by_name(graph: Graph, tiny_model: Path) -> None:
    process = graph.start_node(tiny_model, **{OVERRIDES.format("depth/image", "history"): "sometimes"})
    assert graph.transition("configure") and not graph.transition("activate")
    assert "subscription.history must be one of keep_last, keep_all, got 'sometimes'" in process.log
    assert graph.state() == "inactive" and not graph.node.get_subscriptions_info_by_topic("/rgb/image")


def test_a_publisher_may_be_known_before_its_node() -> None:
    """As rclpy's graph tells of it for a moment."""
    infos = [("/", "_NODE_NAME_UNKNOWN_"), ("/robot", "camera"), ("/", "tester")]
    found = [SimpleNamespace(node_namespace=space, node_name=name) for space, name in infos]
    node: Any = SimpleNamespace(get_publishers_info_by_topic=lambda topic: found)
    assert TopicWarnings(node).publishers("/rgb") == ["/robot/camera", "/tester", "a node whose name is not known yet"]


def test_what_is_missing_is_found() -> None:
    values = {
        "received.points": "10", "paired.points": "6", "pending.points": "1", "dropped.points.duplicate_stamp": "2",
        "pairs.matched": "6", "pairs.handed_over": "5", "pairs.waiting": "0", "pairs.dropped.no_pose": "1",
        "pictures.further": "3", "frames.key_frame": "4", "frames.superseded": "3", "rate.points_hz": "9.61",
    }  # fmt: skip
    assert unaccounted(values) == {"messages.points": 1, "pairs": 0, "frames": 1}
