# SPDX-License-Identifier: Apache-2.0
"""Messages to numpy. No ROS import: the same code reads rclpy's messages and those of a bag reader.

Every function takes a message by its fields (duck typing), reads without copying where the layout allows it, and raises
ConversionError, which names the offending value, for anything that it cannot read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene import frames
from adatoken3d_ros.settings import QUATERNION_TOLERANCE
from adatoken3d_ros.text import quoted


class ConversionError(ValueError):
    """A message that cannot be used; the text names the offending value."""


# encoding -> (channels, the order that makes RGB of them)
COLOUR_ENCODINGS: dict[str, tuple[int, tuple[int, int, int]]] = {
    "rgb8": (3, (0, 1, 2)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}
# encoding -> (dtype without its byte order, metres for one unit); REP 118
DEPTH_ENCODINGS: dict[str, tuple[str, float]] = {
    "16UC1": ("u2", 0.001),
    "mono16": ("u2", 0.001),
    "32FC1": ("f4", 1.0),
}
# distortion model -> numbers of coefficients that it may have
DISTORTION_MODELS: dict[str, tuple[int, ...]] = {
    "plumb_bob": (4, 5),
    "rational_polynomial": (8, 12, 14),
    "equidistant": (4,),
}
MAX_COEFFICIENTS = max(max(counts) for counts in DISTORTION_MODELS.values())


def stamp_to_ns(stamp: Any) -> int:
    """builtin_interfaces/Time to nanoseconds."""
    return int(stamp.sec) * 1_000_000_000 + int(stamp.nanosec)


def image_to_rgb(msg: Any) -> NDArray[np.uint8]:
    """sensor_msgs/Image to (H, W, 3) uint8 RGB; a view of the message's own buffer for unpadded and padded rgb8.

    Raises:
        ConversionError: for an unknown encoding, an image that is empty or beyond the limits, or a size, step and data
            length that disagree.
    """
    channels, order = _colour(msg)
    pixels = _rows(msg, channels).reshape(int(msg.height), int(msg.width), channels)
    if msg.encoding == "rgb8":
        return pixels
    return np.ascontiguousarray(pixels[:, :, list(order)])


def depth_to_metres(msg: Any) -> NDArray[np.float32]:
    """sensor_msgs/Image to (H, W) float32 metres, NaN where there is no measurement (REP 117 and 118).

    The unit comes from the encoding: 16UC1 and mono16 are millimetres, 32FC1 metres. Zero, negative, non-finite and
    saturated (65535) values become NaN.

    Raises:
        ConversionError: for an unknown encoding, an image that is empty or beyond the limits, or a size, step and data
            length that disagree.
    """
    dtype, unit = _depth(msg)
    rows = np.ascontiguousarray(_rows(msg, dtype.itemsize))
    return to_metres(rows.view(dtype).reshape(int(msg.height), int(msg.width)), unit)


def to_metres(values: NDArray[Any], unit: float) -> NDArray[np.float32]:
    """Any depths to float32 metres; zero, negative, non-finite and saturated (the largest integer) ones to NaN."""
    # Dividing by 1000 rounds correctly, multiplying by 0.001 does not.
    metres = values.astype(np.float32) if unit == 1.0 else values.astype(np.float32) / np.float32(1.0 / unit)
    metres[~(metres > 0) | np.isinf(metres)] = np.nan
    if values.dtype.kind == "u":
        metres[values == np.iinfo(values.dtype).max] = np.nan
    return metres


def image_size(msg: Any) -> tuple[int, int]:
    """(H, W) of an Image that `image_to_rgb` reads, without touching a pixel. Raises ConversionError as that does."""
    channels, _ = _colour(msg)
    return _rows(msg, channels).shape[0], int(msg.width)


def depth_size(msg: Any) -> tuple[int, int]:
    """(H, W) of an Image that `depth_to_metres` reads; as `image_size`."""
    dtype, _ = _depth(msg)
    return _rows(msg, dtype.itemsize).shape[0], int(msg.width)


def check_picture(width: int, height: int) -> None:
    """Raises ConversionError for a size beyond the limits of `scene.frames`."""
    try:
        frames.check_size(width, height)
    except frames.FrameError as error:
        raise ConversionError(str(error)) from error


@dataclass(frozen=True, eq=False)
class Camera:
    """The camera of an image as it was sent, binning and region of interest applied.

    Attributes:
        K: (3, 3) float64 pinhole matrix, pixels.
        D: (n,) float64 distortion coefficients; empty when the image is rectified.
        model: name of the distortion model, as in sensor_msgs/CameraInfo.
        width, height: size of the image that it belongs to, pixels.
    """

    K: NDArray[np.float64]
    D: NDArray[np.float64]
    model: str
    width: int
    height: int


def camera_info_to_camera(msg: Any, *, rectified: bool = False) -> Camera:
    """sensor_msgs/CameraInfo to the camera of the image as it was sent.

    The matrices of the message belong to the full sensor; the region of interest moves the principal point and binning
    scales everything, in that order (as the message's definition says).

    Args:
        msg: the message.
        rectified: the images were rectified before: use P and no distortion.

    Raises:
        ConversionError: for an uncalibrated camera (K[0] = 0), a non-finite number, an unknown distortion model, and
            what no camera can be (see the limits of `scene.frames`).
    """
    name = "P" if rectified else "K"
    values = np.asarray(msg.p if rectified else msg.k, dtype=np.float64)
    if values.size != (12 if rectified else 9):
        raise ConversionError(f"CameraInfo {name} has {values.size} numbers")
    K = values.reshape(3, -1)[:, :3].copy()
    if not np.isfinite(K).all():
        raise ConversionError(f"CameraInfo {name} = {values.tolist()} is not finite")
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ConversionError(
            f"CameraInfo is not calibrated: focal lengths {name}[0] = {K[0, 0]}, {name}[{5 if rectified else 4}] = "
            f"{K[1, 1]} must be positive"
        )
    binning = max(1, int(msg.binning_x)), max(1, int(msg.binning_y))
    roi = msg.roi
    full = (int(roi.width) or int(msg.width), int(roi.height) or int(msg.height))
    width, height = full[0] // binning[0], full[1] // binning[1]
    if width <= 0 or height <= 0:
        raise ConversionError(f"CameraInfo describes an image of {width}x{height} pixels")
    K[0, 2] -= int(roi.x_offset)
    K[1, 2] -= int(roi.y_offset)
    K[0] /= binning[0]
    K[1] /= binning[1]
    K[2] = (0.0, 0.0, 1.0)
    try:
        frames.check_size(width, height)
        frames.check_intrinsics(K, width, height)
    except frames.FrameError as error:
        raise ConversionError(f"CameraInfo {name}: {error}") from error
    D = np.zeros(0) if rectified else _distortion(msg)
    return Camera(K, D, msg.distortion_model, width, height)


def check_size(what: str, shape: Sequence[int], camera: Camera) -> None:
    """Raises ConversionError unless an image of `shape` (H, W, ...) has the size that its CameraInfo tells."""
    if (shape[0], shape[1]) != (camera.height, camera.width):
        raise ConversionError(
            f"the {what} image is {shape[1]}x{shape[0]} but its CameraInfo describes {camera.width}x{camera.height}"
        )


def rectify_rgb(rgb: NDArray[np.uint8], camera: Camera) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 without the camera's distortion, interpolated bilinearly; as it is when D is empty.

    Afterwards `camera.K` alone describes it.
    """
    if camera.D.size == 0:
        return rgb
    return cv2.remap(rgb, *_undistortion(camera), cv2.INTER_LINEAR)  # type: ignore[return-value]


def rectify_depth(depth: NDArray[np.float32], camera: Camera) -> NDArray[np.float32]:
    """(H, W) float32 metres with NaN without the camera's distortion; as it is when D is empty.

    Each pixel is the nearest one's: depths across an edge must not be mixed.
    """
    if camera.D.size == 0:
        return depth
    maps = _undistortion(camera)
    return cv2.remap(  # type: ignore[return-value]
        depth, *maps, cv2.INTER_NEAREST, borderMode=cv2.BORDER_CONSTANT, borderValue=np.nan
    )


def _undistortion(camera: Camera) -> tuple[Any, Any]:
    return _undistortion_maps(camera.model, camera.K.tobytes(), camera.D.tobytes(), camera.width, camera.height)


@lru_cache(maxsize=2)  # colour and depth of one camera: the maps cost more than using them
def _undistortion_maps(model: str, k: bytes, d: bytes, width: int, height: int) -> tuple[Any, Any]:
    K, D = np.frombuffer(k).reshape(3, 3), np.frombuffer(d)
    undistort = cv2.fisheye if model == "equidistant" else cv2
    return undistort.initUndistortRectifyMap(K, D, np.eye(3), K, (width, height), cv2.CV_32FC1)


def quaternion_to_rotation(x: float, y: float, z: float, w: float) -> NDArray[np.float64]:
    """Rotation matrix (3, 3) of a unit quaternion; small rounding is normalised away.

    Raises:
        ConversionError: for a quaternion that is not finite or whose length differs from 1 by more than 0.02.
    """
    length = math.hypot(x, y, z, w)
    if not abs(length - 1.0) <= QUATERNION_TOLERANCE:
        raise ConversionError(f"quaternion ({x}, {y}, {z}, {w}) has length {length:.4g}, not 1")
    x, y, z, w = x / length, y / length, z / length, w / length
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def pose_to_matrix(pose: Any) -> NDArray[np.float64]:
    """geometry_msgs/Pose to a (4, 4) float64 matrix.

    Raises:
        ConversionError: for a pose that is not rigid, or farther away than `scene.frames.MAX_POSITION`.
    """
    T = _matrix(pose.position, pose.orientation)
    try:
        frames.check_position(T[:3, 3])
    except frames.FrameError as error:
        raise ConversionError(str(error)) from error
    return T


def transform_to_matrix(transform: Any) -> NDArray[np.float64]:
    """geometry_msgs/Transform to a (4, 4) float64 matrix. Raises ConversionError for one that is not rigid.

    It may be long: only where it leads in the end has to be near the scene's origin.
    """
    return _matrix(transform.translation, transform.rotation)


def _colour(msg: Any) -> tuple[int, tuple[int, int, int]]:
    """Channels of a colour image, and the order that makes RGB of them."""
    if msg.encoding not in COLOUR_ENCODINGS:
        raise ConversionError(f"colour encoding {quoted(msg.encoding)} is not one of {', '.join(COLOUR_ENCODINGS)}")
    return COLOUR_ENCODINGS[msg.encoding]


def _depth(msg: Any) -> tuple[np.dtype[Any], float]:
    """The number type of a depth image, and metres for one unit."""
    if msg.encoding not in DEPTH_ENCODINGS:
        raise ConversionError(f"depth encoding {quoted(msg.encoding)} is not one of {', '.join(DEPTH_ENCODINGS)}")
    kind, unit = DEPTH_ENCODINGS[msg.encoding]
    return np.dtype((">" if msg.is_bigendian else "<") + kind), unit


def _rows(msg: Any, pixel_bytes: int) -> NDArray[np.uint8]:
    """The picture's bytes (H, W * pixel_bytes) uint8 without the padding of its rows; a view."""
    width, height, step = int(msg.width), int(msg.height), int(msg.step)
    check_picture(width, height)
    if step < width * pixel_bytes:
        raise ConversionError(
            f"step {step} is too small for {width} pixels of {msg.encoding} ({width * pixel_bytes} bytes)"
        )
    data = np.frombuffer(msg.data, np.uint8)
    if data.size != step * height:
        raise ConversionError(
            f"the {width}x{height} {msg.encoding} image has {data.size} bytes of data, step {step} times {height} rows "
            f"are {step * height}"
        )
    return data.reshape(height, step)[:, : width * pixel_bytes]


def _distortion(msg: Any) -> NDArray[np.float64]:
    """The coefficients that do something: empty for none or all zeros."""
    D = np.asarray(msg.d, dtype=np.float64)
    if D.size > MAX_COEFFICIENTS:
        raise ConversionError(f"CameraInfo D has {D.size} coefficients, more than {MAX_COEFFICIENTS}")
    if not np.isfinite(D).all():
        raise ConversionError(f"CameraInfo D = {D.tolist()} is not finite")
    if not D.any():
        return np.zeros(0)
    allowed = DISTORTION_MODELS.get(msg.distortion_model)
    if allowed is None:
        known = ", ".join(DISTORTION_MODELS)
        raise ConversionError(f"distortion model {quoted(msg.distortion_model)} is not one of {known}")
    if D.size not in allowed:
        raise ConversionError(f"distortion model {quoted(msg.distortion_model)} with {D.size} coefficients")
    return D


def _matrix(position: Any, orientation: Any) -> NDArray[np.float64]:
    T = np.eye(4)
    T[:3, 3] = (position.x, position.y, position.z)
    if not np.isfinite(T[:3, 3]).all():
        raise ConversionError(f"position ({position.x}, {position.y}, {position.z}) is not finite")
    T[:3, :3] = quaternion_to_rotation(orientation.x, orientation.y, orientation.z, orientation.w)
    return T
