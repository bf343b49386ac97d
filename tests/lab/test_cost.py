# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from functools import partial

import pytest

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.lab.cost import FlopsCost, LatencyCost, cost_share, time_layer
from adatoken3d_ros.pruning.flops import prefill_flops
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.view import DecoderSize
from tests.lab.conftest import N_LAYERS, LinearCost, samples


def test_cost_share_by_hand() -> None:
    # Layers: 1, 0.55, 0.55, 0.1
    schedule = Schedule.of([1], [0.5], withdraw_layer=3)
    assert cost_share(LinearCost(), schedule, 4) == pytest.approx((1 + 0.55 + 0.55 + 0.1) / 4)
    assert cost_share(LinearCost(), Schedule(), 4) == 1.0


def test_flops_cost_counts_what_the_accounting_counts(decoder: Decoder) -> None:
    some = samples()
    cost = FlopsCost(decoder.size, some)
    schedule = Schedule.of([1, 3], [0.5, 0.2], withdraw_layer=4)
    pruned = full = 0.0
    for sample in some:
        kept = schedule.counts(sample.n_spatial, N_LAYERS)
        pruned += prefill_flops(decoder.size, kept, sample.n_text) - lm_head_flops(decoder.size)
        full += prefill_flops(decoder.size, (sample.n_spatial,) * N_LAYERS, sample.n_text)
        full -= lm_head_flops(decoder.size)
    assert cost_share(cost, schedule, N_LAYERS) == pytest.approx(pruned / full)


def lm_head_flops(decoder: DecoderSize) -> float:
    return 2.0 * decoder.hidden * decoder.vocabulary


def test_measured_latency_never_falls_with_more_tokens(decoder: Decoder) -> None:
    cost = LatencyCost(partial(time_layer, decoder, repeats=1), samples(), [0.5, 0.1])
    shares = [cost.of_layer(ratio) for ratio in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0)]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1.0
    # 10 text tokens and 0, 10 or 20 spatial ones; 20 tokens were measured too slow.
    cost = LatencyCost(lambda counts: {10: 1.0, 20: 5.0, 30: 4.0}, samples(1), [0.5])
    assert [cost.of_layer(ratio) for ratio in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
