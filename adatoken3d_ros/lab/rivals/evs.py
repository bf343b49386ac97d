# SPDX-License-Identifier: Apache-2.0
"""`evs`: Efficient Video Sampling (arXiv 2510.14624), for models whose tokens are those of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adatoken3d_ros.pruning.schedule import Schedule, truncated
from adatoken3d_ros.pruning.scores import keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection


@dataclass(frozen=True)
class EVS:
    """What differs most from the same place of the view before, before the language model; the first view comes first.

    A place that the view before has no token for is as new as the first view.
    """

    name: str = "evs"
    rope: Rope = "original"
    kept = staticmethod(truncated)

    def select(self, view: GateView) -> Selection:
        scene = view.scene_for(self.name)
        if scene.views is None:
            raise PolicyError(f"{self.name} compares views, and this model's tokens are those of no view")
        return Selection(keep_top(change(view.hidden[view.spatial], scene.views[view.alive]), view.n_keep))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.25])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 6.0 * decoder.hidden * gate.n_spatial


def change(states: Tensor, views: Tensor) -> Tensor:
    """(n,) 1 - cosine of `states` (n, D) with that of the same place in the view before; infinite without one.

    views: (n, 2), see `SceneTokens.views`.
    """
    number, cell = views.unbind(1)
    width = int(cell.max()) + 1
    place = number.unique(return_inverse=True)[1] * width + cell
    order = place.argsort()
    at = torch.searchsorted(place[order], place - width).clamp(max=len(place) - 1)
    before = order[at]
    found = place[before] == place - width
    gap = 1 - cosine_similarity(states.float(), states[before].float(), dim=1)
    return gap.masked_fill(~found, torch.inf)
