# SPDX-License-Identifier: Apache-2.0
"""What the inputs are called, and what frames are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RGB = "rgb/image"
DEPTH = "depth/image"
RGB_INFO = "rgb/camera_info"
DEPTH_INFO = "depth/camera_info"
POINTS = "points"

# What frames are made of (parameter input.source) -> the streams that must come, and what they become.
RGBD = "rgbd"
ORGANISED_POINTS = "organised_points"
POINTS_WITH_CAMERA = "points_with_camera"
COLOURED_POINTS = "points"
STREAMS: dict[str, tuple[str, ...]] = {
    RGBD: (RGB, DEPTH),
    ORGANISED_POINTS: (POINTS,),
    POINTS_WITH_CAMERA: (RGB, POINTS),
    COLOURED_POINTS: (POINTS,),
}


@dataclass(frozen=True, eq=False)
class Pair:
    """A colour message and one with geometry, an image or a cloud, and their stamps in nanoseconds.

    A cloud that brings its own colour is both.
    """

    rgb_ns: int
    depth_ns: int
    rgb: Any
    depth: Any
