# SPDX-License-Identifier: Apache-2.0
"""`sparsevlm`: SparseVLM (arXiv 2410.04417), rated by the words that are about what is seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adatoken3d_ros.pruning.schedule import Schedule, scaled_to_depth, truncated
from adatoken3d_ros.pruning.scores import causal_attention, keep_top
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
class SparseVLM:
    """Attention that the raters pay in layer g-1, mean over heads; some of what goes is recycled into means.

    Raters are the question's words that the tokens, before the first layer, are more like than the mean word: softmax
    over the words of the products, mean over the tokens. Of the dropped tokens the best rated 30 % are clustered by
    density peaks, a tenth as many clusters as tokens, and each cluster's mean takes the place of its best rated token;
    these means are of the number to keep. How many tokens a layer sees is the schedule's, not the rank of its
    attention, as in the published code, which has lists.

    Attributes:
        recycle: merge so; SparseVLM+ does not.
    """

    recycle: bool = True
    name: str = "sparsevlm"
    rope: Rope = "original"
    kept = staticmethod(truncated)

    def select(self, view: GateView) -> Selection:
        if view.question is None or view.keys is None or view.below is None:
            raise PolicyError(f"{self.name} rates by the attention of the layer below; layer {view.layer} has none")
        n = view.n_question
        raters = text_raters(view.embeds[view.entered].float(), view.embeds[-n:].float())
        queries = view.below.queries(view.question, view.cos[-n:], view.sin[-n:])
        scores = torch.zeros(len(view.alive), device=view.hidden.device)
        for row, found in causal_attention(queries, view.keys, view.below.scaling):
            mine = raters[row : row + found.shape[1]]
            scores += found.mean(0)[mine].sum(0)[view.spatial]
        scores /= raters.sum()
        n_means = recycled(len(scores), view.n_keep) if self.recycle else 0
        keep = keep_top(scores, view.n_keep - n_means)
        if not n_means:
            return Selection(keep, scores)
        states = view.hidden[view.spatial].float()
        dropped = torch.ones_like(scores, dtype=torch.bool).index_fill(0, keep, False).nonzero()[:, 0]
        pool = dropped[keep_top(scores[dropped], int(0.3 * len(dropped)) + 1)]
        group = clusters(states[pool], n_means)
        best = torch.stack([pool[group == c][scores[pool[group == c]].argmax()] for c in range(n_means)])
        states[best] = torch.stack([states[pool[group == c]].mean(0) for c in range(n_means)])
        keep = torch.cat([keep, best]).sort().values
        return Selection(keep, scores, merged=states[keep].to(view.hidden.dtype))

    def default_schedule(self, n_layers: int) -> Schedule:
        # After layers 2, 6 and 15; the published lists of 192 tokens on average, of 576.
        return scaled_to_depth([3, 7, 16], [300 / 576, 200 / 576, 110 / 576], n_layers)

    def flops(self, decoder: DecoderSize, gate: GateSize) -> float:
        rating = 2.0 * decoder.hidden * gate.n_spatial * gate.n_question
        dropped = gate.n_spatial - gate.n_keep
        pool = 0.3 * dropped + 1 if self.recycle and recycled(gate.n_spatial, gate.n_keep) else 0.0
        return rating + attention_flops(decoder, gate, gate.n_question) + 2.0 * decoder.hidden * pool**2


def text_raters(tokens: Tensor, words: Tensor) -> Tensor:
    """Mask (m,) of the words (m, D) that tokens (n, D) are more like than the mean word; never none."""
    likeness = (tokens @ words.T).softmax(1).mean(0)
    raters = likeness > likeness.mean()
    return raters if bool(raters.any()) else torch.ones_like(raters)


def recycled(n: int, n_keep: int) -> int:
    """Means among `n_keep` of n tokens: a tenth of 30 % of what is dropped and of themselves, at most all but one."""
    for means in range(1, n_keep):
        if int((int(0.3 * (n - n_keep + means)) + 1) / 10) + 1 <= means:
            return means
    return 0


def clusters(states: Tensor, k: int) -> Tensor:
    """Cluster (n,) of `states` (n, D), 0 to k - 1: nearest of the k density peaks (Rodriguez and Laio, 2014).

    A peak is dense, by the mean square of its k smallest distances, and far from all that is denser; of equally dense
    ones the first counts as denser.
    """
    apart = torch.cdist(states, states) / states.shape[1] ** 0.5
    density = (-apart.topk(k, largest=False).values.square().mean(1)).exp()
    index = torch.arange(len(states), device=states.device)
    denser = (density[None] > density[:, None]) | ((density[None] == density[:, None]) & (index[None] < index[:, None]))
    to_denser = torch.where(denser, apart, apart.max()).amin(1)
    peaks = (to_denser * density).argsort(descending=True, stable=True)[:k]
    group = apart[:, peaks].argmin(1)
    group[peaks] = torch.arange(k, device=states.device)
    return group
