# SPDX-License-Identifier: Apache-2.0
"""Where a view's tokens are: the mean place of the pixels of each."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchPoints, valid_depth


def mean_points(
    frame: PosedFrame, geometry: PatchGeometry, max_depth: float, *, with_missing: bool = False
) -> PatchPoints:
    """Means of the points of all pixels of a patch, of the image as the tower sees it, each where it was measured.

    Args:
        frame: with depth in metres.
        geometry: of the image and its patches.
        max_depth: metres; a pixel that is farther away, or has no depth, does not count.
        with_missing: each pixel counts; one without depth is at the camera's centre.
    """
    height, width = frame.depth.shape
    rows, cols = _pixels(width, height, geometry)
    down, right = geometry.height // geometry.rows, geometry.width // geometry.columns
    seen = frame.depth[np.ix_(rows, cols)]
    used = np.ones(seen.shape, dtype=bool) if with_missing else valid_depth(seen, max_depth)
    depth = np.where(used & np.isfinite(seen), seen, 0.0).astype(np.float64)

    def sums(pixels: NDArray[np.float64] | NDArray[np.bool_]) -> NDArray[np.float64]:
        cut = pixels.reshape(geometry.rows, down, geometry.columns, right)
        total: NDArray[np.float64] = cut.sum(axis=(1, 3), dtype=np.float64)
        return total

    # A point is linear in (depth * column, depth * row, depth): their means are enough.
    parts = np.stack([sums(depth * cols[None, :]), sums(depth * rows[:, None]), sums(depth)], axis=-1)
    count = sums(used)[..., None]
    mean = parts / np.maximum(count, 1.0)
    T = np.asarray(frame.T_world_camera, dtype=np.float64)
    xyz = mean @ (T[:3, :3] @ np.linalg.inv(np.asarray(frame.K, dtype=np.float64))).T + T[:3, 3]
    valid = (count > 0).reshape(-1)
    middle = np.ix_(rows[down // 2 :: down], cols[right // 2 :: right])
    points = np.where(valid[:, None], xyz.reshape(-1, 3), np.nan).astype(np.float32)
    return PatchPoints(points, valid, frame.rgb[middle].reshape(-1, 3))


@lru_cache(maxsize=64)
def _pixels(width: int, height: int, geometry: PatchGeometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source rows and columns of all pixels of the image that belong to a patch."""
    # As the original's resize takes the nearest pixel: that at or before the place, without a half.
    crop = geometry.transform(width, height)
    down, right = geometry.height // geometry.rows, geometry.width // geometry.columns
    rows = (crop.y0 + np.arange(geometry.rows * down)) * height // crop.resized_height
    cols = (crop.x0 + np.arange(geometry.columns * right)) * width // crop.resized_width
    return rows, cols
