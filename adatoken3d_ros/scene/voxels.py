# SPDX-License-Identifier: Apache-2.0
"""Voxels as sortable numbers, and the mean of everything that shares one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A voxel is one int64: three signed 21-bit indices, x highest, so that numeric order is lexicographic (x, y, z) order.
_BITS = 21
_BIAS = 1 << (_BITS - 1)
_MASK = (1 << _BITS) - 1
_STEP = torch.tensor([-1, 0, 1])
# (27,) what the keys of a voxel and of those around it differ by.
_NEIGHBOURS = ((_STEP << (2 * _BITS))[:, None, None] + (_STEP << _BITS)[:, None] + _STEP).reshape(-1)

# (8, 3) corners of a cube around the origin whose edges are 2 long.
_CORNERS = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)


class TokenMapError(ValueError):
    """Points, features or views that cannot be pooled; the message names the offending value."""


def voxel_keys(xyz: Tensor, voxel_size: float) -> Tensor:
    """(P,) int64 key of the voxel round_half_even(xyz / voxel_size), in the arithmetic of the dtype of xyz (P, 3).

    Raises:
        TokenMapError: for a point that is not finite or more than 2^20 voxels from the origin, or a bad voxel size.
    """
    if not 0 < voxel_size < float("inf"):
        raise TokenMapError(f"voxel size {voxel_size} m must be positive and finite")
    if xyz.ndim != 2 or xyz.shape[1] != 3 or not xyz.is_floating_point():
        raise TokenMapError(f"points must be floating point of shape (P, 3), got {tuple(xyz.shape)} {xyz.dtype}")
    index = torch.round(xyz / voxel_size)
    # One comparison refuses NaN, infinity and what does not fit.
    inside = (index.abs() < _BIAS).all(dim=1)
    if not bool(inside.all()):
        row = int(torch.nonzero(~inside)[0])
        raise TokenMapError(
            f"point {row} at {xyz[row].tolist()} m is not finite or more than {_BIAS} voxels of {voxel_size} m away"
        )
    biased = index.to(torch.int64) + _BIAS
    return (biased[:, 0] << (2 * _BITS)) | (biased[:, 1] << _BITS) | biased[:, 2]


def voxel_indices(keys: Tensor) -> Tensor:
    """(M, 3) int64 voxel index of each key (M,): the inverse of the packing in `voxel_keys`."""
    return torch.stack([(keys >> shift) & _MASK for shift in (2 * _BITS, _BITS, 0)], dim=1) - _BIAS


def near_any(held: Tensor, keys: Tensor, *, level: bool = False) -> Tensor:
    """(P,) bool: whether a voxel of `keys` (P,) or one of its 26 neighbours is among `held` (M,), which ascend.

    Args:
        level: only of the 8 neighbours at its height.
    """
    if not len(held):
        return torch.zeros(len(keys), dtype=torch.bool)
    around = keys[:, None] + (_NEIGHBOURS[1::3] if level else _NEIGHBOURS)
    return (held[torch.searchsorted(held, around).clamp_(max=len(held) - 1)] == around).any(dim=1)


def corners_around(points: Tensor | NDArray[np.floating], within: float) -> Tensor:
    """(8 P, 3) float64 corners of a cube around each point (P, 3), whose edges are 2 `within` long, point by point."""
    return (torch.as_tensor(points).double()[:, None] + within * _CORNERS).reshape(-1, 3)


def voxel_pool(
    features: Tensor,
    xyz: Tensor,
    voxel_size: float = 0.2,
    *,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means of the features of the points that share a voxel.

    Args:
        features: (P, C). xyz: (P, 3) metres. Both on one device.
        valid: (P,) bool; a row that is not valid belongs to no voxel and is never read as a number.

    Returns:
        mean (M, C) float32, inverse (P,) int64 (row -> voxel, -1 where not valid), count (M,) int64 and voxel (M, 3)
        int64, voxels in lexicographic order.

    Raises:
        TokenMapError: if no row is valid, shapes disagree or a point has no voxel (see `voxel_keys`).
    """
    if features.ndim != 2 or len(features) != len(xyz):
        raise TokenMapError(f"features {tuple(features.shape)} do not belong to points {tuple(xyz.shape)}")
    rows = None if valid is None or bool(valid.all()) else torch.nonzero(valid)[:, 0]
    points = xyz if rows is None else xyz[rows]
    if not len(points):
        raise TokenMapError(f"none of the {len(xyz)} points is valid")
    order, sorted_inverse, keys, count = group_equal(voxel_keys(points.float(), voxel_size))
    rows = order if rows is None else rows[order]
    mean = sum_groups(features, rows, count)
    mean /= count[:, None]
    inverse = torch.full((len(xyz),), -1, device=xyz.device).index_copy_(0, rows, sorted_inverse)
    return mean, inverse, count, voxel_indices(keys)


def group_equal(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Brings equal keys (P,) together: a stable order (P,), each ordered row's group (P,), the keys and sizes (M,)."""
    ordered, order = torch.sort(keys, stable=True)
    unique, inverse, count = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    return order, inverse, unique, count


def sum_groups(features: Tensor, rows: Tensor, count: Tensor) -> Tensor:
    """(M, C) float32 sums of the features (P, C) of the first count[0] rows, of the next count[1] rows, and so on.

    A bag of embeddings is exactly this sum, and reads each row once, in place and in order, on CUDA too; but torch
    refuses rows of no numbers where it has several threads.
    """
    if not features.shape[1]:
        return features.new_zeros(len(count), 0, dtype=torch.float32)
    return torch.nn.functional.embedding_bag(rows, features.float(), count.cumsum(0) - count, mode="sum")
