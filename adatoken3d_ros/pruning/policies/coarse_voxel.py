# SPDX-License-Identifier: Apache-2.0
"""`coarse_voxel` and `one_per_voxel`: the scene at a coarser resolution, which needs no model.

A place that several views have seen is several tokens of a model whose tokens are those of views: here they become one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection


@dataclass(frozen=True)
class CoarseVoxel:
    """The finest cubic grid with at most k occupied cells, each cell one token.

    A grid seldom has exactly k occupied cells: slots left over go to further tokens of the fullest cells.

    Attributes:
        merge: the token of a cell is the mean of all, without those that have slots of their own: of their states at
            the gate (before the language model: of projected features), at the row and position of the cell's first
            token. False: it is the one that was seen best (`SceneTokens.seen`; the first of equals), as it is and where
            it is; slots left over go to the second of each cell, fuller cells first, then to the third.
    """

    name: str = "coarse_voxel"
    merge: bool = True
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        scene = view.scene_for(self.name)
        cell = coarsest_cells(scene.xyz[view.alive], view.n_keep)
        if not self.merge:
            seen = torch.zeros_like(cell) if scene.seen is None else scene.seen[view.alive]
            return Selection(best_of_each(cell, seen, view.n_keep))
        n_cells, order = int(cell.max()) + 1, torch.arange(len(cell), device=cell.device)
        first = torch.full((n_cells,), len(cell), device=cell.device).scatter_reduce(0, cell, order, "amin")
        size = cell.bincount(minlength=n_cells)
        spare = torch.ones_like(cell, dtype=torch.bool).index_fill(0, first, False)
        extra = order[spare][size[cell[spare]].argsort(descending=True, stable=True)][: view.n_keep - n_cells]
        cell = cell.index_put((extra,), n_cells + torch.arange(len(extra), device=cell.device))
        keep, by_row = torch.cat([first, extra]).sort()
        states = view.hidden[view.spatial].float()
        sums = torch.zeros(view.n_keep, states.shape[-1], device=states.device).index_add_(0, cell, states)
        means = sums / cell.bincount(minlength=view.n_keep)[:, None]
        return Selection(keep, merged=means[by_row].to(view.hidden.dtype), groups=by_row.argsort()[cell])

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.36])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return float(gate.n_spatial * decoder.hidden) if self.merge else 0.0


def coarsest_cells(xyz: Tensor, k: int) -> Tensor:
    """Cell (n,) of points `xyz` (n, 3) in the finest cubic grid with at most `k` cells occupied, by bisection."""
    points = xyz.double() - xyz.double().amin(0)
    coarse, fine = 2 * float(points.max()) + 1e-6, 0.0
    best = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for _ in range(40):
        size = (coarse + fine) / 2
        cell = (points / size).floor().unique(dim=0, return_inverse=True)[1]
        if int(cell.max()) + 1 <= k:
            coarse, best = size, cell
        else:
            fine = size
    return best


def best_of_each(cell: Tensor, seen: Tensor, k: int) -> Tensor:
    """(k,) int64 rising: of each cell (n,) the token with the highest `seen` (n,), then each cell's second, and so on.

    Of equal ones in a cell the first comes first; of cells of which not all have a turn, the fullest, then those with
    the first tokens.
    """
    order = seen.argsort(descending=True, stable=True)
    order = order[cell[order].argsort(stable=True)]
    size, places = cell.bincount(), torch.arange(len(cell), device=cell.device)
    turn = torch.empty_like(cell)
    turn[order] = places - (size.cumsum(0) - size)[cell[order]]
    return (turn * (len(cell) + 1) - size[cell]).argsort(stable=True)[:k].sort().values
