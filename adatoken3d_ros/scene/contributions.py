# SPDX-License-Identifier: Apache-2.0
"""What each view adds to the voxels, and the table in which it is added up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatoken3d_ros.scene.voxels import add_in_order


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one view adds: a row per voxel (a row per patch in upstream's numbers), voxels ascending.

    Attributes:
        keys: (R,) int64. features: (R, C) sums on the model's device, float32 (bfloat16 in upstream's numbers).
        count: (R,) int64, patches. xyz: (R, 3) float64, sums of points, scene frame. rgb: (R, 3) float64, sums of
            colours.
        points: (P, 3) float32, scene frame, the patches of the first row, then those of the next, and so on.
        level: (P,) bool, whether the surface faces up there.
        position: (R, H) float32, sums of the embedded points, on the device of the features. All others but the
            features are on the CPU.
        order: place of the view among the others, see `TokenMap.add_view`.
    """

    keys: Tensor
    features: Tensor
    count: Tensor
    xyz: Tensor
    rgb: Tensor
    points: Tensor
    level: Tensor
    position: Tensor
    order: int = 0

    def rows(self, kept: Tensor) -> Contribution:
        """Only the rows where `kept` (R,) bool is true."""
        patches, device = torch.repeat_interleave(kept, self.count), self.features.device
        return Contribution(
            self.keys[kept],
            self.features[kept.to(device)],
            self.count[kept],
            self.xyz[kept],
            self.rgb[kept],
            self.points[patches],
            self.level[patches],
            self.position[kept.to(device)],
            self.order,
        )


class Sums:
    """A growing table of sums, one row a voxel, rows given out and taken back."""

    _TABLES = ("features", "position", "weight", "count", "xyz", "rgb")

    def __init__(self, like: Contribution) -> None:
        self.features = like.features.new_zeros(0, like.features.shape[1])
        self.position = like.position.new_zeros(0, like.position.shape[1])
        dtype = like.features.dtype
        self.weight = torch.zeros(0, dtype=dtype)  # the count that divides the features, in their arithmetic
        self.count = torch.zeros(0, dtype=torch.int64)
        self.xyz = torch.zeros(0, 3, dtype=torch.float64)
        self.rgb = torch.zeros(0, 3, dtype=torch.float64)
        self._free = torch.empty(0, dtype=torch.int64)

    def take(self, n: int) -> Tensor:
        """(n,) rows of zeros; the table doubles when it is full."""
        if n > len(self._free):
            size = len(self.count)
            more = max(size, n - len(self._free), 256)
            for name in self._TABLES:
                table = getattr(self, name)
                setattr(self, name, torch.cat([table, table.new_zeros(more, *table.shape[1:])]))
            self._free = torch.cat([self._free, torch.arange(size, size + more)])
        taken, self._free = self._free[:n], self._free[n:]
        return taken

    def zero(self, rows: Tensor) -> None:
        for table in (getattr(self, name) for name in self._TABLES):
            table.index_fill_(0, rows.to(table.device), 0)

    def give_back(self, rows: Tensor) -> None:
        """Free rows that are zero."""
        self._free = torch.cat([self._free, rows])

    def add(self, rows: Tensor, view: Contribution, chosen: Tensor | None = None) -> None:
        """Add the view's rows (the `chosen` ones) to these rows of the table, one after the other."""
        features, position, count, xyz, rgb = view.features, view.position, view.count, view.xyz, view.rgb
        if chosen is not None:
            on_device = chosen.to(features.device)
            # index_select copies whole rows: several times faster than indexing, and most of what a removed view costs.
            features, position = (table.index_select(0, on_device) for table in (features, position))
            count, xyz, rgb = (table.index_select(0, chosen) for table in (count, xyz, rgb))
        self.position.index_add_(0, rows.to(self.position.device), position)
        if self.features.dtype == torch.float32:  # no row comes twice
            self.features.index_add_(0, rows.to(self.features.device), features)
            self.weight.index_add_(0, rows, count.to(self.weight.dtype))
        else:
            add_in_order(self.features, rows.to(self.features.device), features)
            add_in_order(self.weight, rows, count.to(self.weight.dtype))
        self.count.index_add_(0, rows, count)
        self.xyz.index_add_(0, rows, xyz)
        self.rgb.index_add_(0, rows, rgb)
