# SPDX-License-Identifier: Apache-2.0
"""Poses that were corrected afterwards, as by the closing of a loop: told by messages, or seen in how TF jumps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from adatoken3d_ros.ros.inputs.conversions import pose_to_matrix, stamp_to_ns
from adatoken3d_ros.ros.inputs.poses import PoseBuffer
from adatoken3d_ros.ros.inputs.transforms import PoseError

TOLERANCE_NS = 100_000_000  # a view this near to a pose has it; between two ten times this apart it gets one between
MOST_POSES = 100_000  # of one request
TURN = 10.0  # degrees that count as much as a metre


def corrected_poses(
    messages: Sequence[Any],
    stamps: Iterable[int],
    scene_frame: str,
    T_child_camera: NDArray[np.float64],
) -> dict[int, NDArray[np.float64]]:
    """{stamp: T_world_camera (4, 4)} of those of the stamps (nanoseconds) that poses lie near.

    Args:
        messages: geometry_msgs/PoseStamped, in the scene frame; an empty frame_id is believed.
        T_child_camera: (4, 4) camera optical frame in the frame whose poses they are.

    Raises:
        ValueError: for poses in another frame, too many, none at all, or none near any stamp.
        ConversionError: for a pose that is not finite or not a rotation.
    """
    if not 0 < len(messages) <= MOST_POSES:
        raise ValueError(f"{len(messages)} poses were given, not 1 to {MOST_POSES}")
    buffer = PoseBuffer(TOLERANCE_NS, capacity=None)
    for message in messages:
        frame = message.header.frame_id
        if frame not in ("", scene_frame):
            raise ValueError(f"a pose is in frame {frame!r}, the scene in {scene_frame!r}")
        buffer.add(stamp_to_ns(message.header.stamp), pose_to_matrix(message.pose))
    found, why = {}, "there is no view"
    for stamp in stamps:
        try:
            found[stamp] = buffer.at(stamp, final=True) @ T_child_camera
        except PoseError as error:
            why = str(error)
    if not found:
        raise ValueError(f"no view is near one of the {len(messages)} poses: {why}")
    return found


class MapJumps:
    """Notices that the robot's map has been corrected: that the odometry's frame has jumped in it.

    What was seen before then lies elsewhere in the map, by as much. Small corrections, which localisation makes all the
    time, add up until they are worth it.

    Args:
        limit: metres that the odometry's frame moves in the scene frame, or turns at `TURN`, until it has jumped;
            0: it never has.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._base: NDArray[np.float64] | None = None

    def see(self, T_map_odom: NDArray[np.float64]) -> NDArray[np.float64] | None:
        """What (4, 4) takes the places of before to where they are now, scene frame; None while it has not jumped."""
        base, self._base = self._base, T_map_odom if self._base is None else self._base
        if base is None or not self._limit:
            return None
        moved = float(np.linalg.norm(T_map_odom[:3, 3] - base[:3, 3]))
        turned = Rotation.from_matrix(T_map_odom[:3, :3] @ base[:3, :3].T).magnitude()
        if max(moved, math.degrees(turned) / TURN) <= self._limit:
            return None
        self._base = T_map_odom
        return np.asarray(T_map_odom @ np.linalg.inv(base), np.float64)

    def reset(self) -> None:
        """Time has jumped back: the next place of the odometry's frame is where it was all along."""
        self._base = None
