# SPDX-License-Identifier: Apache-2.0
"""Where was the camera when the picture was taken? Sources of poses for live topics and for bags; no ROS import.

All of them answer `lookup(stamp_ns, camera_frame) -> T_world_camera`, (4, 4) float64, camera optical frame to scene
frame.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation, Slerp

from adatoken3d_ros.ros.inputs.conversions import pose_to_matrix, quaternion_to_rotation, stamp_to_ns
from adatoken3d_ros.ros.inputs.transforms import JUMP_BACK_NS, PoseError, PoseUnavailable, TransformTree
from adatoken3d_ros.settings import DEFAULTS, check_pose

UNMEASURED = 1e5  # m^2 or rad^2: a variance that says that an axis is not measured
TOLERANCE_NS = round(DEFAULTS["pose.tolerance"] * 1e9)


class UncertainPose(PoseError):
    """A pose that its sender is not sure enough of."""


class PoseSource(Protocol):
    """Poses of the camera by time.

    Attributes:
        scene_frame: name of the frame that poses are given in; empty where it has none.
        by_frame: whether any frame's pose can be asked for, not only the camera's.
    """

    scene_frame: str
    by_frame: bool

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> NDArray[np.float64]:
        """T_world_camera (4, 4) at a stamp; `final` says that waiting for a better pose is over.

        Raises PoseUnavailable (one may still come) or PoseError (never).
        """

    def reset(self, stamp_ns: int) -> None:
        """Forgets what was received, after time has jumped back to about `stamp_ns`."""


class PoseBuffer:
    """Poses by stamp: exact, else interpolated between two neighbours, else the nearest within the tolerance.

    Args:
        tolerance_ns: how far the nearest pose may be where there is nothing to interpolate between, and how far apart
            two neighbours may be to interpolate, is ten times this; nanoseconds.
        capacity: poses that are remembered, the newest ones; None for all.
    """

    def __init__(self, tolerance_ns: int = TOLERANCE_NS, capacity: int | None = 2000) -> None:
        self.tolerance_ns = tolerance_ns
        self.capacity = capacity
        self._stamps: list[int] = []
        self._poses: list[NDArray[np.float64]] = []

    def __len__(self) -> int:
        return len(self._stamps)

    @property
    def newest(self) -> int:
        """Stamp of the newest pose; 0 before the first."""
        return self._stamps[-1] if self._stamps else 0

    def clear(self) -> None:
        """Forgets all poses."""
        self._stamps.clear()
        self._poses.clear()

    def add(self, stamp_ns: int, T: NDArray[np.float64]) -> None:
        """Remembers a pose; a second one for the same stamp replaces the first."""
        at = bisect_left(self._stamps, stamp_ns)
        if at < len(self._stamps) and self._stamps[at] == stamp_ns:
            self._poses[at] = T
            return
        self._stamps.insert(at, stamp_ns)
        self._poses.insert(at, T)
        if self.capacity is not None and len(self._stamps) > self.capacity:
            del self._stamps[0], self._poses[0]

    def at(self, stamp_ns: int, *, final: bool = False) -> NDArray[np.float64]:
        """The pose (4, 4) at a stamp.

        Raises:
            PoseUnavailable: nothing behind the stamp has come yet (with `final`: nothing near it).
            PoseError: nothing can be near it any more; both say how far the nearest one is.
        """
        if not self._stamps:
            raise PoseUnavailable("no pose has been received")
        after = bisect_left(self._stamps, stamp_ns)
        if after < len(self._stamps) and self._stamps[after] == stamp_ns:
            return self._poses[after]
        if 0 < after < len(self._stamps):
            t0, t1 = self._stamps[after - 1], self._stamps[after]
            if t1 - t0 <= 10 * self.tolerance_ns:
                return interpolate(self._poses[after - 1], self._poses[after], (stamp_ns - t0) / (t1 - t0))
        nearest = min(self._stamps[max(0, after - 1) : after + 1], key=lambda stamp: abs(stamp - stamp_ns))
        gap = abs(nearest - stamp_ns)
        text = f"the nearest pose is {gap / 1e6:.1f} ms away from the image at {stamp_ns / 1e9:.6f} s"
        # A pose that lies behind the image may still come, and would do better than the nearest before it.
        wait = after == len(self._stamps)
        if gap <= self.tolerance_ns and (final or not wait):
            return self._poses[self._stamps.index(nearest)]
        if wait:
            raise PoseUnavailable(f"{text}, which no pose has reached")
        raise PoseError(f"{text}; at most {self.tolerance_ns / 1e6:.1f} ms are allowed")


def interpolate(T0: NDArray[np.float64], T1: NDArray[np.float64], share: float) -> NDArray[np.float64]:
    """Between two poses (4, 4): linear in position, spherical in rotation; share 0 gives T0, 1 gives T1."""
    T = np.eye(4)
    T[:3, 3] = (1.0 - share) * T0[:3, 3] + share * T1[:3, 3]
    turns = Slerp([0.0, 1.0], Rotation.from_matrix(np.stack([T0[:3, :3], T1[:3, :3]])))
    T[:3, :3] = turns(share).as_matrix()
    return T


class StaticPose:
    """A camera that does not move."""

    by_frame = False

    def __init__(self, T_world_camera: NDArray[np.float64], scene_frame: str = "") -> None:
        self._T = T_world_camera
        self.scene_frame = scene_frame

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> NDArray[np.float64]:
        return self._T

    def reset(self, stamp_ns: int) -> None:
        """Nothing was received."""


def variance(covariance: Sequence[float]) -> float | None:
    """Largest variance of a pose (m^2, rad^2) of the 36 numbers of a message, by rows; None where it is not known.

    So it is where all of the diagonal are zeros (nobody filled it in), or one is NaN or negative. Axes from UNMEASURED
    on, as drivers of flat robots write them, do not count.
    """
    diagonal = np.asarray(covariance, dtype=np.float64).reshape(-1)[::7]
    if len(diagonal) != 6 or not (diagonal >= 0).all() or not diagonal.any():
        return None
    measured = diagonal[diagonal < UNMEASURED]
    return float(measured.max()) if len(measured) else None


class BufferedPose:
    """Poses of a body that arrive as messages, and the way from that body to the camera.

    Odometry is the pose of its child_frame_id, which seldom is the camera: where no `T_base_camera` is given, the
    transforms in `tree` lead from there to the image's frame, or the frame is not used. A PoseStamped does not say
    whose pose it is: without `T_base_camera` it is the camera optical frame's.

    Args:
        scene_frame: frame that the poses must be in; messages with an empty frame_id are believed.
        T_base_camera: (4, 4) camera optical frame in the body's frame, whatever TF says; None: see above.
        tree: the transforms of /tf and /tf_static; None: for poses that come as PoseStamped.
        max_covariance: poses with a larger `variance` are refused, those of none that is known are not; 0: none is.
        tolerance_ns, capacity: see PoseBuffer. With a capacity, stamps that jump back begin a new time, whose poses are
            not mixed with the old ones; without one (a whole bag) all are kept.
    """

    def __init__(
        self,
        scene_frame: str,
        T_base_camera: NDArray[np.float64] | None = None,
        *,
        tree: TransformTree | None = None,
        max_covariance: float = 0.0,
        tolerance_ns: int = TOLERANCE_NS,
        capacity: int | None = 2000,
    ) -> None:
        self.scene_frame = scene_frame
        self.tree = tree
        self.unknown = 0  # poses that came with a covariance which says nothing
        self._max_covariance = max_covariance
        # The given way is the colour camera's alone.
        self.by_frame = tree is not None and T_base_camera is None
        self.buffer = PoseBuffer(tolerance_ns, capacity)
        self._T_base_camera = T_base_camera
        self._child: str | None = None

    def add(self, message: Any) -> None:
        """Takes a nav_msgs/Odometry, geometry_msgs/PoseStamped or PoseWithCovarianceStamped.

        Raises:
            ConversionError: for a pose that is not finite or not a rotation.
            PoseError: for a pose in another frame, and for odometry of another body than before or of nobody knows
                whose (an empty child_frame_id), unless `T_base_camera` was given.
            UncertainPose: for one that is too uncertain.
        """
        pose = message.pose.pose if hasattr(message.pose, "pose") else message.pose
        frame = message.header.frame_id
        if frame and frame != self.scene_frame:
            raise PoseError(
                f"the pose is in frame {frame!r}, the scene in {self.scene_frame!r}: set scene.frame_id to {frame!r}"
            )
        stamp_ns, T = stamp_to_ns(message.header.stamp), pose_to_matrix(pose)
        if self._max_covariance and hasattr(message.pose, "covariance"):
            self._check_covariance(message.pose.covariance, stamp_ns)
        if self._T_base_camera is None and hasattr(message, "child_frame_id"):
            self._check_child(message.child_frame_id.lstrip("/"))
        if self.buffer.capacity is not None and stamp_ns < self.buffer.newest - JUMP_BACK_NS:
            self.buffer.clear()
        self.buffer.add(stamp_ns, T)

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> NDArray[np.float64]:
        T_world_base = self.buffer.at(stamp_ns, final=final)
        return T_world_base @ self._way_to(camera_frame, stamp_ns)

    def reset(self, stamp_ns: int) -> None:
        if self.tree is not None:
            self.tree.reset(stamp_ns)
        # If the poses have jumped before the images did, `add` has seen to it, and these are of the new time.
        if self.buffer.capacity is not None and self.buffer.newest > stamp_ns + JUMP_BACK_NS:
            self.buffer.clear()

    def _check_covariance(self, covariance: Sequence[float], stamp_ns: int) -> None:
        found = variance(covariance)
        self.unknown += found is None
        if found is not None and found > self._max_covariance:
            raise UncertainPose(
                f"the pose at {stamp_ns / 1e9:.6f} s has a variance of {found:g}, more than pose.max_covariance "
                f"{self._max_covariance:g}"
            )

    def _check_child(self, child: str) -> None:
        if not child:
            raise PoseError(
                "the odometry does not say whose pose it is (its child_frame_id is empty): set pose.base_to_camera"
            )
        if self._child not in (None, child):
            raise PoseError(f"the odometry is the pose of {child!r}, the messages before were of {self._child!r}")
        self._child = child

    def missing(self, camera_frame: str) -> str:
        """Why no way leads from the body to a frame, at whatever time, with the names of both; empty if one does."""
        child, camera_frame = self._child, camera_frame.lstrip("/")
        if self._T_base_camera is not None or child in (None, camera_frame):
            return ""
        if self.tree is not None and camera_frame and self.tree.connected(str(child), camera_frame):
            return ""
        return (
            f"the odometry is the pose of {child!r}, the image's frame is {camera_frame!r}, and no transform leads "
            "from one to the other; where there is no TF, set pose.base_to_camera (--base-to-camera)"
        )

    def _way_to(self, camera_frame: str, stamp_ns: int) -> NDArray[np.float64]:
        """T_base_camera (4, 4). Raises PoseUnavailable."""
        missing = self.missing(camera_frame)
        if missing:
            raise PoseUnavailable(missing)
        if self._T_base_camera is not None:
            return self._T_base_camera
        if self.tree is None or self._child is None:
            return np.eye(4)
        return self.tree.transform(self._child, camera_frame, stamp_ns)


class TfPose:
    """TF at the acquisition stamp.

    Args:
        scene_frame: target frame.
        T_base_camera: (4, 4) extra transform from the camera optical frame to the image's frame_id.
        tree: where the transforms are put.
    """

    by_frame = True

    def __init__(
        self, scene_frame: str, T_base_camera: NDArray[np.float64] | None = None, tree: TransformTree | None = None
    ) -> None:
        self.scene_frame = scene_frame
        self.tree = TransformTree() if tree is None else tree
        self._T_base_camera = np.eye(4) if T_base_camera is None else T_base_camera

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> NDArray[np.float64]:
        if not camera_frame:
            raise PoseError("the image has no frame_id, so TF cannot be asked")
        return self.tree.transform(self.scene_frame, camera_frame, stamp_ns) @ self._T_base_camera

    def transform(self, stamp_ns: int, frame: str) -> NDArray[np.float64]:
        """From any frame to the scene frame, (4, 4); stamp 0 asks for the newest. Raises as TransformTree.transform."""
        return self.tree.transform(self.scene_frame, frame, stamp_ns)

    def reset(self, stamp_ns: int) -> None:
        self.tree.reset(stamp_ns)


def pose_from_numbers(numbers: Sequence[float]) -> NDArray[np.float64]:
    """A pose (4, 4) from a parameter: x y z roll pitch yaw (metres, radians) or x y z qx qy qz qw.

    Raises:
        ValueError: for another count, for numbers that are not finite and for a quaternion that is not a rotation.
    """
    check_pose(numbers)
    T = np.eye(4)
    T[:3, 3] = numbers[:3]
    if len(numbers) == 7:
        T[:3, :3] = quaternion_to_rotation(*numbers[3:])
    else:
        # REP 103: fixed axes, in the order roll, pitch, yaw.
        T[:3, :3] = Rotation.from_euler("xyz", list(numbers[3:])).as_matrix()
    return T
