# SPDX-License-Identifier: Apache-2.0
"""`visionzip`: VisionZip (arXiv 2412.04467), what the vision tower itself looks at, and a digest of the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection


@dataclass(frozen=True)
class VisionZip:
    """The tokens that the vision tower's class token attends to most, and means of the others, before the model.

    Of the others every so-many-th is the target of those that are most like it, and becomes their mean with it. The
    original compares the tower's keys, and adds the mean of the merged to their target; here they are compared and
    averaged as the language model reads them.

    Attributes:
        contextual: share of the kept tokens that are such means; 10 of 64, 20 of 128 and 30 of 192 as published.
    """

    contextual: float = 10 / 64
    name: str = "visionzip"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def __post_init__(self) -> None:
        if not 0.0 <= self.contextual < 1.0:
            raise PolicyError(f"contextual {self.contextual} is outside [0, 1)")

    def select(self, view: GateView) -> Selection:
        attended = attention_of_tower(self.name, view)
        n, device = len(attended), attended.device
        n_targets = int(self.contextual * view.n_keep)
        order = attended.argsort(descending=True, stable=True)
        dominant = order[: view.n_keep - n_targets]
        others = order[view.n_keep - n_targets :].sort().values
        at = torch.arange(n_targets, device=device) * max(1, len(others) // max(1, n_targets))
        targets = others[at]
        states = view.hidden[view.spatial].float()
        groups = torch.full((n,), -1, device=device)
        groups[targets] = targets
        if n_targets:
            merged = others[~torch.isin(others, targets)]
            unit = normalize(states, dim=-1)
            groups[merged] = targets[(unit[merged] @ unit[targets].T).argmax(1)]
        keep = torch.cat([dominant, targets]).sort().values
        return Selection(keep, merged=_means(states, groups, targets)[keep].to(view.hidden.dtype))

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.111])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        n_targets = int(self.contextual * gate.n_keep)
        return 2.0 * decoder.hidden * n_targets * (gate.n_spatial - gate.n_keep) + decoder.hidden * gate.n_spatial


def attention_of_tower(policy: str, view: GateView) -> Tensor:
    """Attention (n,) of the vision tower's class token to the tokens that are left.

    Raises:
        PolicyError: the model's tower has no class token, or nobody has kept what it attends to.
    """
    attended = view.scene_for(policy).attended
    if attended is None:
        raise PolicyError(f"{policy} ranks by the attention of the vision tower's class token, and none is given")
    return attended[view.alive].float()


def _means(states: Tensor, groups: Tensor, targets: Tensor) -> Tensor:
    """`states` (n, D), of which those of `targets` are the means of their groups (n,)."""
    means, member = states.clone(), groups >= 0
    sums = torch.zeros_like(states).index_add_(0, groups[member], states[member])
    counts = groups[member].bincount(minlength=len(states))
    means[targets] = sums[targets] / counts[targets, None]
    return means
