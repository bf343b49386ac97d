# SPDX-License-Identifier: Apache-2.0
"""What the node listens to for the camera's poses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped, PoseWithCovarianceStamped
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.qos import DurabilityPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.ros.inputs.clocks import bad_stamp
from adatoken3d_ros.ros.inputs.conversions import stamp_to_ns, transform_to_matrix
from adatoken3d_ros.ros.inputs.corrections import MapJumps
from adatoken3d_ros.ros.inputs.pictures import COLOURED_POINTS, POINTS_WITH_CAMERA
from adatoken3d_ros.ros.inputs.poses import BufferedPose, PoseError, PoseSource, StaticPose, TfPose, pose_from_numbers
from adatoken3d_ros.ros.inputs.transforms import TransformTree
from adatoken3d_ros.ros.parameters import Parameters

BASE_TO_CAMERA = "pose.base_to_camera"
# As tf2's listener: names that only a remapping changes, the static ones latched.
TF, TF_STATIC = "/tf", "/tf_static"
_TF_DURABILITY = {TF: DurabilityPolicy.VOLATILE, TF_STATIC: DurabilityPolicy.TRANSIENT_LOCAL}
_TF_DEPTH = 100
_TOPICS: dict[str, tuple[str, type]] = {
    "odometry": ("odom", Odometry),
    "pose_topic": ("pose", PoseStamped),
    "pose_with_covariance": ("pose", PoseWithCovarianceStamped),
}


def check(settings: Parameters) -> None:
    """Raises PoseError if the chosen pose source cannot work with the other parameters."""
    given, made_of = settings[BASE_TO_CAMERA], settings["input.source"]
    if settings["pose.source"] == "tf" and made_of in (POINTS_WITH_CAMERA, COLOURED_POINTS) and any(given):
        raise PoseError(
            f"{BASE_TO_CAMERA} is {list(given)}, but with pose.source 'tf' and input.source {made_of!r} the frames' "
            "own names say where things are: leave it at zeros"
        )


class PoseInput:
    """The chosen source, and what its messages do to it.

    Args:
        settings: the node's parameters.
        clock_ns: now; infinite before simulated time begins.
        refused: counts, under `poses.refused` and `transforms.refused`, what could not be used.
        warn: told of every transform that is refused; it may be a wheel's, and no problem of the camera.
        on_map_jump: told the transform (4, 4), scene frame, that takes what was seen to where it is, since the
            odometry's frame has jumped in the scene frame.

    Attributes:
        poses: the source.
        subscriptions: (message type, topic, quality of service or None for that of the images), TF first.
        needed: topics without which there is no pose.
    """

    def __init__(
        self,
        settings: Parameters,
        clock_ns: Callable[[], float],
        refused: Counter[str],
        warn: Callable[[str], object],
        on_map_jump: Callable[[NDArray[np.float64]], object] = lambda _: None,
    ) -> None:
        self._on_map_jump = on_map_jump
        self._edge = "", ""
        if settings["pose.source"] == "tf" and settings["pose.odom_frame"]:
            self._edge = settings["scene.frame_id"].lstrip("/"), settings["pose.odom_frame"].lstrip("/")
        self.jumps = MapJumps(settings["pose.map_jump"])
        self._clock_ns = clock_ns
        self._refused = refused
        self._warn = warn
        self.poses, self._tree = _source(settings)
        self.subscriptions: list[tuple[type, str, QoSProfile | None]] = []
        self.needed: tuple[str, ...] = ()
        if self._tree is not None:
            self.subscriptions += [
                (TFMessage, topic, QoSProfile(depth=_TF_DEPTH, durability=durability))
                for topic, durability in _TF_DURABILITY.items()
            ]
        if settings["pose.source"] in _TOPICS:
            topic, kind = _TOPICS[settings["pose.source"]]
            self.subscriptions.append((kind, topic, None))
            self.needed = (topic,)

    def add(self, topic: str, message: Any) -> None:
        """Takes a message of one of the subscriptions. Raises ValueError for a pose that is refused."""
        if topic in _TF_DURABILITY:
            self._add_transforms(topic, message)
            return
        # One wild pose would stay the newest, and no image would wait for its own any more.
        bad = bad_stamp(stamp_to_ns(message.header.stamp), self._clock_ns())
        try:
            if bad is not None:
                raise PoseError(bad[1])
            if isinstance(self.poses, BufferedPose):
                self.poses.add(message)
                self._refused["poses.covariance_unknown"] = self.poses.unknown
        except ValueError:
            self._refused["poses.refused"] += 1
            raise

    def way_to_camera(self, frame: str, camera_frame: str) -> NDArray[np.float64]:
        """T_frame_camera (4, 4) as TF says now; raises ValueError where it does not."""
        if self._tree is None:
            raise PoseError(f"with this pose.source nothing leads from {frame!r} to the camera: leave it empty")
        return self._tree.transform(frame, camera_frame, 0)

    def _add_transforms(self, topic: str, message: Any) -> None:
        assert self._tree is not None
        static, now_ns = topic == TF_STATIC, self._clock_ns()
        for transform in message.transforms:
            # One wild stamp would stay the newest, and what comes after it would be too old; one of zero would be
            # interpolated with, across all the time since.
            bad = None if static else bad_stamp(stamp_to_ns(transform.header.stamp), now_ns)
            try:
                if bad is not None:
                    raise PoseError(f"the transform of {transform.child_frame_id!r}: {bad[1]}")
                self._tree.add(transform, static=static)
                edge = transform.header.frame_id.lstrip("/"), transform.child_frame_id.lstrip("/")
                moved = self.jumps.see(transform_to_matrix(transform.transform)) if edge == self._edge else None
                if moved is not None:
                    self._on_map_jump(moved)
            except ValueError as error:
                self._refused["transforms.refused"] += 1
                self._warn(f"{topic}: {error}")


def _source(settings: Parameters) -> tuple[PoseSource, TransformTree | None]:
    scene_frame, given = settings["scene.frame_id"], settings[BASE_TO_CAMERA]
    T_base_camera = pose_from_numbers(given) if any(given) else None
    if settings["pose.source"] == "static":
        T = pose_from_numbers(settings["pose.static"])
        return StaticPose(T if T_base_camera is None else T @ T_base_camera, scene_frame), None
    tree = TransformTree() if settings["pose.source"] in ("tf", "odometry") else None
    if settings["pose.source"] == "tf":
        return TfPose(scene_frame, T_base_camera, tree), tree
    tolerance_ns = round(settings["pose.tolerance"] * 1e9)
    most = settings["pose.max_covariance"]
    source = BufferedPose(scene_frame, T_base_camera, tree=tree, max_covariance=most, tolerance_ns=tolerance_ns)
    return source, tree
