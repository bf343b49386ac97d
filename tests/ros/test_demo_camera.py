# SPDX-License-Identifier: Apache-2.0
"""The demo camera: what it publishes is one consistent RGB-D frame with its pose, read back by the node's own code."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from rcl_interfaces.srv import DescribeParameters, ListParameters, SetParameters
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.cli.processes import Processes
from adatoken3d_ros.lab.synthetic.furnished import SEEDS_PER_SPLIT, make_room
from adatoken3d_ros.lab.synthetic.questions import FAMILIES
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.ros.demo_camera import encode_depth
from adatoken3d_ros.ros.inputs.conversions import (
    camera_info_to_camera,
    depth_to_metres,
    image_to_rgb,
    pose_to_matrix,
    transform_to_matrix,
)
from adatoken3d_ros.ros.outputs.fill import fill_camera_info, fill_image
from adatoken3d_ros.ros.suggestions import LATCHED, Suggestion, from_message, to_message
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import backproject

MODULE = "adatoken3d_ros.ros.demo_camera"
TOPICS: dict[str, Any] = {
    "rgb/image": Image,
    "depth/image": Image,
    "rgb/camera_info": CameraInfo,
    "depth/camera_info": CameraInfo,
    "pose": PoseStamped,
    "tf": TFMessage,
    "odom": Odometry,
}


def test_depth_by_hand() -> None:
    depth = np.array([[1.0, 0.0004, np.nan], [65.535, 65.5356, 2.0006]], dtype=np.float32)
    assert encode_depth(depth, "16UC1").tolist() == [[1000, 0, 0], [65535, 0, 2001]]
    assert encode_depth(depth, "32FC1") is depth


@pytest.mark.parametrize("encoding", ["16UC1", "32FC1"])
def test_depth_is_read_back(encoding: str) -> None:
    depth = np.array([[1.5, np.nan]], dtype=np.float32)
    np.testing.assert_array_equal(depth_to_metres(fill_image(Image(), encode_depth(depth, encoding), encoding)), depth)


def test_camera_info_is_read_back() -> None:
    K = np.array([[50.0, 0, 31.5], [0, 55.0, 23.5], [0, 0, 1]])
    message = fill_camera_info(CameraInfo(), K, 64, 48)
    np.testing.assert_array_equal(camera_info_to_camera(message).K, K)
    np.testing.assert_array_equal(np.array(message.p).reshape(3, 4)[:, :3], K)


@pytest.fixture(scope="module")
def camera(shared_graph: Any) -> Iterator[Any]:
    seed = f"seed:={SEEDS_PER_SPLIT + 2}"  # seeds of rooms begin again there
    parameters = ["-p", "width:=160", "-p", "height:=120", "-p", "rate:=20.0", "-p", seed]
    yield shared_graph.start(MODULE, "--ros-args", *parameters)


@pytest.fixture(scope="module")
def frames(camera: Any, shared_graph: Any) -> list[dict[str, Any]]:
    """Three complete frames by topic, matched by stamp."""
    received = {topic: shared_graph.collect(kind, f"/{topic}", 10) for topic, kind in TOPICS.items()}

    def complete() -> list[dict[str, Any]]:
        stamped = [
            {(stamp.sec, stamp.nanosec): message for message in messages for stamp in [header_of(message).stamp]}
            for messages in received.values()
        ]
        common = sorted(set.intersection(*map(set, stamped)))
        return [dict(zip(TOPICS, (by[stamp] for by in stamped), strict=True)) for stamp in common]

    shared_graph.wait(lambda: len(complete()) >= 3, "three frames with equal stamps")
    return complete()[:3]


def header_of(message: Any) -> Any:
    return (message.transforms[0] if isinstance(message, TFMessage) else message).header


def test_frames_and_names(frames: list[dict[str, Any]]) -> None:
    for frame in frames:
        for topic in ("rgb/image", "depth/image", "rgb/camera_info", "depth/camera_info"):
            assert frame[topic].header.frame_id == "camera_optical_frame"
            assert (frame[topic].width, frame[topic].height) == (160, 120)
        assert frame["pose"].header.frame_id == frame["odom"].header.frame_id == "map"
        assert frame["odom"].child_frame_id == "camera_optical_frame"
        assert frame["odom"].pose.pose == frame["pose"].pose
        (transform,) = frame["tf"].transforms
        assert (transform.header.frame_id, transform.child_frame_id) == ("map", "camera_optical_frame")
        assert (transform_to_matrix(transform.transform) == pose_to_matrix(frame["pose"].pose)).all()
        assert (frame["rgb/image"].encoding, frame["depth/image"].encoding) == ("rgb8", "16UC1")


def test_camera_moves(frames: list[dict[str, Any]]) -> None:
    positions = [pose_to_matrix(frame["pose"].pose)[:3, 3] for frame in frames]
    assert not np.array_equal(positions[0], positions[1])


def test_picture_depth_and_pose_agree_with_the_room(frames: list[dict[str, Any]]) -> None:
    """Rendered again at the pose that was received, the picture is the one that was received; so is the geometry."""
    room = make_room(2, "test")
    for frame in frames:
        K = camera_info_to_camera(frame["rgb/camera_info"]).K
        T = pose_to_matrix(frame["pose"].pose)
        posed = PosedFrame(image_to_rgb(frame["rgb/image"]), depth_to_metres(frame["depth/image"]), K, T, 1)
        rgb, depth, _ = Renderer(room).render(K, 160, 120, T)
        assert np.mean(rgb == posed.rgb) > 0.999
        np.testing.assert_allclose(posed.depth, depth, atol=0.0006)
        rows, columns = np.nonzero(np.isfinite(posed.depth))
        points = backproject(posed.depth[rows, columns], columns, rows, K, T)
        assert points[:, 2].min() > -0.01 and np.abs(points[:, :2]).max() < max(room.size[:2]) / 2 + 0.01


def test_questions_about_what_was_shown(frames: list[dict[str, Any]], shared_graph: Any) -> None:
    """Published only while somebody takes the images; a latecomer gets the newest list."""
    lists = shared_graph.collect(String, "/demo_camera/questions", LATCHED)
    shared_graph.wait(lambda: lists and len(from_message(lists[-1])) > 2, "questions")
    suggestions = from_message(lists[-1])
    kinds = {item.kind for item in make_room(2, "test").items}
    for suggestion in suggestions:
        assert suggestion.family in FAMILIES and suggestion.question and suggestion.answer
        if suggestion.family == "class":
            assert suggestion.answer in kinds


def test_a_text_that_is_no_list_of_questions_is_named() -> None:
    assert from_message(to_message([])) == []
    one = Suggestion("on", "What is on the desk?", "mug")
    assert from_message(to_message([one, one])) == [one, one]
    for text in ("[1]", '[{"question": "Why?"}]', "nothing"):
        with pytest.raises(ValueError, match=re.escape(text) if text != "nothing" else "Expecting value"):
            from_message(String(data=text))


def test_parameters_are_described_ranged_and_fixed(camera: Any, shared_graph: Any) -> None:
    names = shared_graph.call(ListParameters, "/demo_camera/list_parameters").result.names
    own = [name for name in names if name not in ("use_sim_time", "start_type_description_service")]
    described = shared_graph.call(
        DescribeParameters, "/demo_camera/describe_parameters", DescribeParameters.Request(names=own)
    ).descriptors
    for descriptor in described:
        assert descriptor.description.endswith("."), descriptor.name
        assert descriptor.read_only
        text = descriptor.name in ("world_frame", "camera_frame")
        assert (
            text or "One of: " in descriptor.description or descriptor.integer_range or descriptor.floating_point_range
        )
    change = SetParameters.Request(parameters=[Parameter("rate", value=5.0).to_parameter_msg()])
    assert not shared_graph.call(SetParameters, "/demo_camera/set_parameters", change).results[0].successful


def test_float_depth_best_effort(graph: Any) -> None:
    graph.start(
        MODULE, "--ros-args", "-p", "depth_encoding:=32FC1", "-p", "reliability:=best_effort", "-p", "width:=64"
    )
    depth = graph.collect(Image, "/depth/image", qos_profile_sensor_data)
    graph.wait(lambda: depth, "depth")
    assert depth[0].encoding == "32FC1"
    info = graph.node.get_publishers_info_by_topic("/depth/image")[0]
    assert info.qos_profile.reliability.name == "BEST_EFFORT"
    assert 0.3 < np.nanmedian(depth_to_metres(depth[0])) < 8


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(graph: Any, number: signal.Signals) -> None:
    process = graph.start(MODULE)
    images = graph.collect(Image, "/rgb/image", 10)
    graph.wait(lambda: images, "an image")
    status, seconds = process.stop(number, number)
    assert (status, "Traceback" in process.log) == (0, False)
    assert seconds < 2.0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("depth_encoding:=8UC1", "8UC1"),
        ("rate:=0.0", "rate"),
        ("rate:=5", "decimal point"),
        ("width:=5", "width"),
        ("reliability:=maybe", "maybe"),
    ],
)
def test_bad_parameter_is_one_line(tmp_path: Path, argument: str, message: str) -> None:
    with Processes() as processes:
        process = processes.start("camera", [sys.executable, "-m", MODULE, "--ros-args", "-p", argument])
        assert process.wait(timeout=60) == 2
        lines = processes.log("camera").read_text().splitlines()
    assert len(lines) == 1 and lines[0].startswith("demo_camera: ") and message in lines[0]
