# SPDX-License-Identifier: Apache-2.0
"""Which voxels a frame looks through: they are empty, since the camera measures something behind them; and how what was
in them goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.token_map import TokenMap

_SIDE = 7  # depth is looked up at so many points along each side of a voxel's picture
_NEAREST = 0.1  # metres; points nearer to the camera are not judged
_WINDOW = 5  # pixels; each lookup finds the least depth of a square of this side, so that thin things are not missed


@dataclass(frozen=True)
class CarvingConfig:
    """When a voxel counts as empty.

    Attributes:
        margin: metres that every measurement in the voxel's picture must be behind the voxel's far side, and
        relative_margin: this share of its distance more, for noise that grows with distance.
        measured: share of the lookups in the voxel's picture that must hold a measurement.
    """

    margin: float = 0.1
    relative_margin: float = 0.02
    measured: float = 0.8

    def __post_init__(self) -> None:
        if not (self.margin >= 0 and self.relative_margin >= 0 and 0 < self.measured <= 1):
            raise ValueError(
                f"margin {self.margin} m, relative_margin {self.relative_margin} or measured {self.measured} is invalid"
            )


def seen_through(
    frame: PosedFrame, centres: NDArray[np.floating], voxel_size: float, config: CarvingConfig | None = None
) -> NDArray[np.bool_]:
    """Whether each voxel is wholly in the picture and everything measured in its place lies clearly behind it.

    A voxel's picture is the rectangle around its projected box. No measurement proves nothing.

    Args:
        centres: (M, 3) scene frame, metres. voxel_size: metres, boxes along the axes of the scene frame.

    Returns:
        (M,) bool.
    """
    config = config or CarvingConfig()
    height, width = frame.depth.shape
    R, t = frame.T_world_camera[:3, :3], frame.T_world_camera[:3, 3]
    through = np.zeros(len(centres), bool)
    moved = np.asarray(centres, np.float64) - t
    x, y, z = (moved[:, 0] * R[0, i] + moved[:, 1] * R[1, i] + moved[:, 2] * R[2, i] for i in range(3))
    # Half the extent of the boxes along each axis of the camera.
    ex, ey, ez = 0.5 * voxel_size * np.abs(R).sum(axis=0)
    rows = np.flatnonzero(z - ez > 0.5 * voxel_size)
    x, y, z = x[rows], y[rows], z[rows]
    far = z + ez + config.margin + config.relative_margin * z
    left, right = _side(frame.K[0, 0], frame.K[0, 2], x, ex, z, ez)
    top, bottom = _side(frame.K[1, 1], frame.K[1, 2], y, ey, z, ez)
    inside = (left >= 0) & (right <= width - 1) & (top >= 0) & (bottom <= height - 1)
    # The middle first: most voxels are on a surface, and are done with.
    middle = ((left + right) / 2)[inside].astype(np.int64), ((top + bottom) / 2)[inside].astype(np.int64)
    inside[inside] = frame.depth[middle[1], middle[0]] > far[inside]
    if not inside.any():
        return through
    rows, far = rows[inside], far[inside]
    share = np.linspace(0.0, 1.0, _SIDE)
    u = np.rint(left[inside, None] + (right - left)[inside, None] * share).astype(np.int64)[:, None, :]
    v = np.rint(top[inside, None] + (bottom - top)[inside, None] * share).astype(np.int64)[:, :, None]
    measured = frame.depth[v, u] > 0
    least = cv2.erode(np.where(frame.depth > 0, frame.depth, np.float32(np.inf)), np.ones((_WINDOW, _WINDOW), np.uint8))
    empty = (np.asarray(least)[v, u] > far[:, None, None]).all(axis=(1, 2))
    through[rows] = empty & (measured.mean(axis=(1, 2)) >= config.measured)
    return through


def looked_past(
    frame: PosedFrame, points: NDArray[np.floating], config: CarvingConfig | None = None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether everything measured around each point (P, 3), scene frame, metres, lies clearly behind it; and whether
    the frame says nothing of it, for want of a measurement (a point outside of the picture is not of these)."""
    config = config or CarvingConfig()
    height, width = frame.depth.shape
    R, t = frame.T_world_camera[:3, :3], frame.T_world_camera[:3, 3]
    past, silent = np.zeros(len(points), bool), np.zeros(len(points), bool)
    local = (np.asarray(points, np.float64) - t) @ R
    rows = np.flatnonzero(local[:, 2] > _NEAREST)
    x, y, z = local[rows].T
    u = np.rint(x / z * frame.K[0, 0] + frame.K[0, 2]).astype(np.int64)
    v = np.rint(y / z * frame.K[1, 1] + frame.K[1, 2]).astype(np.int64)
    edge = _WINDOW // 2
    inside = (u >= edge) & (u < width - edge) & (v >= edge) & (v < height - edge)
    rows, u, v, z = rows[inside], u[inside], v[inside], z[inside]
    # The middle first, as above.
    measured = frame.depth[v, u]
    silent[rows] = ~(measured > 0)
    behind = z + config.margin + config.relative_margin * z
    far = measured > behind
    rows, u, v, behind = rows[far], u[far], v[far], behind[far]
    if len(rows):
        steps = np.arange(-edge, edge + 1)
        around = frame.depth[v[:, None, None] + steps[:, None], u[:, None, None] + steps]
        known = around > 0
        nearest = np.where(known, around, np.float32(np.inf)).min(axis=(1, 2))
        past[rows] = (nearest > behind) & (known.mean(axis=(1, 2)) >= config.measured)
    return past, silent


def _side(
    f: float, c: float, x: NDArray[np.float64], ex: float, z: NDArray[np.float64], ez: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Least and greatest pixel coordinate of boxes from x - ex to x + ex between depths z - ez and z + ez."""
    low, high = x - ex, x + ex
    return (
        f * np.minimum(low / (z - ez), low / (z + ez)) + c,
        f * np.maximum(high / (z - ez), high / (z + ez)) + c,
    )


def carve_free_space(
    token_map: TokenMap,
    frame: PosedFrame,
    config: CarvingConfig | None = None,
    order: int | None = None,
    tell: Callable[[Tensor], object] | None = None,
    doubted: dict[int, int] | None = None,
) -> int:
    """Take out of the map what views older than the frame hold of voxels that the frame looks through.

    Args:
        order: of the frame among the views of the map, see `TokenMap.add_view`. None: its stamp.
        tell: told before of the voxels (n,) that the frame looks through, if there are any.
        doubted: as `emptied`.

    Returns:
        How many patches were taken out.
    """
    before = frame.stamp_ns if order is None else order
    voxels = emptied(token_map, frame, config, before, {} if doubted is None else doubted)
    if tell is not None and len(voxels):
        tell(voxels)
    return token_map.carve(voxels, before)


def emptied(
    token_map: TokenMap, frame: PosedFrame, config: CarvingConfig | None, before: int, doubted: dict[int, int]
) -> Tensor:
    """Keys of the voxels that a frame looks through, or in which it looks past all that views of an order below
    `before` have measured: what it does not measure tells nothing, but of most it must.

    One point may be of an edge, or the frame's own view of it. What was measured once is `doubted` at first, and goes
    when the next frame looks past it, too; one that measures nothing there is passed over.

    Args:
        doubted: {voxel: stamp of the frame that looked past it}; changed here, kept as long as no view moves.
    """
    config = config or CarvingConfig()
    keys = token_map.occupied_keys
    through = seen_through(frame, token_map.centres(), token_map.voxel_size, config)
    older = [view for view in token_map.contributions().values() if view.order < before and len(view.keys)]
    if older:
        at, seen, unknown, held = _looked_past(frame, keys, older, config)
        gone = (seen > 0) & (seen + unknown >= held) & (seen >= config.measured * held)
        through[at] |= gone & (seen > 1)
        unmeasured = keys[torch.from_numpy(at[unknown >= held])].tolist()
        still = {key: doubted[key] for key in unmeasured if key in doubted}
        for row in at[gone & (seen == 1)]:
            key = int(keys[row])
            still[key] = doubted.get(key, frame.stamp_ns)
            through[row] |= still[key] != frame.stamp_ns
        doubted.clear()
        doubted.update(still)
    return keys[torch.from_numpy(through)]


def _looked_past(
    frame: PosedFrame, keys: Tensor, views: Sequence[Contribution], config: CarvingConfig
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The numbers (n,) of the voxels of `keys` in which a frame may look past all that views measured, and of each how
    many points it looks past, of how many it says nothing, and how many there are.

    Most voxels are done with after the first of their points: it is measured, and not looked past.
    """
    count = torch.cat([view.count for view in views]).numpy()
    at = torch.searchsorted(keys, torch.cat([view.keys for view in views])).numpy()
    points = torch.cat([view.points for view in views]).numpy()
    starts = np.cumsum(count) - count
    first = np.full(len(keys), -1)
    first[at[::-1]] = starts[::-1]
    some = np.flatnonzero(first >= 0)
    past, silent = looked_past(frame, points[first[some]], config)
    left = np.zeros(len(keys), bool)
    left[some] = past | silent
    rows = np.flatnonzero(left[at])
    chosen = np.repeat(left[at], count)
    past, silent = looked_past(frame, points[chosen], config)
    voxel = np.repeat(at[rows], count[rows])
    seen, unknown, held = (np.bincount(voxel[of], minlength=len(keys)) for of in (past, silent, np.ones_like(past)))
    found = np.flatnonzero(left)
    return found, seen[found], unknown[found], held[found]
