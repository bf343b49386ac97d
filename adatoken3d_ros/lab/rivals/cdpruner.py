# SPDX-License-Identifier: Apache-2.0
"""`cdpruner`: CDPruner (arXiv 2506.10967), a set of tokens that is both diverse and to the point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from adatoken3d_ros.pruning.schedule import Schedule, at_least_one
from adatoken3d_ros.pruning.view import DecoderSize, GateSize, GateView, Rope, Selection

_LEAST = 1e-6  # of the kernel's largest entry: what is left of a token that the chosen ones already span


@dataclass(frozen=True)
class CDPruner:
    """The k tokens of the largest determinant of r_i cos(i, j) r_j, chosen greedily, before the language model.

    r is the relevance to the question, the mean cosine of a token with the question's words, scaled to (0, 1]. The
    original has it from CLIP's two towers; where there is no text tower, words and tokens are compared as the language
    model reads them, as OpenVINO GenAI does for Qwen2.5-VL.

    Attributes:
        negate: the less a token is like the words, the more relevant: as published, because CLIP's patches are less
            like the words that name them than the background is.
    """

    negate: bool = True
    name: str = "cdpruner"
    rope: Rope = "original"
    kept = staticmethod(at_least_one)

    def select(self, view: GateView) -> Selection:
        tokens = normalize(view.hidden[view.spatial].float(), dim=-1)
        words = normalize(view.hidden[-view.n_question :].float(), dim=-1)
        r = relevance(tokens @ words.T, negate=self.negate)
        return Selection(greedy_map(r[:, None] * (tokens @ tokens.T) * r, view.n_keep).sort().values)

    def default_schedule(self, n_layers: int) -> Schedule:
        return Schedule.of([0], [0.111])

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        products = 2.0 * decoder.hidden * gate.n_spatial * (gate.n_spatial + gate.n_question)
        return products + gate.n_spatial * float(gate.n_keep) ** 2


def relevance(cosines: Tensor, *, negate: bool) -> Tensor:
    """(n,) of cosines (n, m) of n tokens with m words: their mean, scaled so that the best has 1; equal ones have 1."""
    mean = cosines.mean(1) * (-1.0 if negate else 1.0)
    low, high = mean.aminmax()
    return (mean - low + _LEAST) / (high - low) if bool(high > low) else torch.ones_like(mean)


def greedy_map(kernel: Tensor, k: int) -> Tensor:
    """Indices (k,) of the greedy maximum a posteriori set of a determinantal point process (arXiv 1709.05135).

    Args:
        kernel: (n, n), symmetric, positive semi-definite.

    The next is always the one that adds most to the determinant. A kernel of low rank is spanned before k are chosen;
    those with the largest entry on its diagonal follow.
    """
    diagonal = kernel.diagonal().clone()
    left, rows, chosen = diagonal.clone(), kernel.new_empty(k, len(kernel)), kernel.new_empty(k, dtype=torch.long)
    for i in range(k):
        best = left.argmax()
        if bool(left[best] <= _LEAST * diagonal.max()):
            rest = diagonal.index_fill(0, chosen[:i], -torch.inf).argsort(descending=True, stable=True)
            chosen[i:] = rest[: k - i]
            break
        chosen[i] = best
        rows[i] = (kernel[best] - rows[:i, best] @ rows[:i]) / left[best].sqrt()
        left = (left - rows[i].square()).index_fill(0, chosen[: i + 1], -torch.inf)
    return chosen
