# SPDX-License-Identifier: Apache-2.0
"""Clouds through the real node: they become views, are accounted for, and a clock that is set back clears the scene."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped
from ros_graph import Graph, synthetic_frame
from ros_messages import cloud_message
from sensor_msgs.msg import PointCloud2, PointField

from adatoken3d_ros.ros.outputs.fill import fill_pose, ns_to_stamp

NAME = "/adatoken3d"
SECOND = 1_000_000_000


class CloudCamera:
    """Publishes coloured clouds with a pose, each under one stamp."""

    def __init__(self, graph: Graph) -> None:
        self._points = graph.node.create_publisher(PointCloud2, "/points", 10)
        self._pose = graph.node.create_publisher(PoseStamped, "/pose", 10)
        graph.wait(self.matched, "the inputs")

    def matched(self) -> bool:
        return bool(self._points.get_subscription_count() and self._pose.get_subscription_count())

    def send(self, stamp_ns: int, T: Any, cloud: SimpleNamespace) -> None:
        pose = PoseStamped()
        fill_pose(pose.pose, T)
        pose.header.frame_id = "map"
        message = PointCloud2()
        for name in ("width", "height", "point_step", "row_step", "is_bigendian", "is_dense", "data"):
            setattr(message, name, getattr(cloud, name))
        message.fields = [PointField(name=f.name, offset=f.offset, datatype=f.datatype, count=1) for f in cloud.fields]
        message.header.frame_id = "camera"
        for one in (pose, message):
            ns_to_stamp(one.header.stamp, stamp_ns)
        self._pose.publish(pose)
        self._points.publish(message)


def cloud_at(index: int) -> tuple[Any, SimpleNamespace]:
    rgb, depth, K, T = synthetic_frame(index)
    return T, cloud_message(rgb, depth.astype(np.float32) / 1000, K)


def values(diagnostics: list[Any], task: str) -> dict[str, str]:
    """The newest values of one task."""
    for message in reversed(diagnostics):
        for status in message.status:
            if status.name.endswith(task):
                return {pair.key: pair.value for pair in status.values}
    return {}


def test_organised_clouds_are_a_scene_and_time_that_jumps_back_clears_it(graph: Graph, tiny_model: Path) -> None:
    process = graph.start_node(tiny_model, input__source="organised_points", autostart="true", diagnostics__period=0.1)
    diagnostics: list[Any] = graph.collect(DiagnosticArray, "/diagnostics", 10)
    camera = CloudCamera(graph)

    def views() -> str:
        return values(diagnostics, "scene").get("key_frames", "")

    for index in range(2):
        camera.send((100 + index) * SECOND, *cloud_at(index))
        graph.wait(lambda index=index: views() == str(index + 1), f"view {index + 1}")
    answer = graph.call(AskScene, f"{NAME}/ask", AskScene.Request(question="What is there?")).answer
    assert answer.status == Answer.TRUNCATED and answer.header.stamp.sec == 101

    T, broken = cloud_at(2)
    broken.row_step += 1
    camera.send(102 * SECOND, T, broken)
    graph.wait(lambda: "row_step" in process.log, "a word about the broken cloud")

    camera.send(10 * SECOND, *cloud_at(3))
    graph.wait(lambda: "jumped back" in process.log and views() == "1", "a new scene")
    counts = values(diagnostics, "inputs")
    assert counts["time_jumps"] == "1"
    assert counts["received.points"] == counts["paired.points"] == "4"


def test_a_coloured_cloud_alone_becomes_several_views(graph: Graph, tiny_model: Path) -> None:
    graph.start_node(tiny_model, input__source="points", autostart="true", diagnostics__period=0.1)
    diagnostics: list[Any] = graph.collect(DiagnosticArray, "/diagnostics", 10)
    camera = CloudCamera(graph)
    directions = np.random.default_rng(0).normal(size=(40_000, 3))
    ball = 2 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    T, flat = cloud_at(0)
    points = np.zeros(len(ball), np.dtype([("xyz", "<f4", 3), ("pad", "<u4"), ("rgb", "<u4")]))
    points["xyz"], points["rgb"] = ball, 0xFF8040
    flat.height, flat.width, flat.row_step, flat.data = 1, len(ball), 20 * len(ball), points.tobytes()
    camera.send(100 * SECOND, T, flat)
    graph.wait(lambda: values(diagnostics, "scene").get("key_frames") == "4", "four views of what is all around")
    assert values(diagnostics, "inputs")["pictures.further"] == "3"
