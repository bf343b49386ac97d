# SPDX-License-Identifier: Apache-2.0
"""What the node listens to for the camera's poses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from rclpy.qos import DurabilityPolicy, QoSProfile
from tf2_msgs.msg import TFMessage

from adatoken3d_ros.ros.inputs.clocks import bad_stamp
from adatoken3d_ros.ros.inputs.conversions import stamp_to_ns
from adatoken3d_ros.ros.inputs.pictures import COLOURED_POINTS, POINTS_WITH_CAMERA
from adatoken3d_ros.ros.inputs.poses import BufferedPose, PoseError, PoseSource, StaticPose, TfPose, pose_from_numbers
from adatoken3d_ros.ros.inputs.transforms import TransformTree
from adatoken3d_ros.ros.parameters import Parameters

BASE_TO_CAMERA = "pose.base_to_camera"
# As tf2's listener: names that only a remapping changes, the static ones latched.
TF, TF_STATIC = "/tf", "/tf_static"
_TF_DURABILITY = {TF: DurabilityPolicy.VOLATILE, TF_STATIC: DurabilityPolicy.TRANSIENT_LOCAL}
_TF_DEPTH = 100
_TOPICS: dict[str, tuple[str, type]] = {"odometry": ("odom", Odometry), "pose_topic": ("pose", PoseStamped)}


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
    ) -> None:
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
        except ValueError:
            self._refused["poses.refused"] += 1
            raise

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
            except ValueError as error:
                self._refused["transforms.refused"] += 1
                self._warn(f"{topic}: {error}")


def _source(settings: Parameters) -> tuple[PoseSource, TransformTree | None]:
    scene_frame, given = settings["scene.frame_id"], settings[BASE_TO_CAMERA]
    T_base_camera = pose_from_numbers(given) if any(given) else None
    if settings["pose.source"] == "static":
        T = pose_from_numbers(settings["pose.static"])
        return StaticPose(T if T_base_camera is None else T @ T_base_camera, scene_frame), None
    tree = None if settings["pose.source"] == "pose_topic" else TransformTree()
    if settings["pose.source"] == "tf":
        return TfPose(scene_frame, T_base_camera, tree), tree
    tolerance_ns = round(settings["pose.tolerance"] * 1e9)
    return BufferedPose(scene_frame, T_base_camera, tree=tree, tolerance_ns=tolerance_ns), tree
