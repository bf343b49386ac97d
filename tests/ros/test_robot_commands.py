# SPDX-License-Identifier: Apache-2.0
"""The README's commands for a robot, to the letter, against a publisher with a RealSense's names.

The launch line goes through the function that the launch file uses, and the node runs in a process with what comes of
it; tests/ros/test_launch.py runs the launch file itself where launch_ros is installed.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Pose, PoseStamped, TransformStamped
from lifecycle_msgs.msg import State, Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from ros_graph import Camera, Graph, launch_words, synthetic_frame
from test_wiring import README, launches
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.ros.inputs.conversions import pose_to_matrix, stamp_to_ns
from adatoken3d_ros.ros.outputs.fill import fill_pose, ns_to_stamp
from adatoken3d_ros.ros.wiring import wire

CONFIG = Path(__file__).resolve().parents[2] / "config"
REALSENSE = {
    "rgb": "/camera/camera/color/image_raw",
    "rgb_info": "/camera/camera/color/camera_info",
    "depth": "/camera/camera/aligned_depth_to_color/image_raw",
    "depth_info": "/camera/camera/aligned_depth_to_color/camera_info",
}
OPTICAL = "camera_color_optical_frame"


def service_call() -> tuple[str, str, dict[str, Any]]:
    """Name, type and request of the README's question."""
    found = re.findall(r"^ros2 service call (.*)$", README, re.MULTILINE)
    name, kind, request = shlex.split(found[0])
    return name, kind, yaml.safe_load(request)


class Transforms:
    """What a robot and a driver publish: map to base_link, which moves, and base_link to the optical frame."""

    def __init__(self, graph: Graph) -> None:
        latched = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        self._moving = graph.node.create_publisher(TFMessage, "/tf", 100)
        self._fixed = graph.node.create_publisher(TFMessage, "/tf_static", latched)
        # 10 cm before the base and half a metre above it; right is -y, down is -z, forward is x.
        self._T_base_camera = np.array([[0, 0, 1, 0.1], [-1, 0, 0, 0], [0, -1, 0, 0.5], [0, 0, 0, 1.0]])
        self._publish(self._fixed, 0, "base_link", OPTICAL, self._T_base_camera)

    def matched(self) -> bool:
        return bool(self._moving.get_subscription_count() and self._fixed.get_subscription_count())

    def send(self, pose: PoseStamped) -> None:
        """`pose`: of the camera in the map."""
        T_map_base = pose_to_matrix(pose.pose) @ np.linalg.inv(self._T_base_camera)
        self._publish(self._moving, stamp_to_ns(pose.header.stamp), "map", "base_link", T_map_base)

    def _publish(self, publisher: Any, stamp_ns: int, parent: str, child: str, T: Any) -> None:
        message, pose = TransformStamped(child_frame_id=child), fill_pose(Pose(), T)
        message.header.frame_id = parent
        ns_to_stamp(message.header.stamp, stamp_ns)
        p, to = pose.position, message.transform.translation
        to.x, to.y, to.z = p.x, p.y, p.z
        message.transform.rotation = pose.orientation
        publisher.publish(TFMessage(transforms=[message]))


@pytest.mark.parametrize("reliability", [ReliabilityPolicy.BEST_EFFORT, ReliabilityPolicy.RELIABLE])
def test_the_commands_give_an_answer(graph: Graph, tiny_model: Path, reliability: ReliabilityPolicy) -> None:
    (given,) = [given for given in launches() if "model" in given]
    given = {**given, "model": str(tiny_model)}  # the one word that stands for something else
    wiring = wire(given, CONFIG)
    process = graph.start("adatoken3d_ros.ros.node", *launch_words(wiring), "-p", "max_new_tokens:=4")
    graph.wait(lambda: graph.state() == "active", "the node to be active")
    camera = Camera(graph, qos=QoSProfile(depth=10, reliability=reliability), topics=REALSENSE, frame=OPTICAL)
    transforms = Transforms(graph)
    inputs = (camera.rgb, camera.depth, camera.rgb_info, camera.depth_info)
    graph.wait(
        lambda: transforms.matched() and all(publisher.get_subscription_count() for publisher in inputs), "the inputs"
    )
    name, kind, request = service_call()
    assert kind == "adatoken3d/srv/AskScene"
    sent = iter(range(100))

    def ask() -> Answer:
        index = next(sent)
        messages = camera.messages(10**18 + index * 10**8, *synthetic_frame(index % 3))
        transforms.send(messages.pop("pose"))
        camera.send(messages)
        return graph.call(AskScene, name, AskScene.Request(**request)).answer

    graph.wait(lambda: ask().status in (Answer.OK, Answer.TRUNCATED), "an answer")
    answer = ask()
    assert answer.question == request["question"] and answer.header.frame_id == "map"
    assert process.stop()[0] == 0
    # Each step is told once in each activation, with the names on the graph.
    for told in (
        "loading the model",
        f"active, waiting for {REALSENSE['rgb_info']}, {REALSENSE['depth_info']}",
        f"the first message has come on {REALSENSE['rgb']}",
        "the first pose is there (",
        "the first key frame is in the scene",
        "the first answer is given",
    ):
        assert process.log.count(told) == 1, (told, process.log)


def test_what_does_not_go_together_is_said_with_both_sides(graph: Graph, tiny_model: Path) -> None:
    """Reliable asked for by hand of a best-effort camera; and the log's level, in a namespace."""
    given = {"camera": "realsense", "reliability": "reliable", "namespace": "robot1", "log_level": "error",
             "autostart": "false", "pose_source": "static", "model": str(tiny_model)}  # fmt: skip
    process = graph.start("adatoken3d_ros.ros.node", *launch_words(wire(given, CONFIG), "robot1", "error"))
    best_effort = QoSProfile(depth=10, reliability=ReliabilityPolicy.BEST_EFFORT)
    Camera(graph, qos=best_effort, topics={**REALSENSE, "pose": "/nobody"}, frame=OPTICAL)
    diagnostics: list[Any] = graph.collect(DiagnosticArray, "/diagnostics", 10)
    manager = Nav2Manager(graph, "robot1/adatoken3d")
    manager.startup()
    request = AskScene.Request(question="What?")

    def refused() -> str:
        return str(graph.call(AskScene, "/robot1/adatoken3d/ask", request).answer.status_message)

    graph.wait(lambda: "do not go together" in refused(), "both sides in an answer")
    text = refused()
    for topic in REALSENSE.values():
        assert f"{topic}: /tester offers best_effort, volatile, and reliable, volatile is asked for" in text
    graph.wait(
        lambda: any("offers best_effort, volatile" in status.message for status in diagnostics[-1].status),
        "both sides in the diagnostics",
    )
    manager.shutdown()
    assert "[INFO]" not in process.log and "configured: model" not in process.log


class Nav2Manager:
    """What Nav2's lifecycle manager asks of a node that makes no bond: transitions by their number, and states."""

    def __init__(self, graph: Graph, node: str) -> None:
        self._graph, self._node = graph, node

    def startup(self) -> None:
        self._change(Transition.TRANSITION_CONFIGURE, State.PRIMARY_STATE_INACTIVE)
        self._change(Transition.TRANSITION_ACTIVATE, State.PRIMARY_STATE_ACTIVE)

    def shutdown(self) -> None:
        self._change(Transition.TRANSITION_DEACTIVATE, State.PRIMARY_STATE_INACTIVE)
        self._change(Transition.TRANSITION_CLEANUP, State.PRIMARY_STATE_UNCONFIGURED)
        self._change(Transition.TRANSITION_UNCONFIGURED_SHUTDOWN, State.PRIMARY_STATE_FINALIZED)

    def _change(self, number: int, state: int) -> None:
        request = ChangeState.Request(transition=Transition(id=number))
        assert self._graph.call(ChangeState, f"{self._node}/change_state", request).success
        assert self._graph.call(GetState, f"{self._node}/get_state").current_state.id == state


def test_the_node_starts_without_a_ros_installation(graph: Graph, tiny_model: Path) -> None:
    """By the README's line, which needs an environment of wheels alone."""
    (line,) = re.findall(r"`\.venv/bin/python -m (adatoken3d_ros\.ros\.node [^`]*)`", README)
    module, *words = shlex.split(line)
    graph.start(module, *words, "-p", f"model.path:={tiny_model}")
    graph.wait(lambda: graph.state() == "active", "the node to be active")
    for topic in (word.split(":=")[1] for word in words if word.startswith(("rgb", "depth"))):
        graph.wait(lambda topic=topic: graph.node.get_subscriptions_info_by_topic(topic), f"a subscription to {topic}")
