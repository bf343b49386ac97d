# SPDX-License-Identifier: Apache-2.0
"""What each view adds to the voxels, and the table in which it is added up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.voxels import TokenMapError, group_equal, sum_groups, voxel_keys


@dataclass(frozen=True, eq=False)
class Contribution:
    """What one view adds: a row per voxel, voxels ascending.

    Attributes:
        keys: (R,) int64. features: (R, C) sums on the model's device, float32.
        count: (R,) int64, patches. xyz: (R, 3) float64, sums of points, scene frame. rgb: (R, 3) float64, sums of
            colours.
        points: (P, 3) float32, scene frame, the patches of the first row, then those of the next, and so on.
        level: (P,) bool, whether the surface faces up there.
        position: (R, H) float32, sums of the embedded points, on the device of the features. All others but the
            features are on the CPU.
        patches: (P, C) features of the patches, in their order and the kind of number in which they came.
        colours: (P, 3) uint8, theirs.
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
    patches: Tensor
    colours: Tensor
    order: int = 0

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in vars(self).values() if isinstance(value, Tensor))

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
            self.patches[patches],
            self.colours[patches],
            self.order,
        )

    def moved(self, T: NDArray[np.float64], origin: Tensor, voxel_size: float) -> Contribution:
        """What the view adds, without positions, if its points are where T (4, 4) takes them, scene frame, metres.

        Equal to what its patches add there. Which surfaces face up is as it was.

        Args:
            origin: (3,) float64, centre of voxel (0, 0, 0), scene frame, metres.

        Raises:
            TokenMapError: for a point that gets no voxel.
        """
        if not len(self.points):
            return self
        made = reduced(
            self.patches.to(self.features.device),
            transformed(self.points, T),
            self.colours,
            None,
            self.level,
            origin,
            voxel_size,
        )
        return replace(made, order=self.order)


def transformed(points: Tensor, T: NDArray[np.float64]) -> Tensor:
    """Points (..., 3) where T (4, 4) takes them, float32, computed in float64; where T is the identity, the same."""
    R, t = torch.from_numpy(T[:3, :3].copy()), torch.from_numpy(T[:3, 3].copy())
    return (points.double() @ R.T + t).float()


@torch.inference_mode(False)
@torch.no_grad()
def moved_views(
    views: Mapping[int, Contribution], moves: Mapping[int, NDArray[np.float64]], origin: Tensor, voxel_size: float
) -> dict[int, Contribution]:
    """Views of which some are moved, see `Contribution.moved`; raises TokenMapError for a move of none of them."""
    if unknown := [key for key in moves if key not in views]:
        raise TokenMapError(f"view {unknown[0]} is not in the map")
    return {**views, **{key: views[key].moved(T, origin, voxel_size) for key, T in moves.items()}}


def reduced(
    features: Tensor,
    xyz: Tensor,
    rgb: Tensor,
    valid: Tensor | NDArray[np.bool_] | None,
    level: Tensor | NDArray[np.bool_] | None,
    origin: Tensor,
    voxel_size: float,
) -> Contribution:
    """One view's patches as a row per voxel, without positions, see `TokenMap.add_view`.

    Args:
        origin: (3,) float64, centre of voxel (0, 0, 0), scene frame, metres.
    """
    n = len(xyz)
    if xyz.shape != (n, 3) or rgb.shape != (n, 3) or features.ndim != 2 or len(features) != n:
        raise TokenMapError(
            f"features {tuple(features.shape)}, points {tuple(xyz.shape)} and colours {tuple(rgb.shape)} disagree"
        )
    mask = torch.ones(n, dtype=torch.bool) if valid is None else torch.as_tensor(valid).cpu()
    up = torch.zeros(n, dtype=torch.bool) if level is None else torch.as_tensor(level).cpu()
    for name, flags in (("valid", mask), ("level", up)):
        if flags.shape != (n,) or flags.dtype != torch.bool:
            raise TokenMapError(f"{name} must be ({n},) bool, got {tuple(flags.shape)} {flags.dtype}")
    rows = torch.nonzero(mask)[:, 0]
    if not len(rows):
        raise TokenMapError(f"none of the {n} patches is valid")
    features, points, up = features.detach().index_select(0, rows.to(features.device)), xyz[rows].float(), up[rows]
    xyz, colours = xyz[rows].double(), rgb[rows].to(torch.uint8)
    rgb = rgb[rows].double()
    # The sum tells quickly that all are finite; only where it does not is it worth looking at each.
    if not bool(torch.isfinite(features.sum())) and not bool((finite := torch.isfinite(features)).all()):
        bad = int(rows[int(torch.nonzero(~finite.all(dim=1))[0])])
        raise TokenMapError(f"the feature of patch {bad} is not finite")
    order, inverse, keys, count = group_equal(voxel_keys((xyz - origin).float(), voxel_size))
    device_order = order.to(features.device)
    xyz, rgb, points, up = xyz[order], rgb[order], points[order], up[order]
    patches, colours = features.cpu()[order], colours[order]
    nothing = features.new_zeros(0, 0, dtype=torch.float32)
    features = sum_groups(features, device_order, count.to(features.device))
    sums = torch.zeros(len(keys), 3, dtype=torch.float64)
    xyz, rgb = sums.index_add(0, inverse, xyz), sums.index_add(0, inverse, rgb)
    return Contribution(keys, features, count, xyz, rgb, points, up, nothing, patches, colours)


def nothing(features: Tensor) -> Contribution:
    """What a view adds of which no patch is left; features (0, C)."""
    empty, rows = torch.zeros(0, 3, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    flags, colours = torch.zeros(0, dtype=torch.bool), torch.zeros(0, 3, dtype=torch.uint8)
    hidden = features.new_zeros(0, 0)
    return Contribution(rows, features, rows, empty, empty, empty.float(), flags, hidden, features.cpu(), colours)


class Sums:
    """A growing table of sums, one row a voxel, rows given out and taken back."""

    _TABLES = ("features", "position", "count", "xyz", "rgb")

    def __init__(self, like: Contribution) -> None:
        self.features = like.features.new_zeros(0, like.features.shape[1])
        self.position = like.position.new_zeros(0, like.position.shape[1])
        self.count = torch.zeros(0, dtype=torch.int64)
        self.xyz = torch.zeros(0, 3, dtype=torch.float64)
        self.rgb = torch.zeros(0, 3, dtype=torch.float64)
        self._free = torch.empty(0, dtype=torch.int64)

    @property
    def nbytes(self) -> int:
        return sum(table.numel() * table.element_size() for table in (getattr(self, name) for name in self._TABLES))

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
        self.features.index_add_(0, rows.to(self.features.device), features)
        self.count.index_add_(0, rows, count)
        self.xyz.index_add_(0, rows, xyz)
        self.rgb.index_add_(0, rows, rgb)
