# SPDX-License-Identifier: Apache-2.0
"""A node that is killed and started again goes on where it was: views, poses, marks, its map, all that it knows."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer, Mark
from adatoken3d.srv import AddMark, ListMarks, RemoveMark, UpdatePoses
from geometry_msgs.msg import Point, Pose, PoseStamped, TransformStamped
from ros_graph import Camera, Graph, synthetic_frame
from safetensors import safe_open
from seeing_node import NAME, STAMP, VIEWS, SeeingNode
from sensor_msgs.msg import PointCloud2
from tf2_msgs.msg import TFMessage
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.ros.outputs.fill import fill_pose, ns_to_stamp
from tests.scene.room import CUPBOARD, TABLE, view

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


class Robot:
    """A camera in a room, whose place TF tells: map to odom, and odom to the camera."""

    def __init__(self, graph: Graph) -> None:
        self._tf = graph.node.create_publisher(TFMessage, "/tf", 100)
        self._camera = Camera(graph)

    def matched(self) -> bool:
        camera = self._camera
        topics = (self._tf, camera.rgb, camera.depth, camera.rgb_info, camera.depth_info)
        return all(publisher.get_subscription_count() for publisher in topics)

    def transform(self, stamp_ns: int, parent: str, child: str, T: Any) -> None:
        message, pose = TransformStamped(child_frame_id=child), fill_pose(Pose(), T)
        message.header.frame_id = parent
        ns_to_stamp(message.header.stamp, stamp_ns)
        to, p = message.transform.translation, pose.position
        to.x, to.y, to.z = p.x, p.y, p.z
        message.transform.rotation = pose.orientation
        self._tf.publish(TFMessage(transforms=[message]))

    def look(self, stamp_ns: int, eye: tuple[float, float, float], *boxes: Any) -> None:
        frame = view(stamp_ns, look_at(np.array(eye), TABLE.mean(axis=0)), *boxes)
        self.transform(stamp_ns, "map", "odom", np.eye(4))
        self.transform(stamp_ns, "odom", "camera", frame.T_world_camera)
        messages = self._camera.messages(stamp_ns, frame.rgb, frame.depth, frame.K, np.eye(4))
        del messages["pose"]
        self._camera.send(messages)


KNOWN = ("as_of", "verdict", "verdict_reason", "evidence", "coverage", "goal_near", "goal_reason")
LOOKS = [(eye, (CUPBOARD, TABLE)) for eye in ((-1.5, -0.5, 1.4), (-1.3, 0.0, 1.6), (-1.0, 0.5, 1.5))]
LOOKS += [((-1.5, -0.5, 1.4), (CUPBOARD,))]
AT_TABLE = np.array([1.2, 0.7, 0.6, 1.0])


def test_what_an_answer_knows_outlives_a_jump_of_the_map_and_a_restart(
    graph: Graph, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A table is seen, and is gone; then the map jumps; then the node is ended, and saves the scene on its way."""
    given: dict[str, Any] = {"pose__source": "tf", "pose__odom_frame": "odom", "scene__min_translation": 0.01}
    given |= {"scene__directory": tmp_path, "scene__autosave_period": 3600.0, "scene__restore": True}
    node = SeeingNode(graph, tiny_model, blind=True, camera=Robot, **given)
    for i, (eye, boxes) in enumerate(LOOKS):
        node.camera.look(STAMP + i * 2_000_000_000, eye, *boxes)
        graph.wait(lambda count=i + 1: node.key_frames() == count, f"key frame {i}")

    def known(of: SeeingNode, T: Any = None) -> list[Answer]:
        """What is known of the table's place, where that is after a jump, and of what a question in words is about."""
        x, y, z, _ = (AT_TABLE if T is None else T @ AT_TABLE).tolist()
        found = [of.ask("What is there?", clicks=[Point(x=x, y=y, z=z)]), of.ask("What is there?")]
        assert all(answer.status == Answer.TRUNCATED for answer in found)
        return found

    place, words = known(node)
    assert place.verdict == Answer.SEEN_THEN_GONE and place.coverage > 0.5 and place.goal_near.header.frame_id == "map"
    gone = place.evidence[-1]
    assert (gone.last_seen.sec, gone.gone.sec) == (STAMP // 10**9 + 4, STAMP // 10**9 + 6)
    assert words.evidence and words.as_of == place.as_of and 0 < words.coverage <= 1

    T = np.array([[0, -1, 0, 3.0], [1, 0, 0, 1.0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    node.camera.transform(STAMP + 10 * 10**9, "map", "odom", T)
    graph.wait(lambda: known(node)[0].verdict != Answer.SEEN_THEN_GONE, "the map's jump")
    before = known(node, T)
    moved = before[0].evidence[-1]
    assert before[0].verdict == Answer.SEEN_THEN_GONE and moved.gone == gone.gone
    assert (moved.place.x, moved.place.y) == pytest.approx((3.0 - gone.place.y, 1.0 + gone.place.x), abs=0.2)

    assert not list(tmp_path.glob("*.scene"))
    assert node.process.stop(signal.SIGINT)[0] == 0
    assert len(list(tmp_path.glob("*.scene"))) == 1, "the last save"
    (tmp_path / "again").mkdir()
    graph = Graph(tmp_path / "again")
    request.addfinalizer(graph.close)
    again = SeeingNode(graph, tiny_model, blind=True, camera=Robot, **given)
    for one, other in zip(before, known(again, T), strict=True):
        for field in KNOWN:
            assert getattr(other, field) == getattr(one, field), field
