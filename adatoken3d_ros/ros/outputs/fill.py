# SPDX-License-Identifier: Apache-2.0
"""Numpy to messages, by their fields: the same code fills rclpy's messages and those of a bag writer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def ns_to_stamp(stamp: Any, stamp_ns: int) -> Any:
    """Fills a builtin_interfaces/Time from nanoseconds and returns it."""
    stamp.sec, stamp.nanosec = divmod(int(stamp_ns), 1_000_000_000)
    return stamp


def rotation_to_quaternion(R: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Unit quaternion (x, y, z, w) of a rotation matrix (3, 3), w >= 0 (Shepperd's largest-component rule)."""
    diagonal = R[0, 0], R[1, 1], R[2, 2]
    trace = sum(diagonal)
    candidates = np.array([1 + 2 * d - trace for d in diagonal] + [1 + trace]) / 4.0
    largest = int(np.argmax(candidates))
    main = float(np.sqrt(max(candidates[largest], 0.0)))
    symmetric = {(0, 1): R[0, 1] + R[1, 0], (0, 2): R[0, 2] + R[2, 0], (1, 2): R[1, 2] + R[2, 1]}
    skew = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    q = np.empty(4)
    for i in range(4):
        if i == largest:
            q[i] = main
        elif i == 3 or largest == 3:
            q[i] = skew[min(i, largest)] / (4 * main)
        else:
            q[i] = symmetric[min(i, largest), max(i, largest)] / (4 * main)
    q /= np.sqrt(q @ q)
    x, y, z, w = (float(v) for v in (q if q[3] >= 0 else -q))
    return x, y, z, w


def fill_pose(pose: Any, T: NDArray[np.float64]) -> Any:
    """Fills a geometry_msgs/Pose from a rigid (4, 4) matrix and returns it."""
    pose.position.x, pose.position.y, pose.position.z = (float(v) for v in T[:3, 3])
    q = pose.orientation
    q.x, q.y, q.z, q.w = rotation_to_quaternion(T[:3, :3])
    return pose


def fill_image(msg: Any, pixels: NDArray[Any], encoding: str) -> Any:
    """Fills a fresh sensor_msgs/Image from (H, W) or (H, W, C) pixels with one copy and returns it; the header stays.

    Args:
        msg: a new message.
        pixels: uint8 for the 8 bit encodings, uint16 (mm) for 16UC1, float32 (m) for 32FC1.
        encoding: one of COLOUR_ENCODINGS or DEPTH_ENCODINGS.
    """
    pixels = np.ascontiguousarray(pixels)
    msg.height, msg.width = int(pixels.shape[0]), int(pixels.shape[1])
    msg.encoding = encoding
    msg.is_bigendian = 0
    msg.step = int(pixels.nbytes // pixels.shape[0])
    msg.data.frombytes(pixels.data.cast("B"))
    return msg


def fill_camera_info(msg: Any, K: NDArray[np.float64], width: int, height: int) -> Any:
    """Fills a sensor_msgs/CameraInfo of a rectified camera and returns it; the header stays."""
    msg.width, msg.height = int(width), int(height)
    msg.distortion_model = "plumb_bob"
    msg.d = [0.0] * 5
    msg.k = [float(v) for v in K.reshape(-1)]
    msg.r = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    msg.p = [float(v) for v in np.hstack([K, np.zeros((3, 1))]).reshape(-1)]
    return msg
