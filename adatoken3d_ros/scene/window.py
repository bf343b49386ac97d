# SPDX-License-Identifier: Apache-2.0
"""Where the model should see the origin of its frame: on the floor, in the middle of what is known of the scene.

The floor is a mode of horizontal support: heights where much of what faces up lies. Not the lowest thing seen, which is
noise, a reflection or a stairwell, and not the largest surface, which may be a table.
"""

from __future__ import annotations

from enum import Enum

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.token_map import TokenMap

LEVEL = 0.9  # cosine of the steepest slope that still faces up
BIN = 0.05  # metres of height
CELL = 0.2  # metres; support counts in squares of this side, so that what is near does not count more
LEAST_CELLS = 10
LEAST_SHARE = 0.25  # of the largest surface's support
TOLERANCE = np.array([1.0, 1.0, 0.15])  # metres along x, y, z by which the origin may be off before it is moved


class OriginMode(str, Enum):
    """Where the model sees its origin."""

    FIXED = "fixed"  # where it was configured
    AUTO = "auto"  # on the floor under the middle of what has been seen


def level_patches(xyz: NDArray[np.float32], columns: int) -> NDArray[np.bool_]:
    """Whether the surface faces up at each patch.

    Args:
        xyz: (P, 3) points of a grid of patches, row-major, scene frame (z up); NaN where there is none.
        columns: of the grid.

    Returns:
        (P,) bool; False where the patch or one beside it has no point.
    """
    grid = xyz.reshape(-1, columns, 3).astype(np.float64)
    if min(grid.shape[:2]) < 2:
        return np.zeros(len(xyz), bool)
    # Columns go to the right and rows down: this order makes the normal face the camera.
    normal = np.cross(np.gradient(grid, axis=0), np.gradient(grid, axis=1))
    level: NDArray[np.bool_] = normal[..., 2] > LEVEL * np.linalg.norm(normal, axis=2)
    return (level & np.isfinite(grid[..., 2])).reshape(-1)


def floor_height(points: NDArray[np.floating]) -> float | None:
    """Height of the floor among points (n, 3) of surfaces that face up, metres; None if there is not enough of one.

    It is the lowest height with at least `LEAST_SHARE` of the support of the best, both within three bins.
    """
    if not len(points):
        return None
    cells = np.floor(points / (CELL, CELL, BIN)).astype(np.int64)
    # One number a cell: many times faster to make unique than three. First the square, so that far points fit, too.
    x, y, z = (cells - cells.min(axis=0)).T
    square = np.unique(x * (y.max() + 1) + y, return_inverse=True)[1].reshape(-1)
    high = z.max() + 1
    bins, support = np.unique(np.unique(square * high + z) % high + cells[:, 2].min(), return_counts=True)
    at = np.searchsorted(bins, bins[:, None] + (-1, 0, 1)).clip(max=len(bins) - 1)
    wide = np.where(bins[at] == bins[:, None] + (-1, 0, 1), support[at], 0).sum(axis=1)
    enough = np.flatnonzero(wide >= max(LEAST_CELLS, LEAST_SHARE * wide.max()))
    if not len(enough):
        return None
    # From the lower edge of the mode to its top.
    near = enough[bins[enough] <= bins[enough[0]] + 2]
    peak = bins[near[np.argmax(wide[near])]]
    height = points[:, 2].astype(np.float64)
    return float(np.median(height[np.abs(np.floor(height / BIN) - peak) <= 1]))


def middle(centres: NDArray[np.floating]) -> NDArray[np.float64]:
    """(2,) x and y half way between the outermost of the points (n, 3), 2 % on each side left out."""
    low, high = np.percentile(centres[:, :2], (2, 98), axis=0)
    return np.asarray((low + high) / 2, dtype=np.float64)


def best_shift(token_map: TokenMap) -> NDArray[np.int64]:
    """(3,) voxels from the map's origin to where the model's should be; the present ones where that is near enough.

    An origin that is off by more than `TOLERANCE` along an axis goes to the voxel nearest to the right place. Between
    moves it stands still: growing coverage and noise do not shake it.
    """
    shift: NDArray[np.int64] = token_map.shift.numpy().copy()
    if not token_map.n_voxels:
        return shift
    wanted = np.array([*middle(token_map.centres()), np.nan])
    floor = floor_height(token_map.level_points())
    if floor is not None:
        wanted[2] = floor
    off = np.abs(wanted - token_map.model_origin) > TOLERANCE  # NaN is not
    shift[off] = np.rint((wanted - token_map.origin.numpy())[off] / token_map.voxel_size).astype(np.int64)
    return shift
