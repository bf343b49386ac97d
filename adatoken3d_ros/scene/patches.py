# SPDX-License-Identifier: Apache-2.0
"""From a posed RGB-D frame to one point per image patch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import (
    PatchGeometry,
    backproject,
    cropped_intrinsics,
    sample_pixels,
)
from adatoken3d_ros.settings import DEFAULTS


@dataclass(frozen=True)
class PatchConfig:
    """How patches are sampled.

    Attributes:
        geometry: which pixels of a picture its patches stand for.
        max_depth: metres; a patch that is farther away is not valid.
    """

    geometry: PatchGeometry = PatchGeometry.square(336, 24)
    max_depth: float = DEFAULTS["scene.max_depth"]

    def __post_init__(self) -> None:
        if not self.max_depth > 0:
            raise ValueError(f"max_depth {self.max_depth} m must be positive")


@dataclass(frozen=True, eq=False)
class PatchPoints:
    """One sample per patch, row-major, P = rows * columns.

    Attributes:
        xyz: (P, 3) float32, scene frame, metres; NaN where not valid.
        valid: (P,) bool, whether the patch has a usable depth.
        rgb: (P, 3) uint8, colour of the sampled pixel.
        parts: (P, K, 3) float32, places of smaller patches within each, NaN where there is none; None if nobody asks.
    """

    xyz: NDArray[np.float32]
    valid: NDArray[np.bool_]
    rgb: NDArray[np.uint8]
    parts: NDArray[np.float32] | None = None


def patch_points(frame: PosedFrame, config: PatchConfig | None = None) -> PatchPoints:
    """The point of each patch's top-left pixel; touches only P pixels of the frame."""
    config = config or PatchConfig()
    geometry = config.geometry
    height, width = frame.depth.shape
    rows, cols = sample_pixels(width, height, geometry)
    depth = frame.depth[np.ix_(rows, cols)]
    rgb = frame.rgb[np.ix_(rows, cols)].reshape(-1, 3)
    K = cropped_intrinsics(frame.K, geometry.transform(width, height))
    down, right = geometry.corners()
    valid = valid_depth(depth, config.max_depth)
    depth = np.where(valid, depth, np.float32(np.nan))
    xyz = backproject(depth, right[None, :], down[:, None], K, frame.T_world_camera)
    return PatchPoints(xyz.reshape(-1, 3), valid.reshape(-1), rgb)


def valid_depth(depth: NDArray[np.float32], max_depth: float) -> NDArray[np.bool_]:
    """Whether each depth is finite, positive and at most `max_depth` metres (no comparison with NaN is true)."""
    return (depth > 0) & (depth <= min(max_depth, float(np.finfo(np.float32).max)))
