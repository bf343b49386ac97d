# SPDX-License-Identifier: Apache-2.0
"""Keeps a prefill in time once it runs: one that falls behind drops more tokens instead of being late."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, median_low

from adatoken3d_ros.engine.budget.latency import LatencyModel, decode_terms, read_terms

FACTORS = (0.5, 0.25, 0.0)  # of the tokens that are there, from the mildest drop to withdrawal
MOST = 3.0  # a layer that took more than this many times the median layer was interrupted, and counts as so many
MARGIN = 1.1  # on what how slow this prefill has been predicts


class Hurry:
    """Asked before each layer (see `decoder.prefill.prefill`): whether the rest and the answer end in time.

    Two things must hold. The rest as planned must be likely to end in time, as predicted by the latency model's median
    with a margin, or by how much slower this prefill has been so far than the model said. And it must be safe to wait:
    should this layer and all others take as long as 19 of 20 do, withdrawing the scene behind this layer must still be
    enough, since that can be decided before the next one. What only may turn out late is thus not dropped before it has
    to be. If one does not hold, the mildest of FACTORS for which both do is chosen, the strongest where none is.

    A layer that was interrupted once says little of the others, so `slower` is a mean of what each layer took over its
    prediction in which none counts more than MOST times the (lower) median; an imagined layer that took what was
    predicted is one of them. The first layer is never held back: the plan has just been made, and no layer was measured
    since.

    Args:
        latency: predicts.
        clock: seconds; on a GPU one that waits for the layers before, else launching them is all that it sees. It is
            read before each layer: what is decided later may be too late, and a layer takes much longer than launching
            the next one, which can no longer overlap with it.
        until: when the answer must be there.
        counts: spatial tokens that each layer is planned to see.
        n_spatial, n_text: tokens of the prompt.
        steps: decode steps of the answer that is to be written then.
        may_choose: the policy can drop some of the tokens, not only all.
        first_gate: the first layer before which the model lets tokens go.

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
        steps: int,
        may_choose: bool = True,
        first_gate: int = 0,
    ) -> None:
        self.drops: list[tuple[int, int, int]] = []
        self._latency = latency
        self._clock = clock
        self._until = until
        self._planned = tuple(counts)
        self._counts = [n_spatial, *counts]  # layer g sees [g + 1]
        self._n_text = n_text
        self._steps = steps
        self._factors = FACTORS if may_choose else FACTORS[-1:]
        self._first_gate = first_gate
        self._began = math.nan
        self._ratios = [1.0]

    def __call__(self, g: int, n: int) -> int | None:
        """How many of `n` spatial tokens the layers from g on may see; None for all."""
        now = self._clock()
        if g == 0:
            self._began = now
            return None
        layer = read_terms(self._counts[g : g + 1], self._counts[g - 1], self._n_text)
        expected = float(self._latency.p50("prefill", layer))
        if expected > 0:
            self._ratios.append((now - self._began) / expected)
        self._began = now
        if n == 0 or g < self._first_gate or self._in_time(g, n, now):
            return None
        for factor in self._factors:
            kept = math.floor(factor * n)
            if self._in_time(g, kept, now):
                break
        self.drops.append((g, n, kept))
        self._counts[g + 1 :] = [min(kept, count) for count in self._counts[g + 1 :]]
        return kept

    @property
    def slower(self) -> float:
        """How many times slower than predicted the layers have been so far."""
        most = MOST * median_low(self._ratios)
        return fmean(min(ratio, most) for ratio in self._ratios)

    @property
    def removed_share(self) -> float:
        """Share of all token-layers that was dropped beyond the plan."""
        return (sum(self._planned) - sum(self._counts[1:])) / max(1, self._counts[0] * len(self._planned))

    def _in_time(self, g: int, kept: int, now: float) -> bool:
        """Whether layers from g on may see so many tokens."""
        planned = [min(kept, count) for count in self._counts[g + 1 :]]
        slower = MARGIN * self.slower
        likely = self._rest(g, planned, max(MARGIN, slower))
        safe = self._rest(
            g, [planned[0], *[0] * (len(planned) - 1)], max(self._latency.ratios["prefill"].guard, slower)
        )
        return now + max(likely, safe) <= self._until

    def _rest(self, g: int, counts: Sequence[int], slower: float) -> float:
        """Seconds of layers from g on that see these tokens, so many times slower than predicted, and of the answer."""
        latency, n_layers = self._latency, len(self._planned)
        reading = float(latency.p50("prefill", read_terms(counts, self._counts[g], self._n_text)))
        cached = sum(self._counts[1 : g + 1]) + sum(counts) + n_layers * self._n_text
        return reading * slower + float(latency.p95("decode", decode_terms(self._steps, cached, n_layers)))
