# SPDX-License-Identifier: Apache-2.0
"""A whole robot: a bag with odometry of the base, a tree of transforms that comes late, a RealSense's names.

Read without ROS and played to the node from another process, each token is where the room's surfaces are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from sensor_msgs.msg import PointCloud2

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.ros.bag import read_bag
from benchmarks._ros_robot import REMAPS
from benchmarks.robot import SOURCES, distances
from examples.robot import robot_bag

ROOT = Path(__file__).resolve().parents[2]
ROOM = make_room(0, "test")
QUESTION = AskScene.Request(question="Is there a chair?", max_new_tokens=4)


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return robot_bag.write(tmp_path_factory.mktemp("robot") / "bag", ROOM, seconds=1.5, rate=10.0)


@pytest.mark.parametrize("source", ["auto", *SOURCES])
def test_every_pose_of_the_bag_is_the_cameras(bag: Path, source: str) -> None:
    found = list(read_bag(bag, pose_source=source))
    T_map_scene = robot_bag.T_MAP_ODOM if source == "odometry" else np.eye(4)
    assert len(found) == 16
    for frame in found:
        truth = robot_bag.camera_pose(ROOM, frame.stamp_ns)
        np.testing.assert_allclose(T_map_scene @ frame.T_world_camera, truth, atol=1e-9)


def scene_of(graph: Any, node: str) -> np.ndarray:
    """(M, 3) the tokens of the scene, once there are some."""
    clouds = graph.collect(PointCloud2, f"{node}/scene_tokens")
    graph.wait(lambda: clouds and clouds[-1].width, "tokens of the scene")
    columns = clouds[-1].point_step // 4
    return np.frombuffer(clouds[-1].data, np.float32).reshape(-1, columns)[:, :3].copy()


@pytest.mark.parametrize("source", ["odometry", "tf"])
def test_every_token_of_the_node_is_where_it_must_be(graph: Any, tiny_model: Path, bag: Path, source: str) -> None:
    """With TF on a robot in a namespace, whose /tf is remapped for both."""
    space = ["-r", "__ns:=/robot", "-r", "/tf:=tf", "-r", "/tf_static:=tf_static"] if source == "tf" else []
    node = "/robot/adatoken3d" if source == "tf" else "/adatoken3d"
    # Best-effort images of this size get lost in the default transport's half megabyte, the more the busier it is.
    for name in ("FASTDDS_DEFAULT_PROFILES_FILE", "FASTRTPS_DEFAULT_PROFILES_FILE"):
        graph.environment[name] = str(ROOT / "config" / "fastdds_shm.xml")
    graph.start(
        "adatoken3d_ros.ros.node", "--ros-args", *space,
        *(word for item in REMAPS.items() for word in ("-r", "{}:={}".format(*item))),
        *(word for item in {
            "model.path": tiny_model, "autostart": True, "use_sim_time": True, "pose.source": source,
            "scene.frame_id": "odom" if source == "odometry" else "map", "qos.reliability": "best_effort",
        }.items() for word in ("-p", "{}:={}".format(*item))),
    )  # fmt: skip
    player = graph.start("examples.robot.play", str(bag), "--rate", "0.5", "--ros-args", *space)
    xyz = scene_of(graph, node)
    graph.wait(lambda: "played" in player.log, "the end of the bag")
    found = distances(ROOM, xyz, source)
    assert found["tokens"] > 50 and found["tokens_off_m"] <= 0.05, found
    answer = graph.call(AskScene, f"{node}/ask", QUESTION).answer
    assert answer.status in (Answer.OK, Answer.TRUNCATED), answer.status_message
    assert answer.header.frame_id == ("odom" if source == "odometry" else "map")


def test_without_the_way_to_the_camera_tokens_would_be_elsewhere(bag: Path) -> None:
    """What the check is worth: the same frames posed with the base's pose are not where the room is."""
    from adatoken3d_ros.scene.geometry import backproject

    frame = next(iter(read_bag(bag)))
    rows, columns = np.nonzero(np.isfinite(frame.depth[::16, ::16]))
    depth = frame.depth[::16, ::16][rows, columns]
    for T, limit in ((frame.T_world_camera, None), (frame.T_world_camera @ np.linalg.inv(robot_bag.T_BASE_OPTICAL), 1)):
        points = backproject(depth, 16 * columns, 16 * rows, frame.K, T)
        off = distances(ROOM, points.astype(np.float32), "tf")["tokens_off_m"]
        assert off < 0.005 if limit is None else off > 0.3


def test_through_upstream_launch(graph: Any, tiny_model: Path, bag: Path) -> None:
    pytest.importorskip("launch_ros", reason="launch is not on PyPI")
    pytest.importorskip("ros2launch", reason="ros2cli is not on PyPI")
    launched = graph._run(
        "-c", "import sys; from ros2cli.cli import main; sys.exit(main())", "launch", "examples/robot/robot.launch.py",
        f"bag:={bag}", f"model:={tiny_model}", "pose_source:=odometry", "scene_frame:=odom",
    )  # fmt: skip
    found = distances(ROOM, scene_of(graph, "/adatoken3d"), "odometry")
    assert found["tokens_off_m"] <= 0.05, found
    assert graph.call(AskScene, "/adatoken3d/ask", QUESTION).answer.status in (Answer.OK, Answer.TRUNCATED)
    assert launched.stop()[0] == 0
