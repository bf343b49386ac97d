# SPDX-License-Identifier: Apache-2.0
"""What a scene gives to a model: its tokens before the model has made them its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SpatialTokens:
    """M voxels in lexicographic (x, y, z) order; tensors on one device.

    Attributes:
        features: (M, C) float32, mean of the patches' features.
        xyz: (M, 3) float32, mean of the patches' points, scene frame, metres.
        rgb: (M, 3) uint8, mean colour.
        count: (M,) int64, patches in the voxel.
        voxel: (M, 3) int64, index of the voxel: its centre is index * voxel_size + origin of the map.
        position: (M, H) float32, mean of what the map's `embed` made of the patches' points; H is 0 without one.
        view, cell: (M,) int64 on the CPU, number of the token's view and its place in the grid of that, row-major,
            where tokens are those of views; None where they are voxels. grids: rows and columns of the views.
        parts: (M, K, 3) float32 on the CPU, places of the smaller patches of each token of a view, see `PatchPoints`;
            None where tokens are voxels.
    """

    features: Tensor
    xyz: Tensor
    rgb: Tensor
    count: Tensor
    voxel: Tensor
    position: Tensor
    view: Tensor | None = None
    cell: Tensor | None = None
    grids: tuple[tuple[int, int], ...] = ()
    parts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.count)
