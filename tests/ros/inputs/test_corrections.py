# SPDX-License-Identifier: Apache-2.0
"""Poses that are too uncertain, and poses that were corrected afterwards."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rclpy")

from ros_messages import MS, at, pose_message, transform
from test_poses import odometry

from adatoken3d_ros.ros.inputs.corrections import MapJumps, corrected_poses
from adatoken3d_ros.ros.inputs.pose_inputs import PoseInput
from adatoken3d_ros.ros.inputs.poses import BufferedPose, PoseError, variance
from adatoken3d_ros.settings import Settings

FLAT = [0.02, 0.04, 1e6, 1e6, 1e6, 0.01]


def covariance(diagonal: list[float], off: float = 0.0) -> list[float]:
    return (np.diag(diagonal) + off * (1 - np.eye(6))).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("diagonal", "found"),
    [
        ([0.01, 0.02, 0.03, 0.001, 0.002, 0.003], 0.03),
        ([0.01, 0.02, 0.03, 0.0, 0.0, 2.5], 2.5),
        (FLAT, 0.04),
        ([math.inf, 0.02, 0.0, 0.0, 0.0, 0.0], 0.02),
        ([0.0] * 6, None),
        ([math.nan, 0.1, 0.1, 0.1, 0.1, 0.1], None),
        ([-1.0, 0.0, 0.0, 0.0, 0.0, 0.0], None),
        ([1e9] * 6, None),
    ],
    ids=["position", "turn", "flat", "infinite", "zeros", "nan", "minus-one", "none-measured"],
)
def test_how_uncertain_a_pose_is(diagonal: list[float], found: float | None) -> None:
    assert variance(covariance(diagonal, 5.0)) == found
    source = BufferedPose("map", np.eye(4), max_covariance=0.05)
    message = odometry(100 * MS, at(1.0))
    message.pose.covariance = covariance(diagonal)
    if found is not None and found > 0.05:
        with pytest.raises(PoseError, match=rf"variance of {found}, more than pose.max_covariance 0.05"):
            source.add(message)
        assert not len(source.buffer)
    else:
        source.add(message)
        assert source.lookup(100 * MS, "")[0, 3] == 1.0 and source.unknown == (found is None)
    BufferedPose("map", np.eye(4)).add(message)  # without a limit any is believed


def test_a_view_has_the_corrected_pose_of_its_time_or_one_between() -> None:
    messages = [pose_message(1000 * MS, at(1.0)), pose_message(2000 * MS, at(2.0)), pose_message(9000 * MS, at(9.0))]
    way = at(0.5)
    found = corrected_poses(messages, [1000 * MS, 1250 * MS, 2080 * MS, 5000 * MS], "map", way)
    assert {stamp // MS: round(float(T[0, 3]), 9) for stamp, T in found.items()} == {1000: 1.5, 1250: 1.75, 2080: 2.5}
    messages[0].header.frame_id = "odom"
    for given, stamps, named in (
        (messages, [1], "'odom', the scene in 'map'"),
        ([], [1], "0 poses were given"),
        (messages[1:], [1], "no view is near one of the 2 poses"),
        (messages[1:], [], "there is no view"),
    ):
        with pytest.raises(ValueError, match=named):
            corrected_poses(given, stamps, "map", way)


def test_a_map_jumps_when_the_odometry_s_frame_has_moved_far_enough() -> None:
    jumps = MapJumps(0.1)
    assert jumps.see(at(0.0)) is None and jumps.see(at(0.06)) is None
    moved = jumps.see(at(0.12))
    assert moved is not None and moved[0, 3] == pytest.approx(0.12), "small ones add up"
    assert jumps.see(at(0.12)) is None
    turned = jumps.see(at(0.12, 2.0))
    assert turned is not None
    np.testing.assert_allclose(turned @ at(0.12), at(0.12, 2.0), atol=1e-12)
    jumps.reset()
    assert jumps.see(at(5.0)) is None and MapJumps(0.0).see(at(5.0)) is None


@pytest.mark.parametrize(
    ("changed", "jumps"),
    [
        ({}, 1),
        ({"pose.odom_frame": ""}, 0),
        ({"pose.odom_frame": "base"}, 0),
        ({"pose.map_jump": 0.0}, 0),
        ({"pose.map_jump": 5.0}, 0),
        ({"pose.source": "odometry"}, 0),
    ],
)
def test_only_the_odometry_s_frame_moves_what_was_seen(changed: dict[str, Any], jumps: int) -> None:
    """A robot whose pose TF tells right in the map drives, and no view follows it."""
    told: list[Any] = []
    settings: Any = Settings(changed)
    source = PoseInput(settings, lambda: math.inf, Counter(), lambda _: None, told.append)
    for ms, x in ((1000, 0.0), (1100, 1.0)):
        edges = [transform(ms * MS, "map", "odom", at(x)), transform(ms * MS, "map", "robot", at(9 * x))]
        source.add("/tf", SimpleNamespace(transforms=edges))
    assert len(told) == jumps and all(T[0, 3] == 1.0 for T in told)


def test_the_limit_reaches_the_pose_source_and_what_is_not_known_is_counted() -> None:
    refused: Counter[str] = Counter()
    settings: Any = Settings({"pose.source": "pose_with_covariance", "pose.max_covariance": 0.05})
    source = PoseInput(settings, lambda: math.inf, refused, lambda _: None)
    assert [(kind.__name__, topic) for kind, topic, _ in source.subscriptions] == [
        ("PoseWithCovarianceStamped", "pose")
    ]
    for diagonal in ([0.0] * 6, [0.01] * 6, [1.0] * 6):
        message = odometry(100 * MS, at(1.0))
        del message.child_frame_id
        message.pose.covariance = covariance(diagonal)
        try:
            source.add("pose", message)
        except PoseError:
            assert diagonal[0] == 1.0
    assert refused == {"poses.refused": 1, "poses.covariance_unknown": 1}
