# SPDX-License-Identifier: Apache-2.0
"""`coarse_voxel`: the scene at a coarser resolution, the control that needs no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection


@dataclass(frozen=True)
class CoarseVoxel:
    """The finest cubic grid with at most k occupied cells, each cell one token, the mean of its tokens.

    A grid seldom has exactly k occupied cells: slots left over go to further tokens of the fullest cells, which then
    are not part of a mean. Means are of the states at the gate (before the language model: of projected features) and
    stand at the row and position of the cell's first token.
    """

    name: str = "coarse_voxel"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        cell = coarsest_cells(view.scene_for(self.name).xyz[view.alive], view.n_keep)
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
        return float(gate.n_spatial * decoder.hidden)


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
