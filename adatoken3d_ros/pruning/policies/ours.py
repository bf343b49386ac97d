# SPDX-License-Identifier: Apache-2.0
"""`ours`: what the question looks at, and some of everything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from adatoken3d_ros.pruning.schedule import Schedule, at_least_one, scaled_to_depth
from adatoken3d_ros.pruning.scores import diverse_features, keep_top, likeness, position_bias, sink_tokens
from adatoken3d_ros.pruning.view import (
    DecoderSize,
    GateSize,
    GateView,
    PolicyError,
    Rope,
    Selection,
    attention_flops,
)


@dataclass(frozen=True, eq=False)
class Ours:
    """Attention that the whole question pays, read off the keys that layer g-1 has cached anyway.

    At g = 0 nobody has attended yet: tokens that are like a word of the question, and those that differ most in what
    they show and where (`SceneTokens.order`), in their states alone where no positions are given.

    Attributes:
        rows: "question" for all rows after the spatial tokens, "last" for the last one.
        coverage: share of the slots given to the first tokens in that order of the scene, whatever their score, so that
            counting and grounding survive; the best of the others get the rest. None for 0.1 where positions are given,
            0 where they are not.
        named: share of the slots at g = 0 that go to the tokens most like one of the words behind them (`likeness`);
            whether tokens and words can be compared there depends on the model, so it is measured before it is used.
        debias: m numbers, the mean score to expect along the relative position of a token, which the scores are
            divided by; empty for no correction (`information.position_curve` measures them).
        sink_dims: activations that mark attention sinks, which then rank last; they belong to the language model
            (`calibration.massive_dims` finds them).
        sink_threshold: how huge such an activation is, as a multiple of the row's root mean square.
    """

    rows: Literal["question", "last"] = "question"
    coverage: float | None = None
    named: float = 0.0
    debias: Sequence[float] = ()
    sink_dims: Sequence[int] = ()
    sink_threshold: float = 20.0
    name: str = "ours"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def __post_init__(self) -> None:
        if self.rows not in ("question", "last"):
            raise PolicyError(f"rows {self.rows!r} is neither 'question' nor 'last'")
        if self.coverage is not None and not 0.0 <= self.coverage <= 1.0:
            raise PolicyError(f"coverage {self.coverage} is outside [0, 1]")
        if not 0.0 <= self.named <= 1.0:
            raise PolicyError(f"named {self.named} is outside [0, 1]")
        for value in self.debias:
            if isinstance(value, str) or not 0.0 < value < math.inf:
                raise PolicyError(f"debias holds {value!r}, expected positive, finite numbers")
        for dim in self.sink_dims:
            if not isinstance(dim, int) or dim < 0:
                raise PolicyError(f"sink_dims holds {dim!r}, expected indices of the hidden state")

    @property
    def blind_at_start(self) -> bool:
        return self.named == 0.0

    def select(self, view: GateView) -> Selection:
        if any(dim >= view.hidden.shape[-1] for dim in self.sink_dims):
            raise PolicyError(f"sink_dims {list(self.sink_dims)} for a model of hidden size {view.hidden.shape[-1]}")
        if view.layer == 0:
            return Selection(self._first(view))
        scores = view.attention_below(self.name, 1 if self.rows == "last" else view.n_question)
        ranked = scores
        if self.debias:
            curve = torch.tensor(self.debias, dtype=torch.float32, device=scores.device)
            ranked = ranked / position_bias(curve, view.alive, view.n_total)
        if self.sink_dims:
            sinks = sink_tokens(view.hidden[view.spatial], tuple(self.sink_dims), self.sink_threshold)
            ranked = ranked.masked_fill(sinks, -1.0)
        n_spread = self._spread_slots(view)
        if n_spread > 0:
            # Alive: every gate before kept as many of this order or more, unless its scores were NaN. The trace says so
            # in the end; an index beyond the last would before be an error without a name, and end a GPU's context.
            spread = view.scene_for(self.name).first(n_spread)
            places = torch.searchsorted(view.alive, spread).clamp_(max=len(view.alive) - 1)
            ranked = ranked.index_fill(0, places, torch.inf)
        keep = keep_top(ranked, view.n_keep)
        return Selection(keep, scores)

    def _spread_slots(self, view: GateView) -> int:
        share = (0.0 if view.scene is None else 0.1) if self.coverage is None else self.coverage
        return math.floor(share * view.n_keep)

    def _first(self, view: GateView) -> Tensor:
        tokens, n_named = view.hidden[view.spatial], math.floor(self.named * view.n_keep)
        scene = None if view.scene is None else view.scene_for(self.name)
        order = diverse_features(tokens, view.n_keep) if scene is None else scene.first(view.n_keep)
        if n_named == 0:
            return order.sort().values
        stays = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        stays[keep_top(likeness(tokens, view.hidden[-view.n_question :]), n_named)] = True
        stays[order[~stays[order]][: view.n_keep - n_named]] = True
        return stays.nonzero()[:, 0]

    def default_schedule(self, n_layers: int) -> Schedule:
        return scaled_to_depth([2, 8, 16], [0.5, 0.25, 0.125], n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        # Its part of the scene's order, as if that were not made once for all questions, and ahead of them.
        if gate.layer == 0:
            words = gate.n_question if math.floor(self.named * gate.n_keep) else 0
            return 2.0 * decoder.hidden * (gate.n_keep + words) * gate.n_spatial
        n_spread = math.floor((0.1 if self.coverage is None else self.coverage) * gate.n_keep)
        spread = 2.0 * decoder.hidden * n_spread * gate.n_spatial
        return spread + attention_flops(decoder, gate, 1 if self.rows == "last" else gate.n_question)
