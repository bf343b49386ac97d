# SPDX-License-Identifier: Apache-2.0
"""Bags of both formats with each source of poses, and bags that give no frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ros_bags import K, T, frames, header, image, pose, pose_messages, transform, write
from ros_messages import MS, at, cloud_message
from rosbags.rosbag2 import StoragePlugin

from adatoken3d_ros.ros.bag import BagError, Topics, read_bag


@pytest.mark.parametrize("plugin", list(StoragePlugin))
@pytest.mark.parametrize("source", ["pose_topic", "odometry", "tf"])
def test_every_frame_of_a_bag(tmp_path: Path, plugin: StoragePlugin, source: str) -> None:
    found = list(read_bag(write(tmp_path / "bag", frames(source), plugin)))
    assert [frame.stamp_ns for frame in found] == [100 * MS, 200 * MS, 300 * MS]
    assert [frame.T_world_camera[0, 3] for frame in found] == [0.0, 1.0, 2.0]
    assert [int(frame.rgb[0, 0, 0]) for frame in found] == [0, 1, 2]
    np.testing.assert_array_equal(found[2].depth, np.full((6, 8), 1.002, np.float32))
    assert found[0].K.reshape(-1).tolist() == K.tolist()


def test_a_single_file_reads_the_same(tmp_path: Path) -> None:
    folder = write(tmp_path / "bag", frames())
    (file,) = folder.glob("*.mcap")
    assert len(list(read_bag(file))) == 3


def test_static_transforms_count_at_any_time(tmp_path: Path) -> None:
    messages = frames("tf")
    for i, (topic, _, stamp) in enumerate(messages):
        if topic == "/tf":
            messages[i] = (topic, transform(stamp, "map", "base", stamp / 1e9), stamp)
    messages.append(("/tf_static", transform(0, "base", "camera", 10.0), 400 * MS))
    found = list(read_bag(write(tmp_path / "bag", messages)))
    np.testing.assert_allclose([frame.T_world_camera[0, 3] for frame in found], [10.1, 10.2, 10.3])


def base_odometry(*more: tuple[str, Any, int]) -> list[tuple[str, Any, int]]:
    """A robot's: /odom is the pose of base_link, the camera is 10 m in front of it, as far as `more` tells."""
    messages = [item for item in frames() if item[0] != "/pose"]
    for i in range(3):
        stamp = (i + 1) * 100 * MS
        messages += [(topic, m, stamp) for topic, m in pose_messages("odometry", stamp, float(i), "base_link")]
    return [*messages, *more]


MOUNT = [
    ("/tf_static", transform(0, "base_link", "camera_link", 9.0), 400 * MS),
    ("/tf_static", transform(0, "camera_link", "camera", 1.0), 400 * MS),
]


@pytest.mark.parametrize("source", ["auto", "odometry"])
def test_odometry_of_the_base_and_static_transforms(tmp_path: Path, source: str) -> None:
    found = list(read_bag(write(tmp_path / "bag", base_odometry(*MOUNT)), pose_source=source))
    assert [frame.T_world_camera[0, 3] for frame in found] == [10.0, 11.0, 12.0]


@pytest.mark.parametrize("source", ["auto", "odometry"])
def test_odometry_of_a_base_that_nothing_leads_to_is_refused(tmp_path: Path, source: str) -> None:
    path = write(tmp_path / "bag", base_odometry(MOUNT[1]))
    with pytest.raises(BagError, match=r"'base_link'.*'camera'.*--base-to-camera"):
        list(read_bag(path, pose_source=source))
    found = list(read_bag(path, pose_source=source, T_base_camera=at(0.5)))
    assert [frame.T_world_camera[0, 3] for frame in found] == [0.5, 1.5, 2.5]


def test_poses_that_are_not_sure_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    messages = base_odometry(*MOUNT)
    unsure = [message for topic, message, _ in messages if topic == "/odom"][1]
    unsure.pose.covariance[7], unsure.pose.pose.position.x = 0.5, 50.0
    path = write(tmp_path / "bag", messages)
    assert [frame.T_world_camera[0, 3] for frame in read_bag(path)] == [10.0, 60.0, 12.0]
    assert not caplog.text
    found = list(read_bag(path, max_covariance=0.1))
    np.testing.assert_allclose(
        [frame.T_world_camera[0, 3] for frame in found], [10.0, 11.0, 12.0]
    )  # between the others
    assert "1 poses were refused, the first: the pose at 0.2" in caplog.text and "variance of 0.5" in caplog.text


def test_odometry_without_a_child_frame_is_refused(tmp_path: Path) -> None:
    messages = [(topic, m, 1) for topic, m in pose_messages("odometry", 100 * MS, 0.0, "")]
    path = write(tmp_path / "bag", [*(item for item in frames() if item[0] != "/pose"), *messages])
    with pytest.raises(BagError, match="/odom at 0.100000 s.*child_frame_id is empty.*pose.base_to_camera"):
        list(read_bag(path))


def test_tf_is_preferred_where_it_leads_from_the_camera_to_the_scene(tmp_path: Path) -> None:
    """And where it does not, or the camera's place is given, odometry is; a pose topic may be a goal."""
    goal = ("/goal_pose", T["geometry_msgs/msg/PoseStamped"](header(1, "map"), pose(99.0)), 1)
    moving = [("/tf", transform(ms * MS, "odom", "base_link", ms / 100), 1) for ms in (100, 300)]
    late = [("/tf", transform(ms * MS, "map", "odom", 100.0), 1) for ms in (50, 350)]
    bags = {
        "whole": (base_odometry(*MOUNT, *moving, *late, goal), {}, [111.0, 112.0, 113.0]),
        "given": (base_odometry(*MOUNT, *moving, *late, goal), {"T_base_camera": at(0.5)}, [0.5, 1.5, 2.5]),
        "no map": (base_odometry(*MOUNT, *moving, goal), {}, [10.0, 11.0, 12.0]),
        "odom": (base_odometry(*MOUNT, *moving, goal), {"scene_frame": "odom"}, [11.0, 12.0, 13.0]),
    }
    for name, (messages, options, expected) in bags.items():
        found = list(read_bag(write(tmp_path / name, messages), **options))  # type: ignore[arg-type]
        np.testing.assert_allclose([frame.T_world_camera[0, 3] for frame in found], expected, err_msg=name)


def test_tf_that_does_not_lead_to_the_camera_names_both(tmp_path: Path) -> None:
    path = write(tmp_path / "bag", [*frames()[:3], ("/tf", transform(1, "map", "base", 1.0), 1)])
    with pytest.raises(BagError, match="'camera' to 'map'.*base, map"):
        list(read_bag(path))


def test_a_transform_that_is_none_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wheel = transform(100 * MS, "base_link", "wheel", 0.0)
    wheel.transforms[0].transform.rotation.w = float("nan")
    found = list(read_bag(write(tmp_path / "bag", base_odometry(*MOUNT, ("/tf", wheel, 1)))))
    assert [frame.T_world_camera[0, 3] for frame in found] == [10.0, 11.0, 12.0]


def test_extrinsics_are_applied(tmp_path: Path) -> None:
    (first, *_) = read_bag(write(tmp_path / "bag", frames()), T_base_camera=at(0.25))
    assert first.T_world_camera[0, 3] == 0.25


def cloud(stamp: int) -> Any:
    made = cloud_message(np.full((6, 8, 3), 200, np.uint8), np.full((6, 8), 2, np.float32), K.reshape(3, 3))
    field = T["sensor_msgs/msg/PointField"]
    fields = [field(f.name, f.offset, f.datatype, 1) for f in made.fields]
    data = np.frombuffer(made.data, np.uint8)
    return T["sensor_msgs/msg/PointCloud2"](
        header(stamp, "camera"), 6, 8, fields, False, made.point_step, made.row_step, data, False
    )


@pytest.mark.parametrize("source", ["organised_points", "points_with_camera", "points"])
def test_clouds_in_a_bag(tmp_path: Path, source: str) -> None:
    messages = [item for item in frames() if "depth" not in item[0]]
    messages += [("/lidar", cloud(stamp), stamp) for stamp in (100 * MS, 200 * MS)]
    path = write(tmp_path / "bag", messages)
    found = list(read_bag(path, source=source))
    assert [frame.stamp_ns for frame in found] == [100 * MS, 200 * MS]
    # Level virtual cameras do not see a cloud that is overhead: this world's z is the camera's axis.
    assert found[0].depth.shape == (336, 336) if source == "points" else np.nanmax(found[0].depth) == 2.0
    with pytest.raises(BagError, match="no point cloud"):
        list(read_bag(write(tmp_path / "none", frames()), source=source))


def test_an_ambiguous_bag_lists_its_topics(tmp_path: Path) -> None:
    stamp = 100 * MS
    other = ("/left/image_raw", image(stamp, np.zeros((6, 8, 3), np.uint8), "rgb8"), stamp)
    path = write(tmp_path / "bag", [*frames(), other])
    with pytest.raises(BagError, match=r"2 topics could be the colour image: /camera.*, /left.*sensor_msgs/msg/Image"):
        list(read_bag(path))
    assert len(list(read_bag(path, topics=Topics(rgb="/camera/color/image_raw")))) == 3
    with pytest.raises(BagError, match="'/right'"):
        list(read_bag(path, topics=Topics(rgb="/right")))


@pytest.mark.parametrize(
    ("missing", "named"),
    [("depth/image_raw", "no depth image"), ("color/image_raw", "no colour image"), ("camera_info", "CameraInfo")],
)
def test_a_missing_stream_is_named(tmp_path: Path, missing: str, named: str) -> None:
    path = write(tmp_path / "bag", [item for item in frames() if missing not in item[0]])
    with pytest.raises(BagError, match=named):
        list(read_bag(path))


def test_without_poses(tmp_path: Path) -> None:
    path = write(tmp_path / "bag", [item for item in frames() if item[0] != "/pose"])
    with pytest.raises(
        BagError, match="no poses for the source 'auto'.*pose_topic, pose_with_covariance, odometry, tf"
    ):
        list(read_bag(path))
    with pytest.raises(BagError, match="'map', only base, odom"):
        list(read_bag(write(tmp_path / "tf", [*frames()[:3], ("/tf", transform(1, "odom", "base", 1.0), 1)])))


def test_a_bag_that_gives_no_frame_says_why(tmp_path: Path) -> None:
    poses_only_later = [item for item in frames() if item[0] != "/pose"]
    poses_only_later += [("/pose", message, 10**12) for _, message in pose_messages("pose_topic", 10**12, 0.0)]
    dropped: list[str] = []
    with pytest.raises(BagError, match="3 colour and 3 depth messages, 3 pairs.*no_pose"):
        list(read_bag(write(tmp_path / "bag", poses_only_later), on_drop=lambda reason, text: dropped.append(reason)))
    assert dropped == ["no_pose"] * 3


def test_a_frame_that_cannot_be_used_is_reported_and_the_rest_is_read(tmp_path: Path) -> None:
    messages = frames()
    messages[4] = (messages[4][0], image(200 * MS, np.zeros((6, 8), np.uint8), "strange"), 200 * MS)
    messages[5] = (messages[5][0], image(200 * MS, np.zeros((6, 8), np.uint16), "16UC1"), 200 * MS)
    dropped: list[tuple[str, str]] = []
    found = list(read_bag(write(tmp_path / "bag", messages), on_drop=lambda *why: dropped.append(why)))
    assert [frame.stamp_ns for frame in found] == [100 * MS, 300 * MS]
    assert len(dropped) == 1 and "'strange'" in dropped[0][1]
