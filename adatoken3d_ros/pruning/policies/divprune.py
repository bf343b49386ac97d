# SPDX-License-Identifier: Apache-2.0
"""`divprune`: DivPrune (arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

from adatoken3d_ros.pruning.schedule import Schedule, rounded
from adatoken3d_ros.pruning.scores import diverse_features
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection


@dataclass(frozen=True)
class DivPrune:
    """Greedy max-min cosine distance of the tokens, before the language model."""

    name: str = "divprune"
    rope: Rope = "original"
    kept = staticmethod(rounded)

    def select(self, view: GateView) -> Selection:
        return Selection(diverse_features(view.hidden[view.spatial], view.n_keep).sort().values)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.098])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        return 2.0 * decoder.hidden * gate.n_spatial**2 + 2.0 * gate.n_keep * gate.n_spatial
