# SPDX-License-Identifier: Apache-2.0
"""What a schedule costs as a share of the unpruned model: counted in operations, or measured in time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab.machine import wait
from adatoken3d_ros.lab.probe import RATIOS, Progress, Sample, report
from adatoken3d_ros.pruning.flops import layer_flops
from adatoken3d_ros.pruning.schedule import Schedule, Stage
from adatoken3d_ros.pruning.view import DecoderSize


class Cost(Protocol):
    """What a decoder layer costs, as a share of what it costs with all spatial tokens."""

    def of_layer(self, ratio: float) -> float:
        """Share of the full cost when `ratio` of the spatial tokens is left (0: withdrawn)."""


def cost_share(cost: Cost, schedule: Schedule, n_layers: int) -> float:
    """Mean over the layers: the schedule's cost as a share of the unpruned one."""
    return statistics.fmean(cost.of_layer(ratio) for ratio in schedule.ratios(n_layers))


class FlopsCost:
    """Exact prefill FLOPs of a layer, summed over the samples."""

    def __init__(self, decoder: DecoderSize, samples: Sequence[Sample]) -> None:
        self._decoder = decoder
        self._samples = tuple(samples)
        self._full = self._flops(1.0)

    def of_layer(self, ratio: float) -> float:
        return self._flops(ratio) / self._full

    def _flops(self, ratio: float) -> float:
        return sum(layer_flops(self._decoder, s.n_text + _kept(s, ratio)) for s in self._samples)


class LatencyCost:
    """Measured time of a decoder layer, summed over the samples; between the measured ratios by interpolation.

    Args:
        measure: seconds of a layer on n tokens, for each n that it is given; see `time_layer`.
        ratios: those that are measured, beside none and all of the tokens.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[int]], Mapping[int, float]],
        samples: Sequence[Sample],
        ratios: Sequence[float] = RATIOS,
    ) -> None:
        self._ratios = np.array(sorted({0.0, 1.0, *ratios}))
        counts = [[s.n_text + _kept(s, ratio) for s in samples] for ratio in self._ratios]
        seconds = measure(sorted({n for row in counts for n in row}))
        # More tokens never take less time: what says otherwise is noise.
        totals = np.maximum.accumulate([sum(seconds[n] for n in row) for row in counts])
        self._shares = totals / totals[-1]

    def of_layer(self, ratio: float) -> float:
        return float(np.interp(ratio, self._ratios, self._shares))


def _kept(sample: Sample, ratio: float) -> int:
    return Schedule((Stage(0, ratio),)).counts(sample.n_spatial, 1)[0] if ratio > 0 else 0


@torch.inference_mode()
def time_layer(
    decoder: Decoder, counts: Sequence[int], *, repeats: int = 7, progress: Progress | None = None
) -> dict[int, float]:
    """Median seconds of the middle decoder layer on n tokens, for each n; counts are interleaved against drift."""
    layer, weight = decoder.layers[len(decoder) // 2], decoder.language.lm_head.weight
    states = torch.randn(
        1, max(counts), weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float32
    ).to(weight)
    cos, sin = decoder.rotary(states, torch.arange(max(counts), device=weight.device))
    times: dict[int, list[float]] = {n: [] for n in counts}
    for run in range(repeats + 1):
        for n in counts:
            wait(weight.device)
            start = time.perf_counter()
            layer.run(states[:, :n], (cos[:, :n], sin[:, :n]))
            wait(weight.device)
            if run > 0:  # the first run warms up
                times[n].append(time.perf_counter() - start)
        report(progress, run + 1, repeats + 1)
    return {n: statistics.median(found) for n, found in times.items()}
