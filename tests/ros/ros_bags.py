# SPDX-License-Identifier: Apache-2.0
"""Bags of a small camera that moves, with each source of poses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ros_messages import MS, at
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from adatoken3d_ros.ros.outputs.fill import rotation_to_quaternion

STORE = get_typestore(Stores.ROS2_KILTED)
T = STORE.types
K = np.array([50.0, 0, 3.5, 0, 50.0, 2.5, 0, 0, 1])


def header(stamp: int, frame: str) -> Any:
    time = T["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9))
    return T["std_msgs/msg/Header"](time, frame)


def image(stamp: int, pixels: np.ndarray, encoding: str) -> Any:
    data = np.ascontiguousarray(pixels).view(np.uint8).reshape(-1)
    step = pixels.nbytes // pixels.shape[0]
    return T["sensor_msgs/msg/Image"](header(stamp, "camera"), *pixels.shape[:2], encoding, 0, step, data)


def info(stamp: int) -> Any:
    roi = T["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
    return T["sensor_msgs/msg/CameraInfo"](
        header(stamp, "camera"), 6, 8, "plumb_bob", np.zeros(5), K, np.eye(3).reshape(-1), np.zeros(12), 0, 0, roi
    )


def pose(x: float) -> Any:
    q = rotation_to_quaternion(at(x)[:3, :3])
    return T["geometry_msgs/msg/Pose"](T["geometry_msgs/msg/Point"](x, 0.0, 0.0), T["geometry_msgs/msg/Quaternion"](*q))


def transform(stamp: int, parent: str, child: str, x: float) -> Any:
    parts = T["geometry_msgs/msg/Transform"](
        T["geometry_msgs/msg/Vector3"](x, 0.0, 0.0), T["geometry_msgs/msg/Quaternion"](0.0, 0.0, 0.0, 1.0)
    )
    stamped = T["geometry_msgs/msg/TransformStamped"](header(stamp, parent), child, parts)
    return T["tf2_msgs/msg/TFMessage"]([stamped])


def pose_messages(source: str, stamp: int, x: float, child: str = "camera") -> list[tuple[str, Any]]:
    if source == "pose_topic":
        return [("/pose", T["geometry_msgs/msg/PoseStamped"](header(stamp, "map"), pose(x)))]
    if source == "odometry":
        twist = T["geometry_msgs/msg/TwistWithCovariance"](
            T["geometry_msgs/msg/Twist"](*(2 * [T["geometry_msgs/msg/Vector3"](0.0, 0.0, 0.0)])), np.zeros(36)
        )
        at_pose = T["geometry_msgs/msg/PoseWithCovariance"](pose(x), np.zeros(36))
        return [("/odom", T["nav_msgs/msg/Odometry"](header(stamp, "map"), child, at_pose, twist))]
    return [("/tf", transform(stamp, "map", "camera", x))]


def write(
    path: Path,
    messages: list[tuple[str, Any, int]],
    plugin: StoragePlugin = StoragePlugin.MCAP,
    compression: CompressionMode = CompressionMode.NONE,
) -> Path:
    writing = Writer(path, version=9, storage_plugin=plugin)
    writing.set_compression(compression, CompressionFormat.ZSTD)
    with writing as writer:
        connections: dict[str, Any] = {}
        for topic, message, stamp in messages:
            kind = message.__msgtype__
            if topic not in connections:
                connections[topic] = writer.add_connection(topic, kind, typestore=STORE)
            writer.write(connections[topic], stamp, STORE.serialize_cdr(message, kind))
    return path


def frames(source: str = "pose_topic", count: int = 3) -> list[tuple[str, Any, int]]:
    """Images first, then calibration and pose: a reader must not depend on the order."""
    messages: list[tuple[str, Any, int]] = []
    for i in range(count):
        stamp = (i + 1) * 100 * MS
        rgb = np.full((6, 8, 3), i, np.uint8)
        depth = np.full((6, 8), 1000 + i, np.uint16)
        messages.append(("/camera/color/image_raw", image(stamp, rgb, "rgb8"), stamp))
        messages.append(("/camera/depth/image_raw", image(stamp, depth, "16UC1"), stamp))
        messages.append(("/camera/color/camera_info", info(stamp), stamp))
        messages += [(topic, message, stamp) for topic, message in pose_messages(source, stamp, float(i))]
    return messages
