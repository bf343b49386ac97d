# SPDX-License-Identifier: Apache-2.0
"""`bypass`: gates to which dropped tokens come back, after SwiftVLM (arXiv 2602.03134)."""

from __future__ import annotations

from dataclasses import dataclass

from adatoken3d_ros.pruning.policies.ours import Ours
from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.scores import attention_of_last_rows, keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection


@dataclass(frozen=True)
class Bypass:
    """Attention that the question pays in the next layer, to all tokens: those dropped before go around the layers
    between two gates and are candidates again, as they were.

    The layer below has no keys of them, so keys of all tokens are made of the next layer's projection and thrown away.
    """

    bypass: bool = True
    name: str = "bypass"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        n = view.n_question
        keys = view.above.keys(view.hidden, view.cos, view.sin)
        queries = view.above.queries(view.hidden[-n:], view.cos[-n:], view.sin[-n:])
        scores = attention_of_last_rows(queries, keys, view.above.scaling)[view.spatial]
        return Selection(keep_top(scores, view.n_keep), scores)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Ours().default_schedule(n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        n_rows = gate.n_rows + (max(gate.n_total - gate.n_spatial, 0) if self.bypass else 0)
        keys = 2.0 * n_rows * decoder.hidden * decoder.keys
        return keys + 2.0 * gate.n_question * decoder.queries * (decoder.hidden + n_rows)
