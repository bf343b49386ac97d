# SPDX-License-Identifier: Apache-2.0
"""Keeps a prefill in time once it runs: one that falls behind drops more tokens instead of being late."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median_low

from adatoken3d_ros.engine.latency import FloatArray, LatencyModel, decode_terms, read_terms

FACTORS = (0.5, 0.25, 0.0)  # of the tokens that are there, from the mildest drop to withdrawal
MOST = 3.0  # a layer that took more than this many times the median layer was interrupted, and counts as so many
MARGIN = 1.1  # on what this prefill's own pace predicts


class Hurry:
    """Asked before each layer (see `pruning.gate.prefill`): whether the rest and the shortest answer end in time.

    The rest is predicted by the latency model, with its guard or by how much slower this prefill has been so far than
    the model said, whichever is more. A layer that was interrupted once says little of the others, so the pace is a
    mean of what each layer took over its prediction in which none counts more than MOST times the (lower) median; an
    imagined layer that took what was predicted is one of them. If the rest would end too late the mildest of FACTORS
    that is in time is chosen, the strongest where none is. The first layer is never held back: the plan has just been
    made, and no layer was measured since.

    Args:
        latency: predicts.
        clock: seconds.
        until: when the answer must be there.
        counts: spatial tokens that each layer is planned to see.
        n_spatial, n_text: tokens of the prompt.
        answer_tokens: of the shortest answer.
        may_choose: the policy can drop some of the tokens, not only all.

    Attributes:
        drops: (layer, tokens that it would have seen, tokens that it sees) of each time that it was late.
    """

    def __init__(
        self,
        latency: LatencyModel,
        clock: Callable[[], float],
        until: float,
        counts: Sequence[int],
        n_spatial: int,
        n_text: int,
        *,
        answer_tokens: int,
        may_choose: bool = True,
    ) -> None:
        self.drops: list[tuple[int, int, int]] = []
        self._latency = latency
        self._clock = clock
        self._until = until
        self._planned = tuple(counts)
        self._counts = [n_spatial, *counts]  # layer g sees [g + 1]
        self._n_text = n_text
        self._steps = answer_tokens - 1  # the first token comes out of the prefill
        self._factors = FACTORS if may_choose else FACTORS[-1:]
        self._began = math.nan
        self._ratios = [1.0]

    def __call__(self, g: int, n: int) -> int | None:
        """How many of `n` spatial tokens the layers from g on may see; None for all."""
        now = self._clock()
        if g == 0:
            self._began = now
            return None
        expected = float(self._latency.p50("prefill", self._terms(g - 1, g, self._counts[g])))
        if expected > 0:
            self._ratios.append((now - self._began) / expected)
        self._began = now
        if n == 0 or now + self._rest(g, n) <= self._until:
            return None
        for factor in self._factors:
            kept = math.floor(factor * n)
            if now + self._rest(g, kept) <= self._until:
                break
        self.drops.append((g, n, kept))
        self._counts[g + 1 :] = [min(kept, count) for count in self._counts[g + 1 :]]
        return kept

    @property
    def pace(self) -> float:
        """How many times slower than predicted the layers have been so far."""
        most = MOST * median_low(self._ratios)
        return fmean(min(ratio, most) for ratio in self._ratios)

    @property
    def removed_share(self) -> float:
        """Share of all token-layers that was dropped beyond the plan."""
        return (sum(self._planned) - sum(self._counts[1:])) / max(1, self._counts[0] * len(self._planned))

    def _terms(self, first: int, end: int, most: int) -> FloatArray:
        """Terms of layers first..end-1, none of which sees more than `most` tokens."""
        counts = [min(most, count) for count in self._counts[first + 1 : end + 1]]
        return read_terms(counts, self._counts[first], self._n_text)

    def _rest(self, g: int, most: int) -> float:
        """Seconds that layers from g on and the shortest answer take, if they see at most so many tokens."""
        latency, n_layers = self._latency, len(self._planned)
        reading = float(latency.p50("prefill", self._terms(g, n_layers, most)))
        cached = sum(min(most, n) if i >= g else n for i, n in enumerate(self._counts[1:]))
        writing = latency.p95("decode", decode_terms(self._steps, cached + n_layers * self._n_text, n_layers))
        return reading * max(latency.ratios["prefill"].guard, MARGIN * self.pace) + float(writing)
