# SPDX-License-Identifier: Apache-2.0
"""Messages by their fields alone, as the conversions read them."""

from __future__ import annotations

import array
import struct
import zlib
from types import SimpleNamespace
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from adatoken3d_ros.ros.inputs.compressed import PNG_SIGNATURE
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp, rotation_to_quaternion

MS = 1_000_000


def at(x: float, yaw_degrees: float = 0.0) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("z", yaw_degrees, degrees=True).as_matrix()
    T[0, 3] = x
    return T


def pose_message(stamp_ns: int, T: np.ndarray, frame: str = "map") -> Any:
    q = rotation_to_quaternion(T[:3, :3])
    pose = SimpleNamespace(
        position=SimpleNamespace(x=T[0, 3], y=T[1, 3], z=T[2, 3]),
        orientation=SimpleNamespace(x=q[0], y=q[1], z=q[2], w=q[3]),
    )
    header = SimpleNamespace(stamp=ns_to_stamp(SimpleNamespace(), stamp_ns), frame_id=frame)
    return SimpleNamespace(header=header, pose=pose)


def transform(stamp_ns: int, parent: str, child: str, T: np.ndarray) -> Any:
    message = pose_message(stamp_ns, T, parent)
    parts = SimpleNamespace(translation=message.pose.position, rotation=message.pose.orientation)
    return SimpleNamespace(header=message.header, child_frame_id=child, transform=parts)


def image(encoding: str, width: int, height: int, step: int, data: bytes, big: int = 0) -> Any:
    return SimpleNamespace(
        encoding=encoding, width=width, height=height, step=step, data=array.array("B", data), is_bigendian=big
    )


def info(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "header": SimpleNamespace(frame_id=""),
        "width": 640,
        "height": 480,
        "distortion_model": "plumb_bob",
        "d": [0.0] * 5,
        "k": [500.0, 0.0, 320.0, 0.0, 510.0, 240.0, 0.0, 0.0, 1.0],
        "p": [400.0, 0.0, 310.0, 0.0, 0.0, 410.0, 230.0, 0.0, 0.0, 0.0, 1.0, 0.0],
        "binning_x": 0,
        "binning_y": 0,
        "roi": SimpleNamespace(x_offset=0, y_offset=0, width=0, height=0),
    }
    return SimpleNamespace(**{**fields, **changes})


def cloud_message(rgb: np.ndarray, depth: np.ndarray, K: np.ndarray) -> Any:
    """An organised PointCloud2 of a colour (H, W, 3) and a depth image (H, W), metres; padding between z and rgb."""
    height, width = depth.shape
    v, u = np.mgrid[:height, :width]
    points = np.zeros((height, width), np.dtype([("xyz", "<f4", 3), ("pad", "<u4"), ("rgb", "<u4")]))
    points["xyz"] = np.stack([u - K[0, 2], v - K[1, 2], np.ones_like(depth)], -1) / (K[0, 0], K[1, 1], 1)
    points["xyz"] *= depth[..., None]
    red, green, blue = (rgb[..., i].astype(np.uint32) for i in range(3))
    points["rgb"] = red << 16 | green << 8 | blue
    fields = [("x", 0), ("y", 4), ("z", 8), ("rgb", 16)]
    return SimpleNamespace(
        header=SimpleNamespace(frame_id="camera"),
        width=width,
        height=height,
        point_step=20,
        row_step=20 * width,
        fields=[SimpleNamespace(name=name, offset=at, datatype=7, count=1) for name, at in fields],
        is_bigendian=False,
        is_dense=False,
        data=array.array("B", points.tobytes()),
    )


def png_of(width: int, height: int, *, bits: int = 8) -> bytes:
    """A whole png of zeros in some kilobytes, whatever its size; made without its pixels ever being in memory."""
    pack = zlib.compressobj(9)
    row = bytes(1 + width * bits // 8)
    packed = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return PNG_SIGNATURE + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
