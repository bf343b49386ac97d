# SPDX-License-Identifier: Apache-2.0
"""Images of either transport to numpy: raw ones by `conversions`, compressed ones here. No ROS import.

What a compressed image would take is read off its first bytes: 48 kB of png can be 20,000 x 20,000 pixels.
"""

from __future__ import annotations

import struct
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.inputs.conversions import (
    ConversionError,
    check_picture,
    depth_size,
    depth_to_metres,
    image_size,
    image_to_rgb,
    to_metres,
)
from adatoken3d_ros.text import quoted

# compressed_depth_image_transport puts an enum and two float32 quantisation parameters before the picture
COMPRESSED_DEPTH_HEADER = 12
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8"
JPEG_SIZES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # start of frame: all but tables, extensions, conditioning
JPEG_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
JPEG_ENDS = {0xD9, 0xDA}  # the picture itself begins, or all is over
MAX_SEGMENTS = 4096  # of a jpeg that are looked at for its size


def picture_size(data: bytes | memoryview) -> tuple[int, int]:
    """(width, height) of a png or jpeg, from its header alone.

    Raises:
        ConversionError: for anything else, and where the header is cut off before its size.
    """
    head = bytes(data[:24])
    if head[:8] == PNG_SIGNATURE:
        if len(head) < 24 or head[12:16] != b"IHDR":
            raise ConversionError(f"the png of {len(data)} bytes has no header")
        width, height = struct.unpack(">II", head[16:24])
        return width, height
    if head[:2] != JPEG_SIGNATURE:
        raise ConversionError(f"the {len(data)} bytes begin with {head[:4].hex()}: neither a png nor a jpeg")
    at = len(JPEG_SIGNATURE)
    for _ in range(MAX_SEGMENTS):
        marker = bytes(data[at : at + 9])
        if len(marker) < 4 or marker[0] != 0xFF or marker[1] in JPEG_ENDS:
            break
        if marker[1] in JPEG_SIZES:
            if len(marker) < 9:
                break
            height, width = struct.unpack(">HH", marker[5:9])
            return width, height
        if marker[1] == 0xFF:  # filling
            at += 1
        elif marker[1] in JPEG_ALONE:
            at += 2
        else:
            at += 2 + max(2, int.from_bytes(marker[2:4], "big"))
    raise ConversionError(f"the jpeg of {len(data)} bytes does not say its size where it should")


def compressed_to_rgb(msg: Any) -> NDArray[np.uint8]:
    """sensor_msgs/CompressedImage (jpeg, png) to (H, W, 3) uint8 RGB.

    Raises:
        ConversionError: for what is no picture, and for one beyond the limits of `scene.frames`, which is not decoded.
    """
    picture = _decode(msg, 0, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]


def compressed_to_metres(msg: Any) -> NDArray[np.float32]:
    """sensor_msgs/CompressedImage with depth to (H, W) float32 metres, NaN where there is no measurement.

    Reads 16 bit png (millimetres) and the compressedDepth transport: 12 bytes of header, then a png, which holds
    millimetres for 16UC1 and, for 32FC1, the quantised inverse depth whose two parameters are in the header.

    Raises:
        ConversionError: for what is no 16 bit picture, and for one beyond the limits, which is not decoded.
    """
    picture = _decode(msg, _depth_header(msg), cv2.IMREAD_UNCHANGED)
    if picture.ndim != 2 or picture.dtype != np.uint16:
        raise ConversionError(
            f"compressed depth ({quoted(msg.format)}) must be one channel of 16 bits, "
            f"got {picture.dtype} {picture.shape}"
        )
    if not _depth_header(msg) or not msg.format.lstrip().startswith("32FC1"):
        return to_metres(picture, 0.001)
    # Inverse depth coding of compressed_depth_image_transport: value = a / depth + b, 0 for no measurement.
    a, b = struct.unpack("<ff", bytes(memoryview(msg.data)[4:COMPRESSED_DEPTH_HEADER]))
    if not (np.isfinite(a) and np.isfinite(b) and a > 0):
        raise ConversionError(f"compressedDepth quantisation parameters {a}, {b} are not finite and positive")
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        metres = np.where(picture == 0, np.nan, a / (picture.astype(np.float64) - b))
    return to_metres(metres, 1.0)


def decode_rgb(msg: Any) -> NDArray[np.uint8]:
    """Image or CompressedImage to (H, W, 3) uint8 RGB."""
    return compressed_to_rgb(msg) if hasattr(msg, "format") else image_to_rgb(msg)


def decode_depth(msg: Any) -> NDArray[np.float32]:
    """Image or CompressedImage to (H, W) float32 metres with NaN."""
    return compressed_to_metres(msg) if hasattr(msg, "format") else depth_to_metres(msg)


def colour_shape(msg: Any) -> tuple[int, int]:
    """(H, W) of a message that `decode_rgb` reads, without touching a pixel. Raises ConversionError as that does."""
    return _shape(msg, 0) if hasattr(msg, "format") else image_size(msg)


def depth_shape(msg: Any) -> tuple[int, int]:
    """(H, W) of a message that `decode_depth` reads; as `colour_shape`."""
    return _shape(msg, _depth_header(msg)) if hasattr(msg, "format") else depth_size(msg)


def _depth_header(msg: Any) -> int:
    """Bytes before the picture."""
    return COMPRESSED_DEPTH_HEADER if "compressedDepth" in msg.format else 0


def _shape(msg: Any, header: int) -> tuple[int, int]:
    """(H, W) of a compressed picture behind `header` bytes."""
    data = memoryview(msg.data)
    if len(data) <= header:
        raise ConversionError(f"the compressed image ({quoted(msg.format)}) of {len(data)} bytes is empty")
    try:
        width, height = picture_size(data[header:])
    except ConversionError as error:
        raise ConversionError(f"the compressed image ({quoted(msg.format)}) is no readable picture: {error}") from error
    check_picture(width, height)
    return height, width


def _decode(msg: Any, header: int, flags: int) -> NDArray[Any]:
    shape = _shape(msg, header)
    data = np.frombuffer(msg.data, np.uint8)[header:]
    try:
        picture = cv2.imdecode(data, flags)
    except cv2.error as error:
        raise ConversionError(
            f"the compressed image ({quoted(msg.format)}, {data.size} bytes) was refused: {error.err}"
        ) from error
    if picture is None or picture.shape[:2] != shape:
        raise ConversionError(f"the compressed image ({quoted(msg.format)}, {data.size} bytes) is no readable picture")
    return picture
