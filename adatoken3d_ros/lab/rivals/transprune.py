# SPDX-License-Identifier: Apache-2.0
"""`transprune`: TransPrune (arXiv 2507.20630), what layers change stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from adatoken3d_ros.pruning.schedule import Schedule, scaled_to_depth, truncated
from adatoken3d_ros.pruning.scores import attention_of_last_rows, keep_top
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, PolicyError, Rope, Selection


@dataclass(frozen=True)
class TransPrune:
    """How much the layers so far have changed a token, and the attention that the question pays it in the next layer.

    A layer's attention and its MLP each count with the length of what they give over that of what they are given, times
    the exponential of 1 - cosine of both, as a share of all rows'. Both halves of the score are scaled to sum to 1.
    Positions are renumbered after each drop, as in its code.

    Attributes:
        watched: of 32 layers, the first and the last one, counted from 1, whose changes are added up.
        attention: with the attention; without, it costs no more than reading the states.
    """

    watched: tuple[int, int] = (7, 12)
    attention: bool = True
    name: str = "transprune"
    rope: Rope = "renumber"
    kept = staticmethod(truncated)

    def watches(self, layer: int, n_layers: int) -> bool:
        first, last = (max(1, at * n_layers // 32) for at in self.watched)
        return first <= layer + 1 <= last

    def change(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.stack([_change(given.float(), gave.float()) for given, gave in parts]).sum(0)

    def select(self, view: GateView) -> Selection:
        if view.changed is None:
            raise PolicyError(f"{self.name} ranks by what layers change; none is watched before layer {view.layer}")
        scores = view.changed / view.changed.sum()
        if self.attention:
            n = view.n_question
            keys = view.above.keys(view.hidden, view.cos, view.sin)
            queries = view.above.queries(view.hidden[-n:], view.cos[-n:], view.sin[-n:])
            paid = attention_of_last_rows(queries, keys, view.above.scaling)[view.spatial]
            scores = scores + paid / paid.sum()
        return Selection(keep_top(scores, view.n_keep), scores)

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_to_depth([7, 9, 12], [0.875, 0.625, 0.125], n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        # Two lengths and a product of each part's rows, in each watched layer that the last gate had not seen: two.
        watching = 2 * 2 * 6.0 * gate.n_rows * decoder.hidden
        if not self.attention:
            return watching
        keys = 2.0 * gate.n_rows * decoder.hidden * decoder.keys
        queries = 2.0 * gate.n_question * decoder.queries * (decoder.hidden + gate.n_rows)
        return watching + keys + queries


def _change(given: Tensor, gave: Tensor) -> Tensor:
    """(q,) of rows (q, D)."""
    turn = (1 - cosine_similarity(given, gave, dim=1)).exp()
    return gave.norm(dim=1) / given.norm(dim=1) * turn / turn.sum()
