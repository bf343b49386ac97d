# SPDX-License-Identifier: Apache-2.0
"""`fastv`: FastV (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass

from adatoken3d_ros.pruning.schedule import Schedule, rounded_from_removed, scaled_to_depth
from adatoken3d_ros.pruning.scores import keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection, attention_flops


@dataclass(frozen=True)
class FastV:
    """Attention of the prompt's last row at layer g-1, mean over heads, positions kept.

    The original reads full attention maps from an eager layer; this one row from the cached keys is the same number, at
    less than the original's cost.
    """

    name: str = "fastv"
    rope: Rope = "original"
    kept = staticmethod(rounded_from_removed)

    def select(self, view: GateView) -> Selection:
        scores = view.attention_below(self.name, rows=1)
        return Selection(keep_top(scores, view.n_keep), scores)

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_to_depth([2], [0.5], n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return attention_flops(decoder, gate, rows=1)
