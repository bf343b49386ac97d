# SPDX-License-Identifier: Apache-2.0
"""Bags for benchmarks: posed frames as the messages of a camera and of whoever knows where it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from adatoken3d_ros.scene.frames import PosedFrame


def write_bag(path: Path, frames: Iterable[PosedFrame], kind: str = "mcap") -> Path:
    """Writes /rgb, /depth (millimetres), /camera_info and /pose (in `map`) of each frame; returns `path`.

    Args:
        path: the bag's folder, which must not exist.
        frames: each with the stamp of its four messages.
        kind: how the bag is stored, `mcap` or `sqlite3`.
    """
    from rosbags.rosbag2 import StoragePlugin, Writer
    from rosbags.typesys import Stores, get_typestore

    store = get_typestore(Stores.ROS2_KILTED)
    types = store.types

    def header(stamp: int, frame: str) -> Any:
        return types["std_msgs/msg/Header"](types["builtin_interfaces/msg/Time"](*divmod(stamp, 10**9)), frame)

    def picture(stamp: int, encoding: str, pixels: Any) -> Any:
        height, width = pixels.shape[:2]
        data = np.ascontiguousarray(pixels).view(np.uint8).reshape(-1)
        parts = height, width, encoding, 0, data.size // height, data
        return types["sensor_msgs/msg/Image"](header(stamp, "camera"), *parts)

    def calibration(frame: PosedFrame) -> Any:
        roi = types["sensor_msgs/msg/RegionOfInterest"](0, 0, 0, 0, False)
        height, width = frame.depth.shape
        parts = height, width, "plumb_bob", np.zeros(5), frame.K.reshape(-1), np.eye(3).reshape(-1), np.zeros(12)
        return types["sensor_msgs/msg/CameraInfo"](header(frame.stamp_ns, "camera"), *parts, 0, 0, roi)

    def pose(stamp: int, T: Any) -> Any:
        at = types["geometry_msgs/msg/Point"](*(float(x) for x in T[:3, 3]))
        turn = Rotation.from_matrix(T[:3, :3]).as_quat()
        turned = types["geometry_msgs/msg/Quaternion"](*(float(x) for x in turn))
        return types["geometry_msgs/msg/PoseStamped"](header(stamp, "map"), types["geometry_msgs/msg/Pose"](at, turned))

    plugin = StoragePlugin.MCAP if kind == "mcap" else StoragePlugin.SQLITE3
    with Writer(path, version=9, storage_plugin=plugin) as writer:
        connections: dict[str, Any] = {}
        for frame in frames:
            stamp = frame.stamp_ns
            for topic, message in (
                ("/rgb", picture(stamp, "rgb8", frame.rgb)),
                ("/depth", picture(stamp, "16UC1", np.rint(1000 * np.nan_to_num(frame.depth)).astype("<u2"))),
                ("/camera_info", calibration(frame)),
                ("/pose", pose(stamp, frame.T_world_camera)),
            ):
                if topic not in connections:
                    connections[topic] = writer.add_connection(topic, message.__msgtype__, typestore=store)
                writer.write(connections[topic], stamp, store.serialize_cdr(message, message.__msgtype__))
    return path
