# SPDX-License-Identifier: Apache-2.0
"""`framefusion`: FrameFusion (arXiv 2501.01986), for models whose tokens are those of views."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adatoken3d_ros.pruning.schedule import Schedule, truncated
from adatoken3d_ros.pruning.scores import keep_top
from adatoken3d_ros.pruning.view import (
    DecoderSize,
    GateSize,
    GateView,
    PolicyError,
    Rope,
    Selection,
    attention_flops,
)


@dataclass(frozen=True)
class FrameFusion:
    """What is like the token before it at the same place of the views becomes one with it; then the least attended go.

    At a gate the tokens whose cosine with the one before is highest, and at least `alike`, are merged, no more of them
    than are to go; a run of them is one mean. If that is not enough, those go to which the prompt's last row paid least
    attention in layer g-1. Before the first layer nothing has been attended to: there the bound does not count, and of
    tokens with none before them the first stay.

    The original merges in every early layer until less than a tenth is alike, and then prunes once, to a budget; here
    how many a layer sees is the schedule's, and what could not be merged goes at the same gate.

    Attributes:
        alike: least cosine, as published.
    """

    alike: float = 0.6
    name: str = "framefusion"
    rope: Rope = "original"
    kept = staticmethod(truncated)

    def __post_init__(self) -> None:
        if not -1.0 <= self.alike <= 1.0:
            raise PolicyError(f"alike {self.alike} is outside [-1, 1]")

    def select(self, view: GateView) -> Selection:
        scene = view.scene_for(self.name)
        if scene.views is None:
            raise PolicyError(f"{self.name} compares views, and this model's tokens are those of no view")
        n_gone = len(view.alive) - view.n_keep
        states = view.hidden[view.spatial].float()
        alike = self.alike if view.layer else -torch.inf
        head = heads(states, scene.views[view.alive], n_gone, alike)
        left = (head == torch.arange(len(head), device=head.device)).nonzero()[:, 0]
        if len(left) > view.n_keep:
            first = torch.arange(0, -len(head), -1.0, device=head.device)
            scores = view.attention_below(self.name, 1) if view.layer else first
            left = left[keep_top(scores[left], view.n_keep)]
        sums = torch.zeros_like(states).index_add_(0, head, states)
        means = sums[left] / head.bincount(minlength=len(head))[left, None]
        return Selection(left, merged=means.to(view.hidden.dtype))

    def default_schedule(self, n_layers: int) -> Schedule:
        # Merging in early layers, then pruning to 30 % of the cost, the published budget.
        return Schedule.of([1, 2], [0.5, 0.26]) if n_layers > 2 else Schedule.of([1], [0.3])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        compared = 7.0 * decoder.hidden * gate.n_spatial
        return compared + (attention_flops(decoder, gate, 1) if gate.layer else 0.0)


def heads(states: Tensor, views: Tensor, most: int, alike: float) -> Tensor:
    """(n,) int64: the token that each becomes one with, itself where it stays.

    Args:
        states: (n, D). views: (n, 2), see `SceneTokens.views`. most: so many may be merged. alike: least cosine with
            the token before at the same place, in whichever view that is.
    """
    number, cell = views.unbind(1)
    order = (cell * (int(number.max()) + 1) + number).argsort()
    one, place = states[order], cell[order]
    likeness = torch.full((len(order),), -torch.inf, device=states.device)
    likeness[1:] = cosine_similarity(one[1:], one[:-1], dim=1).masked_fill(place[1:] != place[:-1], -torch.inf)
    best = keep_top(likeness, most)
    merged = torch.zeros_like(likeness, dtype=torch.bool)
    merged[best[(likeness[best] >= alike) & (likeness[best] > -torch.inf)]] = True
    position = torch.arange(len(order), device=states.device)
    found = torch.empty_like(order)
    found[order] = order[position.masked_fill(merged, 0).cummax(0).values]
    return found
