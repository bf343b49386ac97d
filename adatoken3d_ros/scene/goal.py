# SPDX-License-Identifier: Apache-2.0
"""Where to drive to look at something: seen free floor near it, to which seen free floor leads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.occupancy import VOXEL, Occupancy, State
from adatoken3d_ros.settings import DEFAULTS

NEAR_CAMERA = 1.5  # metres around the camera in which the floor that it stands over is looked for
ABOVE = 0.15  # metres above the floor where what is in the way begins
LARGEST = 40.0  # metres, the longest side of the floor that is looked at


@dataclass(frozen=True)
class GoalConfig:
    """Where a robot wants to stand, see the settings `goal.*`."""

    distance: float = DEFAULTS["goal.distance"]
    clearance: float = DEFAULTS["goal.clearance"]
    height: float = DEFAULTS["goal.height"]


@dataclass(frozen=True)
class Goal:
    """T_world_goal (4, 4), x forwards, z up, on the floor; None with a reason why there is none."""

    pose: NDArray[np.float64] | None
    reason: str = ""


def find_goal(
    occupancy: Occupancy,
    floor: float | None,
    camera: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    config: GoalConfig | None = None,
) -> Goal:
    """A pose near a box from which it can be looked at.

    Of the cells of seen free floor that a robot fits on and can get to over others from where the camera is, those are
    best from which nothing known hides the box, then those on a straight way from the camera, then those whose distance
    from the box is nearest to the one wanted.

    Args:
        floor: its height, scene frame, metres; None where it is not known.
        camera: (3,) where the robot is. low, high: (3,) corners of the box.
    """
    config = config or GoalConfig()
    if floor is None:
        return Goal(None, "the floor is not known: too little of it was seen")
    drivable, corner = floor_cells(occupancy, floor, camera, low, high, config.height)
    # A cell off the edge is unknown; the transform takes what is outside for free.
    away = cv2.distanceTransform(np.pad(drivable, 1).astype(np.uint8), cv2.DIST_L2, 5)[1:-1, 1:-1] * VOXEL
    fits = away >= config.clearance + VOXEL / 2
    cells = np.argwhere(fits)
    if not len(cells):
        return Goal(None, f"no seen free floor is wide enough for a robot of {config.clearance:g} m radius")
    xy = cells * VOXEL + corner[:2]
    to_camera = np.linalg.norm(xy - camera[:2], axis=1)
    start = cells[int(to_camera.argmin())]
    if to_camera.min() > NEAR_CAMERA:
        return Goal(None, f"no seen free floor within {NEAR_CAMERA:g} m of the camera: how to get there is not known")
    label = cv2.connectedComponents(fits.astype(np.uint8), connectivity=4)[1]
    connected = label[tuple(cells.T)] == label[tuple(start)]
    beside = np.linalg.norm(np.maximum(0.0, np.maximum(low[:2] - xy, xy - high[:2])), axis=1)
    off = np.abs(beside - config.distance)
    near = connected & (off <= config.distance)
    if not near.any():
        least = float(off[connected].min())
        return Goal(
            None, f"the nearest seen free floor is {least:.1f} m off the distance of {config.distance:g} m to it"
        )
    middle = (low + high) / 2
    rows = np.flatnonzero(near)
    rows = rows[np.argsort(off[rows], kind="stable")][:64]
    hidden = [_is_hidden(occupancy, (*xy[i], max(middle[2], floor + config.height / 2)), low, high) for i in rows]
    straight = [_is_straight(fits, start, cells[i]) for i in rows]
    best = min(range(len(rows)), key=lambda n: (hidden[n], not straight[n], round(off[rows[n]], 6)))
    x, y = xy[rows[best]]
    yaw = math.atan2(middle[1] - y, middle[0] - x)
    pose = np.eye(4)
    pose[:2, :2] = [[math.cos(yaw), -math.sin(yaw)], [math.sin(yaw), math.cos(yaw)]]
    pose[:3, 3] = x, y, floor
    return Goal(pose)


def floor_cells(
    occupancy: Occupancy,
    floor: float,
    camera: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    height: float,
) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """(X, Y) cells of seen floor with nothing above them up to a height, around camera and box; centre of the first.

    The floor itself must have been measured, what is above it seen to be free, and nothing up to the height occupied.
    """
    reach = 3.0
    ends = np.stack([low[:2], high[:2], camera[:2]])
    first, last = ends.min(axis=0) - reach, ends.max(axis=0) + reach
    too_far = np.maximum(0.0, last - first - LARGEST) / 2
    first, last = first + too_far, last - too_far
    state, corner = occupancy.box((*first, floor - VOXEL), (*last, floor + height))
    z = corner[2] + np.arange(state.shape[2]) * VOXEL
    ground, body = np.abs(z - floor) <= VOXEL * 0.55, z - floor > ABOVE
    lowest = int(np.flatnonzero(body)[0])
    seen = (state[:, :, ground] == State.OCCUPIED).any(axis=2)
    # Straight below a camera, what is next above the floor is too near to it to be told from it.
    free = (state[:, :, lowest] != State.UNSEEN) & (state[:, :, lowest : lowest + 2] == State.FREE).any(axis=2)
    empty = (state[:, :, body] != State.OCCUPIED).all(axis=2)
    return seen & free & empty, corner


def _is_straight(fits: NDArray[np.bool_], start: NDArray[np.int64], end: NDArray[np.int64]) -> bool:
    """Whether the straight way between two cells goes over cells that the robot fits on."""
    n = int(np.abs(end - start).max()) + 1
    way = np.rint(np.linspace(start, end, 2 * n)).astype(np.int64)
    return bool(fits[tuple(way.T)].all())


def _is_hidden(
    occupancy: Occupancy, eye: tuple[float, ...], low: NDArray[np.float64], high: NDArray[np.float64]
) -> bool:
    """Whether something known stands between a point and a box, level with the point."""
    begin, end = np.array(eye), (low + high) / 2
    end[2] = begin[2]
    points = begin + np.linspace(0.0, 1.0, 1 + int(np.linalg.norm(end - begin) / (VOXEL / 2)))[:, None] * (end - begin)
    outside = ((points[:, :2] < low[:2] - VOXEL) | (points[:, :2] > high[:2] + VOXEL)).any(axis=1)
    return bool((occupancy.states(points[outside]) == State.OCCUPIED).any()) if outside.any() else False
