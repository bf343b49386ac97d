# SPDX-License-Identifier: Apache-2.0
"""What a launch's arguments mean for the node: topics, parameters, names. Needs neither ROS nor launch."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from adatoken3d_ros.ros.wiring import (
    ARGUMENTS,
    CAMERAS,
    PARAMETERS,
    TOPICS,
    Wiring,
    compressed_view,
    info_topic,
    read_parameters,
    wire,
)
from adatoken3d_ros.settings import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
# By the drivers' sources: realsense-ros 4.55, zed-ros2-wrapper 5.4, depthai-ros 2.9, OrbbecSDK_ROS2 2.6,
# Azure_Kinect_ROS_Driver's branch for Humble, ros_gz 1.0. The last is the setting that brings depth in colour's view.
DRIVERS = {
    "realsense": (
        "/camera/camera/color/image_raw",
        "/camera/camera/color/camera_info",
        "/camera/camera/aligned_depth_to_color/image_raw",
        "/camera/camera/aligned_depth_to_color/camera_info",
        "ros2 launch realsense2_camera rs_launch.py align_depth.enable:=true",
    ),
    "zed": (
        "/zed/zed_node/rgb/color/rect/image",
        "/zed/zed_node/rgb/color/rect/camera_info",
        "/zed/zed_node/depth/depth_registered",
        "/zed/zed_node/depth/camera_info",
        "ros2 launch zed_wrapper zed_camera.launch.py camera_model:=",
    ),
    "oakd": (
        "/oak/rgb/image_rect",
        "/oak/rgb/camera_info",
        "/oak/stereo/image_raw",
        "/oak/stereo/camera_info",
        "ros2 launch depthai_ros_driver camera.launch.py",
    ),
    "orbbec": (
        "/camera/color/image_raw",
        "/camera/color/camera_info",
        "/camera/depth/image_raw",
        "/camera/depth/camera_info",
        "depth_registration:=true",
    ),
    "azure": (
        "/rgb/image_raw",
        "/rgb/camera_info",
        "/depth_to_rgb/image_raw",
        "/depth_to_rgb/camera_info",
        "ros2 launch azure_kinect_ros_driver driver.launch.py",
    ),
    "gazebo": (
        "/rgbd_camera/image",
        "/rgbd_camera/camera_info",
        "/rgbd_camera/depth_image",
        "/rgbd_camera/camera_info",
        "ros2 launch ros_gz_sim_demos rgbd_camera_bridge.launch.py",
    ),
}


def wired(**given: str) -> Wiring:
    return wire(given, CONFIG)


@pytest.mark.parametrize(
    ("image", "info"),
    [
        ("rgb/image", "rgb/camera_info"),
        ("image", "camera_info"),
        ("/image_raw", "/camera_info"),
        ("/camera/camera/color/image_raw", "/camera/camera/color/camera_info"),
        ("/camera/color/image_rect", "/camera/color/camera_info"),
        ("/camera/color/image_rect_color", "/camera/color/camera_info"),
        ("/camera/color/image_raw/compressed", "/camera/color/camera_info"),
        ("/camera/depth/image_rect_raw/compressedDepth", "/camera/depth/camera_info"),
        ("/compressed", "/camera_info"),
    ],
)
def test_camera_info_is_beside_its_image(image: str, info: str) -> None:
    assert info_topic(image) == info


@pytest.mark.parametrize("camera", CAMERAS)
def test_a_camera_brings_its_driver_s_topics(camera: str) -> None:
    *topics, command = DRIVERS[camera]
    found = dict(wired(camera=camera).remappings)
    assert [found[TOPICS[name]] for name in list(TOPICS)[:4]] == [topics[0], topics[1], topics[2], topics[3]]
    file = CONFIG / "cameras" / f"{camera}.yaml"
    assert command in file.read_text(), "how the driver brings aligned depth"
    names = {argument.name for argument in ARGUMENTS}
    assert set(read_parameters(file, "launch")) <= names
    assert wired(camera=camera).sim_time == (camera == "gazebo")
    assert [path.name for path in wired(camera=camera).files] == ["adatoken3d.yaml", f"{camera}.yaml"]


def test_every_camera_has_a_file_and_a_choice() -> None:
    assert sorted(path.stem for path in (CONFIG / "cameras").iterdir()) == sorted(CAMERAS) == sorted(DRIVERS)


def test_topics_alone_bring_their_camera_info() -> None:
    wiring = wired(rgb_topic="/cam/color/image_raw", depth_topic="/cam/aligned/image_raw")
    assert dict(wiring.remappings) == {
        "rgb/image": "/cam/color/image_raw",
        "rgb/camera_info": "/cam/color/camera_info",
        "depth/image": "/cam/aligned/image_raw",
        "depth/camera_info": "/cam/aligned/camera_info",
    }
    given = wired(rgb_topic="/cam/color/image_raw", rgb_info_topic="/elsewhere")
    assert dict(given.remappings)["rgb/camera_info"] == "/elsewhere"
    assert wired().remappings == ()


def test_what_is_given_goes_before_the_camera_and_the_files(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("/**:\n  ros__parameters:\n    scene: {max_depth: 2.5, frame_id: odom}\n")
    wiring = wired(camera="realsense", rgb_topic="/mine/image", params_file=str(own), model="/models/a")
    assert dict(wiring.remappings)["rgb/image"] == "/mine/image"
    assert dict(wiring.remappings)["rgb/camera_info"] == "/mine/camera_info"
    assert dict(wiring.remappings)["depth/image"] == DRIVERS["realsense"][2]
    assert wiring.files[-1] == own and wiring.scene_frame == "odom"
    assert wiring.parameters == {"model.path": "/models/a", "use_sim_time": False, "autostart": True}
    assert wired(autostart="false").parameters["autostart"] is False
    assert wired(scene_frame="world", params_file=str(own)).scene_frame == "world"
    assert wired().scene_frame == "map"
    # The launch file's own arguments do not come from a camera's file alone.
    assert wired(camera="gazebo", use_sim_time="false").sim_time is False
    assert wired(bag="/data/bag").sim_time is True


def test_arguments_become_parameters_of_the_right_type() -> None:
    wiring = wired(
        base_to_camera="0.1 0 0.3 -1.5708 0 -1.5708",
        reliability="best_effort",
        rectified="true",
        pose_source="odometry",
        scene_frame="odom",
    )
    assert wiring.parameters["pose.base_to_camera"] == [0.1, 0.0, 0.3, -1.5708, 0.0, -1.5708]
    assert wiring.parameters["qos.reliability"] == "best_effort" and wiring.parameters["input.rectified"] is True
    assert wiring.parameters["pose.source"] == "odometry" and wiring.parameters["scene.frame_id"] == "odom"
    assert wired(base_to_camera="[1,2,3,0,0,0,1]").parameters["pose.base_to_camera"] == [1.0, 2, 3, 0, 0, 0, 1]


def test_compressed_images_follow_from_the_names_or_the_transport() -> None:
    by_transport = wired(camera="realsense", transport="compressed")
    by_name = wired(
        rgb_topic="/camera/camera/color/image_raw/compressed",
        depth_topic="/camera/camera/aligned_depth_to_color/image_raw/compressedDepth",
    )
    assert by_transport.remappings == by_name.remappings
    for wiring in (by_transport, by_name):
        assert wiring.compressed and wiring.parameters["input.transport"] == "compressed"
        assert dict(wiring.remappings)["rgb/camera_info"] == "/camera/camera/color/camera_info"
        # RViz asks image_transport for the base name's compressed form.
        assert dict(wiring.view_remappings) == {
            "rgb/image": "/camera/camera/color/image_raw",
            "rgb/image/compressed": "/camera/camera/color/image_raw/compressed",
        }
    view = compressed_view((CONFIG / "adatoken3d.rviz").read_text())
    shown = {d["Name"]: d for d in yaml.safe_load(view)["Visualization Manager"]["Displays"]}
    assert shown["Camera"]["Topic"]["Value"] == "rgb/image/compressed"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"params_file": "/nope.yaml"}, "/nope.yaml is not there"),
        ({"base_to_camera": "1 2 3"}, "base_to_camera is x y z roll"),
        ({"base_to_camera": "1 2 3 0 0 north"}, "base_to_camera: .*north"),
        ({"rgb_topic": "/c/image/compressed", "depth_topic": "/d/image"}, "both raw or both compressed|both images"),
        ({"rgb_topic": "/c/image/compressed", "transport": "raw"}, "transport is raw, but rgb_topic is /c/image/comp"),
        ({"rgb": "/c"}, "no launch argument rgb"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, str], text: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        wired(**given)


@pytest.mark.parametrize("content", ["[1, 2]", "/**: 3", "a: {b: 1}", "{", "/**:\n  ros__parameters: 3"])
def test_a_file_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"bad\.yaml is no parameter file"):
        wired(params_file=str(file))


@pytest.mark.parametrize(
    ("namespace", "pushed", "logger"),
    [
        ("", "", "adatoken3d"),
        ("robot1", "", "robot1.adatoken3d"),
        ("/fleet/robot1", "", "fleet.robot1.adatoken3d"),
        ("robot1", "/fleet", "fleet.robot1.adatoken3d"),
        ("/robot1", "/fleet", "robot1.adatoken3d"),
    ],
)
def test_the_logger_of_a_namespaced_node(namespace: str, pushed: str, logger: str) -> None:
    assert wire({"namespace": namespace}, CONFIG, pushed).logger == logger


def test_tf_of_a_namespaced_robot() -> None:
    assert wired(namespace="robot1").remappings == ()
    assert wired(namespace="robot1", namespaced_tf="true").remappings == (("/tf", "tf"), ("/tf_static", "tf_static"))


def test_arguments_say_what_the_parameters_say() -> None:
    given = {argument.name: argument for argument in ARGUMENTS}
    assert given["pose_source"].choices == ("", *BY_NAME["pose.source"].choices)
    assert given["rectified"].choices == ("", "true", "false") and given["base_to_camera"].choices == ()
    for name, parameter in PARAMETERS.items():
        assert parameter in given[name].description and BY_NAME[parameter].description in given[name].description


# --- the README -------------------------------------------------------------------------------------------------------

README = (ROOT / "docs" / "robot.md").read_text(encoding="utf-8")  # what the README says at more length


def launches(text: str = README) -> list[dict[str, str]]:
    """The arguments of each launch of the node, to the letter."""
    lines = re.findall(r"ros2 launch adatoken3d adatoken3d\.launch\.py ([^`\n]*)", text)
    return [dict(word.split(":=", 1) for word in shlex.split(line, comments=True)) for line in lines]


def test_every_launch_in_the_readme_can_be_wired() -> None:
    assert launches()
    for given in launches():
        wire(given, CONFIG)
    (robot,) = [given for given in launches() if "model" in given]
    found = dict(wire(robot, CONFIG).remappings)
    assert [found[TOPICS[name]] for name in list(TOPICS)[:4]] == list(DRIVERS["realsense"][:4])


def test_every_argument_and_camera_in_the_readme_exists() -> None:
    part = README[: README.index("## Without a ROS installation")]
    used = set(re.findall(r"`?\b([a-z_]+):=", part)) - {"enable"}
    assert used and used <= {argument.name for argument in ARGUMENTS}
    assert re.findall(r"`camera:=([a-z|]+)`", README) == ["|".join(CAMERAS)]


def test_the_cameras_of_the_front_page_are_those_that_there_are() -> None:
    """Each with the driver's command that its file has, and its file."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| [^|]+ \| `(ros2 [^`]+)` \| \[`camera:=(\w+)`\]", page, re.MULTILINE))
    assert sorted(rows.values()) == sorted(CAMERAS)
    for command, camera in rows.items():
        assert command in (CONFIG / "cameras" / f"{camera}.yaml").read_text(encoding="utf-8")
    clouds = wired(params_file=str(CONFIG / "lidar_camera.yaml"), rgb_topic="/image_raw", points_topic="/ouster/points")
    found = dict(clouds.remappings)
    assert (found["rgb/camera_info"], found["points"]) == ("/camera_info", "/ouster/points")
    assert "rgb_topic:=/image_raw points_topic:=/ouster/points" in page
