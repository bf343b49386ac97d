# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a ROS graph on a domain of its own, the tiny checkpoint, and nodes in this process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from ros_graph import Graph, claim_domain

if TYPE_CHECKING:
    from live_node import Live


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    """A graph for one test."""
    made = Graph(tmp_path)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared_graph(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    """A graph for the tests of one file that leave the node as they found it."""
    made = Graph(tmp_path_factory.mktemp("graph"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny random checkpoint, whose answers never end by themselves: tests cancel them in the middle."""
    from safetensors.torch import load_file, save_file

    from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint

    path = Path(write_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][2] = 0.0  # the end of the answer
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="module")
def ros(tiny_model: Path) -> Iterator[Live]:
    import rclpy
    from live_node import CAMERA, OVERRIDE, Live
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.node import Node

    from adatoken3d_ros.ros.demo_camera import DemoCamera
    from adatoken3d_ros.ros.node import SceneNode
    from adatoken3d_ros.settings import BY_NAME

    domain, lock = claim_domain()
    before = os.environ.get("ROS_AUTOMATIC_DISCOVERY_RANGE")
    os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = "LOCALHOST"
    arguments = ["--ros-args"]
    for name, value in CAMERA.items():
        arguments += ["-p", f"demo_camera:{name}:={value}"]
    # One participant has one type for each topic: the camera's are elsewhere.
    for topic in ("rgb/image", "depth/image", "rgb/camera_info", "depth/camera_info", "pose", "odom"):
        arguments += ["-r", f"demo_camera:{topic}:=demo/{topic}"]
    arguments += ["-p", f"adatoken3d:{OVERRIDE}depth:=3", "-p", f"adatoken3d:scene.directory:={tempfile.gettempdir()}"]
    rclpy.init(args=arguments, domain_id=domain)
    executor = SingleThreadedExecutor()
    node, camera, tester = SceneNode(), DemoCamera(), Node("tester", use_global_arguments=False)
    for one in (node, tester):
        executor.add_node(one)
    live = Live(node, tester, executor, tiny_model, camera=camera)
    live.put({"model.path": str(tiny_model), "pose.source": "pose_topic", "budget.warm_up": False})
    live.started = {name: node.get_parameter(name).value for name in BY_NAME}
    yield live
    node.close()
    camera.destroy_node()
    tester.destroy_node()
    executor.shutdown()
    rclpy.try_shutdown()
    lock.close()
    if before is None:
        del os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"]
    else:
        os.environ["ROS_AUTOMATIC_DISCOVERY_RANGE"] = before


@pytest.fixture
def live(ros: Live) -> Iterator[Live]:
    """The nodes with the parameters that they started with, the scene node unconfigured."""
    from adatoken3d_ros.settings import BY_NAME, START

    assert ros.node.lifecycle_state == "unconfigured"
    yield ros
    if ros.node.lifecycle_state == "active":
        ros.node.trigger_deactivate()
    if ros.node.lifecycle_state == "inactive":
        ros.node.trigger_cleanup()
    ros.put({name: value for name, value in ros.started.items() if BY_NAME[name].read != START})
