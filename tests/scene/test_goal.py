# SPDX-License-Identifier: Apache-2.0
"""Where to drive: a room whose depth is exact, seen from all over."""

from __future__ import annotations

import math

import numpy as np
import pytest

from adatoken3d_ros.scene.goal import GoalConfig, find_goal, floor_cells
from adatoken3d_ros.scene.occupancy import VOXEL, Occupancy
from tests.scene.room import CUPBOARD, ROOM, TABLE, view, walk

POSES = walk(16)
CAMERA = POSES[-1][:3, 3]


@pytest.fixture(scope="module")
def seen() -> Occupancy:
    occupancy = Occupancy()
    for stamp, pose in enumerate(POSES, start=1):
        occupancy.look(view(stamp, pose))
    return occupancy


@pytest.mark.parametrize("box", [CUPBOARD, TABLE])
def test_a_goal_is_on_free_floor_beside_the_box_and_faces_it(seen: Occupancy, box: np.ndarray) -> None:
    goal = find_goal(seen, 0.0, CAMERA, *box).pose
    assert goal is not None
    x, y, z = goal[:3, 3]
    assert z == 0.0 and ROOM[0][0] + 0.25 < x < ROOM[1][0] - 0.25 and ROOM[0][1] + 0.25 < y < ROOM[1][1] - 0.25
    for low, high in (CUPBOARD, TABLE):
        away = np.linalg.norm(np.maximum(0, np.maximum(low[:2] - (x, y), (x, y) - high[:2])))
        assert away >= 0.25
    beside = np.linalg.norm(np.maximum(0, np.maximum(box[0][:2] - (x, y), (x, y) - box[1][:2])))
    assert beside == pytest.approx(0.8, abs=0.25)
    middle = box.mean(axis=0)
    assert math.atan2(goal[1, 0], goal[0, 0]) == pytest.approx(math.atan2(middle[1] - y, middle[0] - x))
    np.testing.assert_allclose(goal[:3, :3] @ goal[:3, :3].T, np.eye(3), atol=1e-12)


def test_what_is_wanted_is_kept_to(seen: Occupancy) -> None:
    near = find_goal(seen, 0.0, CAMERA, *TABLE, GoalConfig(distance=0.5)).pose
    far = find_goal(seen, 0.0, CAMERA, *TABLE, GoalConfig(distance=1.4)).pose
    assert near is not None and far is not None

    def away(goal: np.ndarray) -> float:
        xy = goal[:2, 3]
        return float(np.linalg.norm(np.maximum(0, np.maximum(TABLE[0][:2] - xy, xy - TABLE[1][:2]))))

    assert away(near) < 0.8 < away(far)
    wide = find_goal(seen, 0.0, CAMERA, *TABLE, GoalConfig(clearance=4.0))
    assert wide.pose is None and wide.reason == "no seen free floor is wide enough for a robot of 4 m radius"
    low, corner = floor_cells(seen, 0.0, CAMERA, *TABLE, 0.4)
    tall, _ = floor_cells(seen, 0.0, CAMERA, *TABLE, 1.0)
    under = tuple(np.rint((TABLE.mean(axis=0)[:2] - corner[:2]) / VOXEL).astype(int))
    assert low.sum() >= tall.sum() and not tall[under]


def test_without_a_floor_there_is_a_reason(seen: Occupancy) -> None:
    assert find_goal(seen, None, CAMERA, *TABLE).reason == "the floor is not known: too little of it was seen"
    assert "wide enough" in find_goal(Occupancy(), 0.0, CAMERA, *TABLE).reason
    away = CAMERA + (0.0, 9.0, 0.0)
    assert "how to get there is not known" in find_goal(seen, 0.0, away, *TABLE).reason
    assert "off the distance of 0.8 m" in find_goal(seen, 0.0, CAMERA, *(TABLE + (0.0, 6.0, 0.0))).reason


def test_floor_that_no_way_leads_to_is_no_goal() -> None:
    """A wall through the room: what is seen over it cannot be driven to."""
    barrier = np.array([[-3.0, -0.1, 0.0], [3.0, 0.1, 0.9]])
    occupancy = Occupancy()
    poses = [pose for pose in POSES if abs(pose[1, 3]) > 0.3]
    for stamp, pose in enumerate(poses, start=1):
        pose = pose.copy()
        pose[2, 3] = 1.6
        occupancy.look(view(stamp, pose, CUPBOARD, TABLE, barrier))
    here = find_goal(occupancy, 0.0, np.array([0.0, -0.6, 1.6]), *CUPBOARD).pose
    assert here is not None and here[1, 3] < -0.1
    other = find_goal(occupancy, 0.0, np.array([0.0, -0.6, 1.6]), *(TABLE + (0.0, 0.4, 0.0)), GoalConfig(distance=0.4))
    assert other.pose is None and "off the distance" in other.reason
