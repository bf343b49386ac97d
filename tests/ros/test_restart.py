# SPDX-License-Identifier: Apache-2.0
"""A node that is killed and started again goes on where it was: views, corrected poses, marks, its map."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer, Mark
from adatoken3d.srv import AddMark, ListMarks, RemoveMark, UpdatePoses
from geometry_msgs.msg import PoseStamped
from ros_graph import Graph, synthetic_frame
from safetensors import safe_open
from seeing_node import NAME, STAMP, VIEWS, SeeingNode
from sensor_msgs.msg import PointCloud2
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.ros.outputs.fill import fill_pose, ns_to_stamp

QUESTION = "What is near the charging dock?"
FIELDS = ("text", "status", "spatial_tokens", "retained_tokens", "as_of", "header", "model_id")
FIELDS += ("verdict", "verdict_reason", "evidence", "coverage", "goal_near", "goal_reason")


def add(graph: Graph, name: str, x: float, frame: str = "") -> Any:
    request = AddMark.Request(frame_id=frame, mark=Mark(name=name))
    request.mark.place.x, request.mark.place.z, request.mark.extent.x = x, 1.0, 0.5
    return graph.call(AddMark, f"{NAME}/add_mark", request)


def corrected(frame: str = "map") -> Any:
    """All views a metre farther along x than they were said to be."""
    request = UpdatePoses.Request()
    for i in range(VIEWS):
        message = PoseStamped()
        T = synthetic_frame(i)[3]
        T[0, 3] += 1.0
        ns_to_stamp(message.header.stamp, STAMP + i * 100_000_000)
        message.header.frame_id = frame
        fill_pose(message.pose, T)
        request.poses.append(message)
    return request


def saved_poses(directory: Path) -> Any:
    """Of the newest version; None before there is one."""
    files = sorted(directory.glob("*.scene"))
    if not files:
        return None
    with safe_open(files[-1], framework="np") as file:
        return file.get_tensor("poses"), "kitchen door" in bytes(file.get_tensor("notes")).decode()


def test_what_was_known_is_known_after_a_restart(
    graph: Graph, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    kept = {"scene__directory": tmp_path, "scene__autosave_period": 0.1, "scene__restore": True}
    node = SeeingNode(graph, tiny_model, **kept)
    assert "nothing was restored: there is no file in" in node.process.log

    # Marks: added, refused twice over, listed, in sight, in questions, removed.
    assert add(graph, "charging dock", 2.0).success and add(graph, "kitchen door", 1.0, "map").success
    twice = add(graph, "The Charging Dock", 0.0)
    assert not twice.success and "a mark 'charging dock' already, at [2.0, 0.0, 1.0] m" in twice.message
    elsewhere = add(graph, "other", 0.0, "base_link")
    assert not elsewhere.success and "only 'tf' knows other frames" in elsewhere.message
    assert not add(graph, "", 0.0).success and not add(graph, "far", np.inf).success
    assert add(graph, "lamp", 0.0).success
    assert graph.call(RemoveMark, f"{NAME}/remove_mark", RemoveMark.Request(name="Lamp")).success
    gone = graph.call(RemoveMark, f"{NAME}/remove_mark", RemoveMark.Request(name="Lamp"))
    assert not gone.success and "there is no mark 'Lamp'; there are: charging dock, kitchen door" in gone.message
    listed = graph.call(ListMarks, f"{NAME}/list_marks")
    assert [mark.name for mark in listed.marks] == ["charging dock", "kitchen door"] and listed.map_id
    seen = graph.collect(MarkerArray, f"{NAME}/markers")
    graph.wait(lambda: seen and "charging dock" in {m.text for m in seen[-1].markers}, "the mark in sight")
    assert node.ask(QUESTION).text == node.ask("What is near [2.000, 0.000, 1.000]?").text

    # Corrected poses: the tokens move, nothing is encoded again.
    tokens = graph.collect(PointCloud2, f"{NAME}/scene_tokens")
    graph.wait(lambda: tokens, "the scene's tokens")
    count = len(tokens)
    refused = graph.call(UpdatePoses, f"{NAME}/update_poses", corrected("odom"))
    assert not refused.success and "'odom'" in refused.message and not refused.moved
    moved = graph.call(UpdatePoses, f"{NAME}/update_poses", corrected())
    assert moved.success and moved.moved == VIEWS, moved.message
    graph.wait(lambda: len(tokens) > count, "the tokens where they are now")
    x = [np.frombuffer(bytes(cloud.data), "<f4").reshape(-1, cloud.point_step // 4)[:, 0].mean() for cloud in tokens]
    assert x[-1] - x[0] == pytest.approx(1.0, abs=0.05)

    def is_saved() -> bool:
        found = saved_poses(tmp_path)
        return found is not None and bool(found[1] and (found[0][:, 0, 3] > 0.9).all())

    graph.wait(is_saved, "a file with all of it")
    before = node.ask(QUESTION)
    assert before.status == Answer.TRUNCATED
    assert before.evidence and before.evidence[0].views and 0 < before.coverage <= 1 and before.goal_reason
    node.process.stop(signal.SIGKILL)

    # On a domain of its own: on the other one the middleware takes the dead node for a living one for a while.
    (tmp_path / "again").mkdir()
    graph = Graph(tmp_path / "again")
    request.addfinalizer(graph.close)
    again = SeeingNode(graph, tiny_model, blind=True, **kept)
    assert f"{VIEWS} views were restored from" in again.process.log
    answer = again.ask(QUESTION)
    for field in FIELDS:
        assert getattr(answer, field) == getattr(before, field), field
    relisted = graph.call(ListMarks, f"{NAME}/list_marks")
    assert (relisted.map_id, relisted.marks) == (listed.map_id, listed.marks)
    for i in range(VIEWS, 2 * VIEWS):
        rgb, depth, K, T = synthetic_frame(i)
        T[0, 3] += 1.0  # what is seen from here agrees with the views where they are now
        again.camera.send(again.camera.messages(STAMP + i * 100_000_000, rgb, depth, K, T))
        graph.wait(lambda count=i + 1: again.key_frames() == count, "it to go on")
