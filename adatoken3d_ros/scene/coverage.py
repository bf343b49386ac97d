# SPDX-License-Identifier: Apache-2.0
"""Which views hold which voxels: what is lost without one, kept up as views go, and which few show most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Coverage:
    """What each view would be missed for. A view that goes costs what it held, not what all hold.

    Args:
        held: by view, (R,) int64 keys of its voxels in ascending order; one may come twice in a row.
    """

    def __init__(self, held: Mapping[int, Tensor]) -> None:
        own = [torch.unique_consecutive(keys) for keys in held.values()]
        joined = torch.cat([torch.empty(0, dtype=torch.int64), *own])
        _, voxels, self._holders = torch.unique(joined, return_inverse=True, return_counts=True)
        sizes = torch.tensor([len(keys) for keys in own], dtype=torch.int64)
        numbers = torch.repeat_interleave(torch.arange(len(own)), sizes)
        # Where one view is left in a voxel, the sum of the numbers of its views is that view's.
        self._sum = torch.zeros_like(self._holders).index_add_(0, voxels, numbers)
        alone = numbers[self._holders[voxels] == 1]
        self._exclusive = torch.bincount(alone, minlength=len(own))
        self._rows = dict(zip(held, torch.split(voxels, sizes.tolist()), strict=True))
        self._number = {view: number for number, view in enumerate(held)}
        self.n_voxels = len(self._holders)  # that a view holds

    def __len__(self) -> int:
        """Number of views."""
        return len(self._rows)

    def exclusive(self) -> dict[int, int]:
        """Of each view, how many voxels no other view holds: the coverage that is lost without it."""
        counts = self._exclusive.tolist()
        return {view: counts[self._number[view]] for view in self._rows}

    def remove(self, view: int) -> None:
        """The view goes. Raises KeyError if there is none."""
        rows = self._rows.pop(view)
        self._holders[rows] -= 1
        self._sum[rows] -= self._number[view]
        left = self._holders[rows]
        self.n_voxels -= int((left == 0).sum())
        self._exclusive += torch.bincount(self._sum[rows[left == 1]], minlength=len(self._exclusive))

    def greedy(self, oldest_first: Sequence[int], limit: int, first: Sequence[int] = ()) -> tuple[int, ...]:
        """At most `limit` of the views, oldest first: each adds the most new voxels (ties: the newest).

        Those of `first` are chosen before all others.
        """
        left, missing = list(oldest_first), torch.ones(len(self._holders), dtype=torch.bool)
        chosen: list[int] = []
        while left and len(chosen) < limit:
            wanted = [view for view in left if view in first] or left
            gain = {view: int(missing[self._rows[view]].sum()) for view in wanted}
            best = max(reversed(wanted), key=gain.__getitem__)  # of equal ones the first that comes
            missing[self._rows[best]] = False
            left.remove(best)
            chosen.append(best)
        return tuple(view for view in oldest_first if view in chosen)
