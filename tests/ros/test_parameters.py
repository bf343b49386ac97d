# SPDX-License-Identifier: Apache-2.0
"""Every parameter that the nodes declare: what it says of itself, what it refuses and why, and when.

Both nodes run in this process.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from lifecycle_msgs.srv import GetState
from live_node import CAMERA, Live
from rcl_interfaces.msg import ParameterDescriptor
from rclpy.parameter import Parameter
from sensor_msgs.msg import CameraInfo, Image
from std_srvs.srv import Trigger

from adatoken3d_ros.ros.scene_services import inside
from adatoken3d_ros.settings import BY_NAME
from adatoken3d_ros.text import quoted

BESIDE = [0.1, 0.0, 0.0, 0.0, 0.0, 0.0]


# --- what every parameter says of itself, and what it refuses ---------------------------------------------------------


def test_the_node_declares_every_setting_and_nothing_else(live: Live) -> None:
    for node, names in ((live.node, BY_NAME.keys()), (live.camera, CAMERA.keys())):
        declared = {name for name in node.list_parameters([], 0).names if not name.startswith("qos_overrides.")}
        assert declared - {"use_sim_time", "start_type_description_service"} == names


def described(descriptor: ParameterDescriptor, value: Any) -> None:
    assert len(descriptor.description) > 10, descriptor.name
    if isinstance(value, int) and not isinstance(value, bool):
        assert len(descriptor.integer_range) == 1, descriptor.name
    if isinstance(value, float):
        assert len(descriptor.floating_point_range) == 1, descriptor.name


def test_every_parameter_is_described_with_its_range(live: Live) -> None:
    for node, names in ((live.node, BY_NAME.keys()), (live.camera, CAMERA.keys())):
        for name in names:
            described(node.describe_parameter(name), node.get_parameter(name).value)


@pytest.mark.parametrize("name", BY_NAME)
def test_what_cannot_be_used_is_refused_with_the_reason(live: Live, name: str) -> None:
    setting, bad = BY_NAME[name], []
    if setting.low is not None and setting.high is not None:
        kind = type(setting.default)
        bad = [kind(setting.low - 1), kind(setting.high + max(1, abs(setting.high) / 2))]
        bad += [math.nan, math.inf] if kind is float else []
    elif setting.choices:
        bad = ["nonsense", ""]
    elif isinstance(setting.default, tuple):
        bad = [[1.0], [math.nan] * len(setting.default)]
    elif setting.check is not None:
        files = ("scene.file", "scene.directory")
        bad = ["  "] if name not in files else ["relative/path", "https://example.org/scene"]
    bad.append({bool: "text", str: 3, int: "text", float: "text", tuple: "text"}[type(setting.default)])  # another type
    for value in bad:
        result = live.set(name, value)
        assert not result.successful and len(result.reason) > 10, value
        assert any(text in result.reason for text in (name, "read-only", "Wrong parameter type"))
        assert live.node.get_parameter(name).value == live.started[name]


def test_scene_files_lie_in_one_directory(live: Live, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("/etc")
    (tmp_path / "file").symlink_to("/etc/hosts")  # the home may lie in the directory, too
    above = f"{tempfile.gettempdir()}/../etc/scene"
    for path in ("/etc/passwd", str(tmp_path / "out" / "scene"), str(tmp_path / "file"), above, tempfile.gettempdir()):
        result = live.set("scene.file", path)
        assert (
            not result.successful and "must lie in scene.directory" in result.reason and quoted(path) in result.reason
        )
    live.put({"scene.file": str(tmp_path / "later")})
    (tmp_path / "later").symlink_to(tmp_path / "out" / "scene")  # set first, then made to lead elsewhere
    assert live.configure()
    for service in ("save_scene", "load_scene"):
        response = live.call(Trigger, service)
        assert not response.success and "must lie in scene.directory" in response.message
    result = live.set("scene.directory", "/")
    assert not result.successful and "read-only" in result.reason


def test_where_scene_files_lie_unless_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ROS_HOME", str(tmp_path))
    assert inside("", str(tmp_path / "adatoken3d" / "room")) == tmp_path / "adatoken3d" / "room"
    monkeypatch.delenv("ROS_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert inside("", str(tmp_path / ".ros" / "adatoken3d" / "room")).name == "room"
    with pytest.raises(ValueError, match="must lie in scene.directory"):
        inside("", str(tmp_path / ".ros" / "room"))


def test_what_is_read_at_the_start_is_refused_later(live: Live) -> None:
    for name in ("autostart", "start_type_description_service"):
        result = live.set(name, not live.node.get_parameter(name).value)
        assert not result.successful and "read-only" in result.reason


def test_the_frame_of_the_scene(live: Live) -> None:
    def frame() -> str:
        live.node.inputs.start()
        try:
            assert live.node.inputs.poses is not None
            return live.node.inputs.poses.scene_frame
        finally:
            live.node.inputs.stop()

    assert frame() == "map"
    live.put({"scene.frame_id": "world"})
    assert frame() == "world"


def test_poses_that_cannot_be_had_are_told_before_the_model_is_loaded(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(live.node.engine, "start", never)
    live.put({"pose.source": "tf", "input.source": "points", "pose.base_to_camera": BESIDE})
    assert not live.configure()
    assert "pose.base_to_camera" in live.node.engine.problem and live.node.engine.queue is None


def test_simulated_time(live: Live) -> None:
    clock = live.node.get_clock()
    assert not clock.ros_time_is_active
    assert live.set("use_sim_time", True).successful and clock.ros_time_is_active
    assert live.set("use_sim_time", False).successful and not clock.ros_time_is_active
    assert not live.set("use_sim_time", "text").successful
    assert live.call(GetState, "get_state").current_state.label == "unconfigured"


# --- demo_camera ------------------------------------------------------------------------------------------------------


def test_the_camera_does_what_it_was_given_and_refuses_changes(live: Live) -> None:
    camera, seen = live.camera, {}
    for name in ("rgb", "depth", "rgb_info"):
        getattr(camera, f"_{name}").publish = lambda message, name=name: seen.setdefault(name, message)
    poses: list[Any] = []
    camera._pose.publish = poses.append  # type: ignore[method-assign]
    camera._publish()
    rgb: Image = seen["rgb"]
    info: CameraInfo = seen["rgb_info"]
    assert (rgb.width, rgb.height, rgb.header.frame_id) == (64, 48, "eye")
    assert seen["depth"].encoding == "32FC1" and poses[0].header.frame_id == "world"
    assert info.k[0] == pytest.approx(32.0), "half the width over the tangent of 45 degrees"
    assert camera._timer.timer_period_ns == 50_000_000
    assert camera._rgb.qos_profile.reliability.name == "BEST_EFFORT"
    assert camera._room.seed == 3
    for name, value in CAMERA.items():
        for other in (value, "text"):
            result = camera.set_parameters([Parameter(name, value=other)])[0]
            assert not result.successful and "read-only" in result.reason
