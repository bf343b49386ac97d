# SPDX-License-Identifier: Apache-2.0
"""sensor_msgs/PointCloud2 to frames. No ROS is needed: the same code reads rclpy's messages and those of a bag reader.

Three kinds of clouds are understood: an organised coloured cloud is a whole RGB-D frame, a cloud beside a camera gives
the depth of its image, and a coloured cloud alone is drawn into the pictures of virtual cameras.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.inputs.conversions import Camera, ConversionError, check_picture, check_size
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.registration import z_buffer
from adatoken3d_ros.text import quoted

try:  # part of a ROS installation; there is no wheel of it
    from sensor_msgs_py.point_cloud2 import read_points
except ImportError:
    read_points = None

MAX_POINTS = 4_000_000  # a larger cloud is refused before it is read
MAX_STEP = 1024  # bytes of one point
BLOCK = 16384  # points that are moved at a time
# sensor_msgs/PointField datatype -> numpy, without its byte order
DATATYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
BRIGHTEST = 99.0  # percentile of the intensities that is drawn white

# Pixels by which the points of an organised cloud may lie beside the pixels that its camera gives them (median).
PINHOLE_PIXELS = 2.0

# Virtual cameras: square pictures of 90 degrees, four of them see everything around but floor and ceiling close by.
VIRTUAL_SIZE = 336
VIRTUAL_VIEWS = 4
VIRTUAL_SHARE = 0.05  # of a virtual picture that must show something
SAMPLE = 4096  # points of a cloud that tell which virtual cameras see something, drawn into
SAMPLE_SIZE = 16  # so many pixels square
EYE_HEIGHT = 1.5  # metres above the lowest points, for cameras that look at a map


@dataclass(frozen=True, eq=False)
class Cloud:
    """A cloud as arrays.

    Attributes:
        xyz: (N, 3) float32, metres, the cloud's frame; not finite where nothing was measured. N = height * width, rows
            of the message one after the other.
        rgb: (N, 3) uint8, or None where the cloud has neither colour nor intensity.
        height, width: of the message; height 1 for a cloud that is not organised.
    """

    xyz: NDArray[np.float32]
    rgb: NDArray[np.uint8] | None
    height: int
    width: int


def read_cloud(msg: Any) -> Cloud:
    """sensor_msgs/PointCloud2 to arrays: any order, padding and byte order of fields.

    Ordinary messages are read by sensor_msgs_py where ROS provides it.

    x, y and z are float32 or float64. Colour is the first there is of `rgb` and `rgba` (0x..RRGGBB in any 32 bit
    type), `r` `g` `b` (uint8), and `intensity`, in grey; the BRIGHTEST percentile of the cloud is white.

    Raises:
        ConversionError: for a cloud that is empty or too large, for missing or wrong fields, and for sizes, steps and
            data that disagree.
    """
    width, height, step, row_step = int(msg.width), int(msg.height), int(msg.point_step), int(msg.row_step)
    if width <= 0 or height <= 0:
        raise ConversionError(f"the cloud is empty: {width}x{height} points")
    if width * height > MAX_POINTS:
        raise ConversionError(f"the cloud has {width * height} points, more than {MAX_POINTS}")
    if not 0 < step <= MAX_STEP:
        raise ConversionError(f"the cloud's point_step {step} is not between 1 and {MAX_STEP} bytes")
    if row_step < width * step:
        raise ConversionError(f"the cloud's row_step {row_step} is too small for {width} points of {step} bytes")
    data = np.frombuffer(msg.data, np.uint8)
    if data.size != row_step * height:
        raise ConversionError(
            f"the cloud has {data.size} bytes of data, row_step {row_step} times {height} rows are {row_step * height}"
        )
    fields = {str(field.name): field for field in msg.fields}
    if len(fields) != len(msg.fields):
        raise ConversionError(
            f"the cloud has two fields of one name: {quoted([str(field.name) for field in msg.fields])}"
        )
    order = ">" if msg.is_bigendian else "<"
    by_ros = read_points is not None and _is_ordinary(msg)

    def column(name: str, kinds: str, read_as: str = "") -> NDArray[Any]:
        field = fields[name]
        kind = DATATYPES.get(int(field.datatype), "")
        # A count of 0 is what publishers leave that do not know of it.
        if not kind or kind not in kinds.split() or int(field.count) > 1:
            raise ConversionError(
                f"the cloud's field {quoted(name)} has datatype {field.datatype} and count {field.count}; "
                f"one of {kinds} is needed"
            )
        dtype, offset = np.dtype(order + (read_as or kind)), int(field.offset)
        if offset < 0 or offset + dtype.itemsize > step:
            raise ConversionError(f"the cloud's field {name!r} at offset {offset} is outside of point_step {step}")
        if by_ros:
            return np.asarray(read_points(msg, field_names=[name])[name]).view(dtype)
        return np.ndarray((height, width), dtype, data.data, offset, (row_step, step)).reshape(-1)

    missing = [name for name in "xyz" if name not in fields]
    if missing:
        raise ConversionError(
            f"the cloud has no field {', '.join(missing)}; it has {quoted(list(fields)) if fields else 'none'}"
        )
    # Column after column: all that is done with points is done with one coordinate after the other.
    xyz = np.empty((3, width * height), np.float32).T
    with np.errstate(over="ignore", invalid="ignore"):
        for i, name in enumerate("xyz"):
            xyz[:, i] = column(name, "f4 f8")
    rgb: NDArray[np.uint8] | None = None
    packed = next((name for name in ("rgb", "rgba") if name in fields), "")
    if packed:
        bits = column(packed, "f4 u4 i4", "u4").astype(np.uint32)
        rgb = np.stack([(bits >> shift & 255).astype(np.uint8) for shift in (16, 8, 0)], axis=1)
    elif all(name in fields for name in "rgb"):
        rgb = np.stack([column(name, "u1") for name in "rgb"], axis=1)
    elif "intensity" in fields:
        rgb = _grey(column("intensity", " ".join(DATATYPES.values())))
    return Cloud(xyz, rgb, height, width)


def _is_ordinary(msg: Any) -> bool:
    """Whether sensor_msgs_py reads it right: it takes rclpy's class alone, knows no padding behind a row, fails at any
    field that is wrong, and swaps bytes in the message itself."""
    sizes = [np.dtype(DATATYPES.get(int(field.datatype), "V0")).itemsize for field in msg.fields]
    return (
        type(msg).__module__.startswith("sensor_msgs.")
        and not msg.is_bigendian
        and msg.row_step == msg.width * msg.point_step
        and all(int(field.count) == 1 and size > 0 for field, size in zip(msg.fields, sizes, strict=True))
        and all(field.offset + size <= msg.point_step for field, size in zip(msg.fields, sizes, strict=True))
    )


def organised_frame(
    cloud: Cloud, camera: Camera | None, T_world_camera: NDArray[np.float64], stamp_ns: int
) -> PosedFrame:
    """The RGB-D frame that an organised coloured cloud in the camera's optical frame is.

    Args:
        camera: of the image that the cloud was made from; None: the pinhole camera that fits the points best.

    Raises:
        ConversionError: for a cloud that is not organised or has no colour, for one of another size than the camera's
            image, and where the points do not lie on the pixels' rays.
    """
    if cloud.height < 2 or cloud.width < 2:
        raise ConversionError(
            f"the cloud of {cloud.width}x{cloud.height} points is not organised as an image: set input.source to "
            "'points' or 'points_with_camera'"
        )
    check_picture(cloud.width, cloud.height)
    rgb = _coloured(cloud)
    z = cloud.xyz[:, 2]
    depth = np.where(_finite(cloud.xyz) & (z > 0), z, np.float32(np.nan))
    shape = cloud.height, cloud.width
    if camera is not None:
        check_size("organised cloud's", shape, camera)
    K = _fit_pinhole(cloud, depth) if camera is None else camera.K
    _check_pinhole(cloud, depth, K, "fits best" if camera is None else "its CameraInfo tells")
    return PosedFrame(rgb.reshape(*shape, 3), depth.reshape(shape), K, T_world_camera, stamp_ns)


def cloud_depth(
    cloud: Cloud, K: NDArray[np.float64], T_camera_cloud: NDArray[np.float64], width: int, height: int
) -> NDArray[np.float32]:
    """The depth that a cloud gives an image: (height, width) float32 metres, NaN where no point is near a pixel.

    Each point is drawn as a square; the fewer points fall into the image, the larger, so that the squares about touch
    and what is near hides what is behind it.
    """
    return z_buffer(_moved(cloud.xyz, T_camera_cloud), K, width, height, radius=None)[0]


def virtual_cameras(
    cloud: Cloud, T_world_cloud: NDArray[np.float64], *, is_map: bool = False
) -> list[NDArray[np.float64]]:
    """Poses (4, 4) of virtual cameras to draw a coloured cloud from, those that see the most first; at least one.

    The cameras look level, in four directions. They stand at the sensor (the cloud frame's origin); around a map, which
    has no sensor, they stand in the middle of its sides and look inwards. Cameras that see something in less than
    VIRTUAL_SHARE of their picture are left out, except for the best one. A sample of the points tells, so that this
    takes a fraction of what drawing takes.

    Args:
        is_map: the cloud was not taken from one place.

    Raises:
        ConversionError: if the cloud has no colour or no finite point.
    """
    _coloured(cloud)
    rows = np.flatnonzero(_finite(cloud.xyz))
    if not len(rows):
        raise ConversionError(f"none of the cloud's {len(cloud.xyz)} points is finite")
    if len(rows) > SAMPLE:
        # At random (and always the same): regular steps could hit one ring of a lidar alone.
        rows = rows[np.random.default_rng(0).integers(len(rows), size=SAMPLE)]
    xyz = _moved(cloud.xyz[rows], T_world_cloud)
    K = _square_camera(SAMPLE_SIZE)
    cameras = _cameras_around(xyz) if is_map else _cameras_at(T_world_cloud[:3, 3])
    seen = [z_buffer(_moved(xyz, _inverse(T)), K, SAMPLE_SIZE, SAMPLE_SIZE)[1] >= 0 for T in cameras]
    shares = [float(pixels.mean()) for pixels in seen]
    order = sorted(range(len(cameras)), key=lambda i: -shares[i])
    return [cameras[i] for rank, i in enumerate(order) if rank == 0 or shares[i] >= VIRTUAL_SHARE]


def draw_cloud(
    cloud: Cloud, T_world_cloud: NDArray[np.float64], T_world_camera: NDArray[np.float64], stamp_ns: int
) -> PosedFrame:
    """The picture, VIRTUAL_SIZE pixels square, that a virtual camera of 90 degrees has of a coloured cloud.

    Raises:
        ConversionError: if the cloud has no colour.
    """
    rgb = _coloured(cloud)
    K = _square_camera(VIRTUAL_SIZE)
    xyz = _moved(cloud.xyz, _inverse(T_world_camera) @ T_world_cloud)
    depth, index = z_buffer(xyz, K, VIRTUAL_SIZE, VIRTUAL_SIZE, radius=None)
    picture = np.take(rgb, index, axis=0, mode="wrap")
    picture[index < 0] = 0
    return PosedFrame(picture, depth, K, T_world_camera, stamp_ns)


def _square_camera(size: int) -> NDArray[np.float64]:
    """K (3, 3) of a picture of `size` pixels square and 90 degrees."""
    f, c = size / 2, (size - 1) / 2
    return np.array([[f, 0, c], [0, f, c], [0, 0, 1]])


def _cameras_at(position: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Level cameras at one place that look along +x, +y, -x and -y."""
    return [_level_camera(position, 2 * math.pi * i / VIRTUAL_VIEWS) for i in range(VIRTUAL_VIEWS)]


def _cameras_around(xyz: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """Level cameras in the middle of the sides of the box that holds 90 % of the points along each axis."""
    low, high = np.percentile(xyz.astype(np.float64), (5, 95), axis=0)
    middle = (low + high) / 2
    middle[2] = min(low[2] + EYE_HEIGHT, high[2])
    cameras = []
    for i in range(VIRTUAL_VIEWS):
        yaw = 2 * math.pi * i / VIRTUAL_VIEWS
        back = np.array([math.cos(yaw), math.sin(yaw), 0.0])
        cameras.append(_level_camera(middle - back * (high - low) / 2, yaw))
    return cameras


def _level_camera(position: NDArray[np.float64], yaw: float) -> NDArray[np.float64]:
    """(4, 4) optical frame in a world with z up: forward turned by `yaw` radians from x, right level, down is -z."""
    c, s = math.cos(yaw), math.sin(yaw)
    T = np.eye(4)
    T[:3, :3] = np.array([[s, 0.0, c], [-c, 0.0, s], [0.0, -1.0, 0.0]])
    T[:3, 3] = position
    return T


def _moved(xyz: NDArray[np.float32], T: NDArray[np.float64]) -> NDArray[np.float32]:
    """(N, 3) points through T (4, 4), in float64, as many at a time as the processor's cache holds."""
    columns, moved = xyz.T, np.empty(xyz.shape[::-1], np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, len(xyz), BLOCK):
            block = slice(first, first + BLOCK)
            moved[:, block] = T[:3, :3] @ columns[:, block].astype(np.float64) + T[:3, 3:]
    return moved.T


def _finite(xyz: NDArray[np.float32]) -> NDArray[np.bool_]:
    return np.isfinite(xyz[:, 0]) & np.isfinite(xyz[:, 1]) & np.isfinite(xyz[:, 2])


def _inverse(T: NDArray[np.float64]) -> NDArray[np.float64]:
    inverse = np.eye(4)
    inverse[:3, :3] = T[:3, :3].T
    inverse[:3, 3] = -T[:3, :3].T @ T[:3, 3]
    return inverse


def _coloured(cloud: Cloud) -> NDArray[np.uint8]:
    if cloud.rgb is None:
        raise ConversionError("the cloud has no colour: none of the fields rgb, rgba, r g b and intensity")
    return cloud.rgb


def _grey(intensity: NDArray[Any]) -> NDArray[np.uint8]:
    values = intensity.astype(np.float64)
    finite = np.isfinite(values)
    top = np.percentile(values[finite], BRIGHTEST) if finite.any() else 0.0
    grey = np.where(finite, values, 0.0) * (255.0 / top if top > 0 else 0.0)
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[:, None], 3, axis=1)


def _measured(cloud: Cloud, depth: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Rows with a depth, at most some thousands spread evenly, and their rays (x / z, y / z)."""
    rows = np.flatnonzero(depth > 0)
    rows = rows[:: max(1, len(rows) // 5000)]
    return rows, cloud.xyz[rows, :2].astype(np.float64) / cloud.xyz[rows, 2:]


def _fit_pinhole(cloud: Cloud, depth: NDArray[np.float32]) -> NDArray[np.float64]:
    """K (3, 3) by least squares of column = fx x / z + cx and row = fy y / z + cy."""
    rows, rays = _measured(cloud, depth)
    K = np.eye(3)
    for axis, pixel in enumerate((rows % cloud.width, rows // cloud.width)):
        if not len(rows) or np.ptp(pixel) == 0 or np.ptp(rays[:, axis]) == 0:
            raise ConversionError(
                f"the organised cloud has {len(rows)} measured points, too few to tell its camera: connect CameraInfo"
            )
        slope, offset = np.polyfit(rays[:, axis], pixel, 1)
        K[axis, axis], K[axis, 2] = slope, offset
    return K


def _check_pinhole(cloud: Cloud, depth: NDArray[np.float32], K: NDArray[np.float64], which: str) -> None:
    rows, rays = _measured(cloud, depth)
    if not len(rows):
        return
    u, v = K[0, 0] * rays[:, 0] + K[0, 2], K[1, 1] * rays[:, 1] + K[1, 2]
    beside = float(np.median(np.hypot(u - rows % cloud.width, v - rows // cloud.width)))
    if not beside <= PINHOLE_PIXELS or K[0, 0] <= 0 or K[1, 1] <= 0:
        raise ConversionError(
            f"the organised cloud is not the image of the camera that {which}: its points are {beside:.3g} pixels "
            f"beside their own (median), K = {np.round(K, 3).reshape(-1).tolist()}; is it in the optical frame?"
        )
