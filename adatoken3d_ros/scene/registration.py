# SPDX-License-Identifier: Apache-2.0
"""Depth for the pixels of a camera that did not measure it: from another camera, a smaller image, or loose points."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.geometry import backproject

NEAREST = 1e-3  # metres; a point closer to the image plane than this is not projected
NO_POINT = np.uint64(2**64 - 1)
LARGEST_RADIUS = 8  # pixels; a point is drawn no larger than this without being told to
LARGEST_PIXEL = 32  # pixels; the same for a pixel of a depth camera whose pixels are coarser


def z_buffer(
    xyz: NDArray[np.floating], K: NDArray[np.float64], width: int, height: int, radius: int | None = 0
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Points drawn as squares of 2 * radius + 1 pixels; the nearest point wins (of equally near ones the first).

    Args:
        xyz: (N, 3) camera frame, metres; rows that are not finite or not in front of the camera are left out.
        K: (3, 3) pinhole matrix. A point belongs to the pixel nearest to its projection.
        radius: pixels; None: `splat_radius` of the pixels that the points hit.

    Returns:
        depth (height, width) float32, metres along the optical axis, NaN where no point is drawn, and the row of the
        point (height, width) int64, -1 where there is none.
    """
    x, y, z = (np.ascontiguousarray(xyz[:, i]) for i in range(3))
    # A margin holds points whose square reaches into the picture.
    margin = LARGEST_RADIUS if radius is None else radius
    with np.errstate(invalid="ignore", over="ignore"):
        rows = np.flatnonzero((z > NEAREST) & np.isfinite(x + y + z))
    z = z[rows]
    # In units of z first: a point of 1e30 m must not overflow. Most points of a cloud that is all around leave here.
    y = y[rows].astype(np.float64) / z
    v = np.rint(K[1, 1] * y + K[1, 2])
    inside = np.flatnonzero((v >= -margin) & (v < height + margin))
    rows, y, z, v = rows[inside], y[inside], z[inside], v[inside]
    u = np.rint(K[0, 0] * (x[rows].astype(np.float64) / z) + K[0, 1] * y + K[0, 2])
    inside = np.flatnonzero((u >= -margin) & (u < width + margin))
    rows, u, v, z = rows[inside], u[inside], v[inside], z[inside].astype(np.float32)
    wide, high = width + 2 * margin, height + 2 * margin
    pixel = (v.astype(np.int64) + margin) * wide + u.astype(np.int64) + margin
    # One number orders points by depth, then by row: the bits of a positive float are in the order of its values.
    point = z.view(np.uint32).astype(np.uint64) << np.uint64(32) | rows.astype(np.uint64)
    nearest = np.full((high, wide), NO_POINT)
    np.minimum.at(nearest.reshape(-1), pixel, point)
    inner = slice(margin, margin + height), slice(margin, margin + width)
    if radius is None:
        radius = splat_radius(int((nearest[inner] != NO_POINT).sum()), width, height)
    nearest = _spread(nearest, radius)[inner]
    empty = nearest == NO_POINT
    depth = (nearest >> np.uint64(32)).astype(np.uint32).view(np.float32)
    index = (nearest & np.uint64(0xFFFFFFFF)).astype(np.int64)
    depth[empty], index[empty] = np.nan, -1
    return depth, index


def _spread(nearest: NDArray[np.uint64], radius: int) -> NDArray[np.uint64]:
    """Each pixel takes the smallest value of the square around it: first along the rows, then along the columns.

    The least of twice as many neighbours is the lesser of two known ones, so that a large radius costs little more.
    """
    for axis in (1, 0) if radius else ():
        best = np.pad(nearest, [(radius * (axis == i),) * 2 for i in (0, 1)], constant_values=NO_POINT)
        have, wanted = 1, 2 * radius + 1
        while have < wanted:
            step = min(have, wanted - have)
            best = np.minimum(*((best[:, :-step], best[:, step:]) if axis else (best[:-step], best[step:])))
            have += step
        nearest = best
    return nearest


def splat_radius(n_points: int, width: int, height: int, largest: int = LARGEST_RADIUS) -> int:
    """Pixels for `z_buffer` so that the squares of `n_points` spread evenly over an image about touch."""
    spacing = math.sqrt(width * height / max(1, n_points))
    return min(largest, max(0, math.ceil((spacing - 1) / 2 - 0.1)))


def register_depth(
    depth: NDArray[np.float32],
    K_depth: NDArray[np.float64],
    K: NDArray[np.float64],
    T_camera_depth: NDArray[np.float64],
    width: int,
    height: int,
) -> NDArray[np.float32]:
    """Depth of another camera, seen by this one: each pixel is moved as a point, and the nearest one wins.

    Where this camera has the finer pixels, each point fills its share of them, at most LARGEST_PIXEL pixels to each
    side, but never covers a measured one.

    Args:
        depth: (h, w) float32 metres, NaN for no measurement. K_depth: its (3, 3) pinhole matrix.
        K: (3, 3) pinhole matrix of this camera's image of `width` x `height` pixels.
        T_camera_depth: (4, 4) from the depth camera's optical frame to this one's.

    Returns:
        (height, width) float32, metres along this camera's optical axis, NaN where nothing was measured.
    """
    v, u = np.nonzero(depth > 0)
    xyz = backproject(depth[v, u], u, v, K_depth, T_camera_depth)
    found, _ = z_buffer(xyz, K, width, height)
    finer = max(K[0, 0] / K_depth[0, 0], K[1, 1] / K_depth[1, 1])
    radius = math.ceil((min(finer, 2 * LARGEST_PIXEL + 1) - 1) / 2 - 1e-6)
    if radius > 0:
        filled, _ = z_buffer(xyz, K, width, height, radius)
        found = np.where(np.isnan(found), filled, found)
    return found


def resample_depth(
    depth: NDArray[np.float32], K_depth: NDArray[np.float64], K: NDArray[np.float64], width: int, height: int
) -> NDArray[np.float32]:
    """Depth of another size or focal length but the same optical frame: each pixel looks up the nearest one on its ray.

    Returns:
        (height, width) float32 metres, NaN where the ray leaves the depth image or nothing was measured.
    """
    H = K_depth @ np.linalg.inv(K)
    u, v = np.meshgrid(np.arange(width), np.arange(height))
    x = np.rint(H[0, 0] * u + H[0, 1] * v + H[0, 2]).astype(np.int64)
    y = np.rint(H[1, 1] * v + H[1, 2]).astype(np.int64)
    inside = (x >= 0) & (x < depth.shape[1]) & (y >= 0) & (y < depth.shape[0])
    found = np.full((height, width), np.nan, np.float32)
    found[inside] = depth[y[inside], x[inside]]
    return found


def scaled_intrinsics(K: NDArray[np.float64], scale_x: float, scale_y: float) -> NDArray[np.float64]:
    """K (3, 3) of the same picture with `scale_x` times as many columns and `scale_y` times as many rows.

    Pixel centres have integer coordinates, so c' = s (c + 0.5) - 0.5.
    """
    scaled = np.array(K, dtype=np.float64)
    scaled[0] *= scale_x
    scaled[1] *= scale_y
    scaled[0, 2] += 0.5 * (scale_x - 1)
    scaled[1, 2] += 0.5 * (scale_y - 1)
    return scaled
