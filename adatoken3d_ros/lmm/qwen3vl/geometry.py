# SPDX-License-Identifier: Apache-2.0
"""Which pixels of a view a token stands for, and where it is in the room.

A view is resized to a multiple of the merged patch along both edges, its aspect kept as closely as that allows; nothing
is cut off. Pixel centres have integer coordinates.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import GeometryError, backproject
from adatoken3d_ros.scene.patches import PatchPoints, valid_depth


def grid_of(height: int, width: int, stride: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tokens of an image.

    Args:
        stride: edge of a merged patch. pixels: fewest and most of a resized image.

    Raises:
        GeometryError: for an image that is smaller than a merged patch.
    """
    if min(height, width) < stride:
        raise GeometryError(f"an image of {width}x{height} pixels is smaller than a patch of {stride}x{stride}")
    resized = smart_resize(height, width, factor=stride, min_pixels=pixels[0], max_pixels=pixels[1])
    return int(resized[0]) // stride, int(resized[1]) // stride


@lru_cache(maxsize=32)
def _members(size: int, cells: int) -> NDArray[np.int64]:
    """(cells, n) the pixels of an edge whose centres fall into each cell once it is resized; -1 fills up."""
    cell = ((np.arange(size) + 0.5) * cells / size).astype(np.int64)
    counts = np.bincount(cell, minlength=cells)
    found = np.full((cells, int(counts.max())), -1)
    for index in range(cells):
        found[index, : counts[index]] = np.flatnonzero(cell == index)
    found.setflags(write=False)
    return found


def _off_middle(size: int, cells: int) -> NDArray[np.float64]:
    """(cells, n) how far the pixels of each cell are from its middle, in cells."""
    off: NDArray[np.float64] = (_members(size, cells) + 0.5) * cells / size - np.arange(cells)[:, None] - 0.5
    return off


def token_points(frame: PosedFrame, grid: tuple[int, int], max_depth: float) -> PatchPoints:
    """For each token, row-major, the point of the pixel with the median depth of its pixels that have a valid one.

    Of an even number it is the nearer of the two in the middle: the point lies on a surface and not between two. Of
    pixels of equal depth it is the one nearest to the middle of the token.
    A token without any valid depth is not valid.
    """
    height, width = frame.depth.shape
    rows, columns = _members(height, grid[0])[:, None, :, None], _members(width, grid[1])[None, :, None, :]
    inside = (rows >= 0) & (columns >= 0)
    shape = (grid[0] * grid[1], -1)
    depth = np.where(inside, frame.depth[rows, columns], np.float32(np.nan)).reshape(shape)
    valid = valid_depth(depth, max_depth)
    count = valid.sum(axis=1)
    ordered = np.sort(np.where(valid, depth, np.float32(np.inf)), axis=1)
    median = np.take_along_axis(ordered, np.maximum(count - 1, 0)[:, None] // 2, axis=1)
    off = _off_middle(height, grid[0])[:, None, :, None] ** 2 + _off_middle(width, grid[1])[None, :, None, :] ** 2
    picked = np.where(depth == median, off.reshape(shape), np.inf).argmin(axis=1)[:, None]
    v = np.take_along_axis(np.broadcast_to(rows, inside.shape).reshape(shape), picked, axis=1)[:, 0]
    u = np.take_along_axis(np.broadcast_to(columns, inside.shape).reshape(shape), picked, axis=1)[:, 0]
    z = np.where(count > 0, np.take_along_axis(depth, picked, axis=1)[:, 0], np.float32(np.nan))
    xyz = backproject(z, u, v, frame.K, frame.T_world_camera)
    return PatchPoints(xyz, count > 0, frame.rgb[v, u])
