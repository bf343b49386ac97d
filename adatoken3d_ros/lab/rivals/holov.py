# SPDX-License-Identifier: Apache-2.0
"""`holov`: HoloV (arXiv 2510.02912), every part of a picture has its share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adatoken3d_ros.lab.rivals.visionzip import attention_of_tower
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.scores import keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection

_EPSILON = 1e-6


@dataclass(frozen=True)
class HoloV:
    """Parts of the sequence get slots by their scores, and in each the most attended tokens stay, before the model.

    A part's score is the mean over its tokens of the attention that the vision tower's class token pays, and `alpha`
    times the variance of the token's cosines with the others of the part, brought to the same mean.

    The original fills with empty tokens where a part has more slots than tokens; here the most attended of the others
    take those slots.

    Attributes:
        parts: as equal as the number of tokens lets them be.
        alpha: weight of the variance, as published.
    """

    parts: int = 16
    alpha: float = 0.09
    name: str = "holov"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def __post_init__(self) -> None:
        if self.parts < 1:
            raise PolicyError(f"parts {self.parts} must be at least 1")

    def select(self, view: GateView) -> Selection:
        attended = attention_of_tower(self.name, view)
        states = view.hidden[view.spatial].float()
        bounds = [len(part) for part in torch.arange(len(attended)).tensor_split(self.parts) if len(part)]
        parts = torch.arange(len(attended), device=attended.device).split(bounds)
        scores = torch.stack([part_score(states[part], attended[part], self.alpha) for part in parts])
        slots = shares(scores, view.n_keep).tolist()
        keep = torch.cat([part[keep_top(attended[part], n)] for part, n in zip(parts, slots, strict=True)])
        missing = view.n_keep - len(keep)
        if missing > 0:
            keep = torch.cat([keep, keep_top(attended.index_fill(0, keep, -torch.inf), missing)])
        return Selection(keep.sort().values)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.111])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 2.0 * decoder.hidden * gate.n_spatial**2 / self.parts


def part_score(states: Tensor, attended: Tensor, alpha: float) -> Tensor:
    """Score () of the tokens of a part: `states` (n, D), `attended` (n,)."""
    n = len(states)
    if n < 2:
        return attended.mean()
    unit = normalize(states, dim=-1)
    cosines = (unit @ unit.T).fill_diagonal_(0.0)
    mean = cosines.sum(1, keepdim=True) / (n - 1)
    # As published: the diagonal's zero is a deviation from the mean as well.
    variance = (cosines - mean).square().sum(1) / (n - 1)
    attention = attended * 1e3
    scale = attention.abs().mean() / (variance.abs().mean() + _EPSILON)
    return (attention + alpha * scale * variance).mean()


def shares(scores: Tensor, k: int) -> Tensor:
    """(parts,) int64 slots that add up to k: in proportion to the scores, rounded down, the rest to the best ones."""
    weights = scores / (scores.sum() + _EPSILON)
    slots = (weights * k).floor().long()
    left = k - int(slots.sum())
    best = weights.argsort(descending=True, stable=True)
    slots[best] += left // len(scores)
    slots[best[: left % len(scores)]] += 1
    return slots
