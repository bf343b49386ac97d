# SPDX-License-Identifier: Apache-2.0
"""Poses at a stamp: exact, between, near, not yet, never."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import MS, at, pose_message, transform

from adatoken3d_ros.ros.inputs import poses as p
from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.ros.inputs.transforms import TransformTree


def test_exact_and_between() -> None:
    buffer = p.PoseBuffer(tolerance_ns=20 * MS)
    buffer.add(100 * MS, at(0.0, 0.0))
    buffer.add(200 * MS, at(1.0, 90.0))
    np.testing.assert_array_equal(buffer.at(100 * MS), at(0.0, 0.0))
    np.testing.assert_allclose(buffer.at(125 * MS), at(0.25, 22.5), atol=1e-12)


def test_late_messages_are_sorted_in_and_replace_their_stamp() -> None:
    buffer = p.PoseBuffer()
    for stamp, x in ((300, 3.0), (100, 1.0), (200, 9.0), (200, 2.0)):
        buffer.add(stamp * MS, at(x))
    assert len(buffer) == 3
    assert buffer.at(200 * MS)[0, 3] == 2.0


def test_not_yet_near_and_never() -> None:
    buffer = p.PoseBuffer(tolerance_ns=20 * MS)
    with pytest.raises(p.PoseUnavailable, match="no pose has been received"):
        buffer.at(5)
    buffer.add(100 * MS, at(1.0))
    with pytest.raises(p.PoseUnavailable, match=r"10\.0 ms"):
        buffer.at(110 * MS)
    assert buffer.at(110 * MS, final=True)[0, 3] == 1.0
    with pytest.raises(p.PoseUnavailable, match=r"30\.0 ms"):
        buffer.at(130 * MS, final=True)
    assert buffer.at(85 * MS)[0, 3] == 1.0
    with pytest.raises(p.PoseError, match=r"50\.0 ms away.*at most 20\.0 ms") as never:
        buffer.at(50 * MS)
    assert not isinstance(never.value, p.PoseUnavailable)


def test_poses_too_far_apart_are_not_interpolated() -> None:
    buffer = p.PoseBuffer(tolerance_ns=20 * MS)
    buffer.add(1000 * MS, at(0.0))
    buffer.add(1201 * MS, at(1.0))
    with pytest.raises(p.PoseError):
        buffer.at(1100 * MS)
    assert buffer.at(1190 * MS)[0, 3] == 1.0


def test_capacity_forgets_the_oldest() -> None:
    buffer = p.PoseBuffer(tolerance_ns=0, capacity=2)
    for stamp in (1, 2, 3):
        buffer.add(stamp, at(stamp))
    with pytest.raises(p.PoseError):
        buffer.at(1)
    assert buffer.at(2)[0, 3] == 2.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=2, max_size=12, unique=True), st.integers(1, 50))
def test_interpolation_agrees_with_a_line(stamps: list[int], when: int) -> None:
    buffer = p.PoseBuffer(tolerance_ns=50)
    for stamp in stamps:
        buffer.add(stamp, at(2.0 * stamp, stamp))
    if min(stamps) <= when <= max(stamps):
        np.testing.assert_allclose(buffer.at(when), at(2.0 * when, when), atol=1e-9)


def test_buffered_pose_applies_where_the_camera_sits() -> None:
    source = p.BufferedPose("map", at(0.5))
    source.add(pose_message(100 * MS, at(1.0, 90.0)))
    found = source.lookup(100 * MS, "camera")
    np.testing.assert_allclose(found[:3, 3], (1.0, 0.5, 0.0), atol=1e-12)


def test_a_pose_in_another_frame_names_both() -> None:
    with pytest.raises(p.PoseError, match="'odom'.*'map'"):
        p.BufferedPose("map").add(pose_message(7, at(1.0), "odom"))


def test_a_pose_that_is_none_is_refused() -> None:
    message = pose_message(7, at(1.0))
    message.pose.orientation.w = 7.0
    with pytest.raises(ConversionError, match="7"):
        p.BufferedPose("map").add(message)


def test_time_that_goes_back_forgets_the_future() -> None:
    source = p.BufferedPose("map")
    source.add(pose_message(100_000 * MS, at(5.0)))
    source.add(pose_message(10 * MS, at(1.0)))
    source.reset(20 * MS)
    assert source.lookup(10 * MS, "")[0, 3] == 1.0
    assert len(source.buffer) == 1


def run(x: float, hundredths: range) -> list[Any]:
    """Poses of a body that stands at x, 0.01 s apart."""
    return [pose_message(i * 10 * MS, at(x)) for i in hundredths]


@pytest.mark.parametrize("poses_first", [True, False])
def test_two_runs_are_not_mixed(poses_first: bool) -> None:
    """A simulation that starts again elsewhere; images jump after the poses, or before them."""
    source = p.BufferedPose("map")
    for message in run(0.0, range(1, 2501)):
        source.add(message)
    assert len(source.buffer) == 2000, "full: what is older than all others would be let go of at once"
    if not poses_first:
        source.reset(20 * MS)
        with pytest.raises(p.PoseUnavailable, match="no pose has been received"):
            source.lookup(20 * MS, "")
    for message in run(5.0, range(1, 4)):
        source.add(message)
    if poses_first:
        source.reset(20 * MS)
    assert [source.lookup(ms * MS, "")[0, 3] for ms in (10, 15, 20, 30)] == [5.0] * 4
    with pytest.raises(p.PoseUnavailable, match="20.0 ms away"):
        source.lookup(50 * MS, "")


def test_a_pose_that_is_only_late_is_sorted_in() -> None:
    source = p.BufferedPose("map")
    for ms, x in ((2000, 2.0), (1100, 1.1), (3000, 3.0), (2005, 2.5)):
        source.add(pose_message(ms * MS, at(x)))
    assert [source.lookup(ms * MS, "")[0, 3] for ms in (1100, 2000, 2005, 3000)] == [1.1, 2.0, 2.5, 3.0]


def test_of_a_whole_bag_all_poses_are_kept() -> None:
    source = p.BufferedPose("map", capacity=None)
    for message in [*run(0.0, range(500, 600)), *run(5.0, range(1, 10))]:
        source.add(message)
    assert (source.lookup(5500 * MS, "")[0, 3], source.lookup(50 * MS, "")[0, 3]) == (0.0, 5.0)


def odometry(stamp_ns: int, T: np.ndarray, child: str = "base_link") -> Any:
    message = pose_message(stamp_ns, T)
    return SimpleNamespace(header=message.header, pose=SimpleNamespace(pose=message.pose), child_frame_id=child)


def mounted(*, moving: bool = False) -> TransformTree:
    """base_link -> camera_link (a mast 2 m high, which may turn) -> camera_optical."""
    up, optical = np.eye(4), np.eye(4)
    up[2, 3] = 2.0
    optical[:3, :3] = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    tree = TransformTree()
    tree.add(transform(0, "camera_link", "camera_optical", optical), static=True)
    if moving:
        for ms, degrees in ((100, 0.0), (200, 90.0)):
            tree.add(transform(ms * MS, "base_link", "camera_link", up @ at(0.0, degrees)))
    else:
        tree.add(transform(0, "base_link", "camera_link", up), static=True)
    return tree


def test_odometry_is_the_pose_of_its_child_frame() -> None:
    """A base at x = 1 that looks along y, its camera 2 m above it: x right, y down, z forward."""
    source = p.BufferedPose("map", tree=mounted())
    source.add(odometry(100 * MS, at(1.0, 90.0)))
    found = source.lookup(100 * MS, "camera_optical")
    np.testing.assert_allclose(found @ (0, 0, 3, 1), (1, 3, 2, 1), atol=1e-12)
    np.testing.assert_allclose(found @ (0.5, 0, 0, 1), (1.5, 0, 2, 1), atol=1e-12)
    assert source.by_frame and source.missing("camera_optical") == ""


def test_a_joint_between_base_and_camera_is_asked_at_the_stamp() -> None:
    source = p.BufferedPose("map", tree=mounted(moving=True))
    source.add(odometry(100 * MS, at(0.0)))
    source.add(odometry(200 * MS, at(0.0)))
    np.testing.assert_allclose(source.lookup(150 * MS, "camera_optical") @ (0, 0, 2**0.5, 1), (1, 1, 2, 1), atol=1e-12)


@pytest.mark.parametrize("child", ["camera_optical", "/camera_optical", "camera_link"])
def test_visual_odometry_of_the_cameras_own_frame_or_body(child: str) -> None:
    source = p.BufferedPose("map", tree=mounted())
    source.add(odometry(7, at(1.0), child))
    found = source.lookup(7, "camera_optical")
    forward = (1.0, 0.0, 1.0) if "optical" in child else (2.0, 0.0, 0.0)
    np.testing.assert_allclose(found[:3, :3] @ (0, 0, 1) + found[:3, 3], forward, atol=1e-12)


def test_odometry_of_a_body_that_nothing_leads_to_names_both_frames() -> None:
    source = p.BufferedPose("map", tree=TransformTree())
    source.add(odometry(7, at(1.0)))
    named = "'base_link'.*'camera_optical'.*pose.base_to_camera.*--base-to-camera"
    with pytest.raises(p.PoseUnavailable, match=named):
        source.lookup(7, "camera_optical")
    with pytest.raises(p.PoseUnavailable, match="'base_link'.*''"):
        source.lookup(7, "")
    source.tree.add(transform(0, "base_link", "camera_optical", at(0.5)), static=True)  # type: ignore[union-attr]
    assert source.lookup(7, "camera_optical")[0, 3] == 1.5


def test_a_given_way_counts_whatever_tf_and_the_message_say() -> None:
    source = p.BufferedPose("map", at(0.25), tree=mounted())
    source.add(odometry(7, at(1.0), ""))
    assert source.lookup(7, "camera_optical")[0, 3] == 1.25
    assert not source.by_frame, "it is the colour camera's alone"


def test_odometry_of_nobody_knows_whom_is_refused() -> None:
    source = p.BufferedPose("map", tree=mounted())
    with pytest.raises(p.PoseError, match="child_frame_id is empty.*pose.base_to_camera"):
        source.add(odometry(7, at(1.0), ""))
    source.add(odometry(7, at(1.0)))
    with pytest.raises(p.PoseError, match="'wheel'.*'base_link'"):
        source.add(odometry(8, at(1.0), "wheel"))


def test_odometry_that_is_refused_says_nothing_of_whose_it_is() -> None:
    """One spoilt message of another body, and all good ones after it were refused."""
    source = p.BufferedPose("map", tree=mounted())
    bad = odometry(100 * MS, at(1.0), "ghost")
    bad.pose.pose.position.x = float("nan")
    with pytest.raises(ValueError, match="nan"):
        source.add(bad)
    source.add(odometry(200 * MS, at(1.0)))
    assert source.missing("base_link") == ""


def test_tf_is_asked_at_the_stamp() -> None:
    source = p.TfPose("map", at(0.5))
    source.tree.add(transform(7, "map", "camera", at(2.0)))
    assert source.lookup(7, "camera")[0, 3] == 2.5
    assert source.transform(0, "camera")[0, 3] == 2.0
    with pytest.raises(p.PoseUnavailable, match="'camera' to 'map' at 0.000000 s.*extrapolation"):
        source.lookup(8, "camera")
    with pytest.raises(p.PoseError, match="no frame_id"):
        source.lookup(7, "")
    source.reset(7)
    with pytest.raises(p.PoseUnavailable):
        source.lookup(7, "camera")


def test_pose_from_numbers() -> None:
    np.testing.assert_allclose(p.pose_from_numbers([1, 2, 3, 0, 0, np.pi / 2]) @ [1, 0, 0, 1], [1, 3, 3, 1])
    np.testing.assert_allclose(p.pose_from_numbers([1, 2, 3, 0, 0, 0, 1])[:3, 3], [1, 2, 3])
    for bad in ([1.0] * 5, [np.nan] * 6, [0.0] * 7):
        with pytest.raises(ValueError):
            p.pose_from_numbers(bad)
