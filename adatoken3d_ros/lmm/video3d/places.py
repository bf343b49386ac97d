# SPDX-License-Identifier: Apache-2.0
"""Where a view's tokens are: the mean place of the pixels of each; and where the smaller patches are."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry, backproject
from adatoken3d_ros.scene.patches import PatchPoints, valid_depth

PARTS = 4  # patches of a token at most


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


def median_points(frame: PosedFrame, geometry: PatchGeometry, max_depth: float) -> NDArray[np.float32]:
    """(P, 3) middles of the points of a patch's pixels, scene frame, metres, along each axis by itself.

    So a patch is in a box where half of it is, but for corners. NaN where less than half of its pixels have a depth.
    Arguments as `mean_points`.
    """
    height, width = frame.depth.shape
    rows, cols = _pixels(width, height, geometry)
    seen = frame.depth[np.ix_(rows, cols)]
    used = valid_depth(seen, max_depth)
    points = backproject(
        np.where(used, seen, np.float32(np.nan)), cols[None, :], rows[:, None], frame.K, frame.T_world_camera
    )
    down, right = geometry.height // geometry.rows, geometry.width // geometry.columns
    cut = points.reshape(geometry.rows, down, geometry.columns, right, 3).transpose(0, 2, 1, 3, 4)
    ordered = np.sort(cut.reshape(geometry.patches, down * right, 3), axis=1)  # NaN comes last
    count = used.reshape(geometry.rows, down, geometry.columns, right).sum(axis=(1, 3)).reshape(-1)
    middle = ordered[np.arange(geometry.patches), np.maximum(count - 1, 0) // 2]
    found: NDArray[np.float32] = np.where((2 * count >= down * right)[:, None], middle, np.float32(np.nan))
    return found


@lru_cache(maxsize=8)
def parts_of(patches: int, grid: int) -> NDArray[np.int64]:
    """(grid * grid, PARTS) which of patches * patches have their middle in each token; -1 for none."""
    row = ((np.arange(patches) + 0.5) * grid / patches).astype(np.int64)
    first = np.searchsorted(row, np.arange(grid))
    pair = np.stack([first, np.where(np.bincount(row, minlength=grid) > 1, first + 1, -1)], axis=1)
    down, right = pair[:, None, :, None], pair[None, :, None, :]
    numbers: NDArray[np.int64] = np.where((down < 0) | (right < 0), -1, down * patches + right).reshape(grid**2, PARTS)
    numbers.setflags(write=False)
    return numbers


@lru_cache(maxsize=64)
def _pixels(width: int, height: int, geometry: PatchGeometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source rows and columns of all pixels of the image that belong to a patch."""
    # As the original's resize takes the nearest pixel: that at or before the place, without a half.
    crop = geometry.transform(width, height)
    down, right = geometry.height // geometry.rows, geometry.width // geometry.columns
    rows = (crop.y0 + np.arange(geometry.rows * down)) * height // crop.resized_height
    cols = (crop.x0 + np.arange(geometry.columns * right)) * width // crop.resized_width
    return rows, cols
