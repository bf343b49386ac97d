# SPDX-License-Identifier: Apache-2.0
"""Counts by hand, and what no model can run."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.pruning.schedule import (
    KeepCount,
    Schedule,
    ScheduleError,
    Stage,
    at_least_one,
    in_buckets,
    rounded,
    rounded_from_removed,
    scaled,
    truncated,
)


def test_counts_of_pyramiddrop_on_a_scannet_scene() -> None:
    schedule = Schedule.of([8, 16, 24], [0.5, 0.25, 0.125])
    assert schedule.counts(1659, 32) == (1659,) * 8 + (829,) * 8 + (414,) * 8 + (207,) * 8


def test_a_scaled_ratio_never_rounds_to_nothing() -> None:
    schedule = scaled(Schedule.of([1, 4], [0.5, 0.0004], withdraw_layer=6), 1e-3)
    assert schedule == Schedule.of([1, 4], [0.0005, 1e-6], withdraw_layer=6)


def test_withdrawal_leaves_none_and_a_gate_at_the_end_does_nothing() -> None:
    assert Schedule.of([1], [0.5], withdraw_layer=3).counts(10, 4) == (10, 5, 5, 0)
    assert Schedule.of([4], [0.5]).counts(10, 4) == (10, 10, 10, 10)
    assert Schedule.of([0], [0.3]).counts(10, 2) == (3, 3)


def test_a_token_is_always_left_unless_there_was_none() -> None:
    assert Schedule.of([1], [0.01]).counts(5, 2) == (5, 1)
    assert Schedule.of([1], [0.01]).counts(0, 2) == (0, 0)


@pytest.mark.parametrize(
    ("kept", "ratio", "n", "expected"),
    [
        # Ours rounds the decimal ratio down and leaves one.
        (at_least_one, 0.29, 100, 29),
        (at_least_one, 0.01, 5, 1),
        (at_least_one, 0.75, 10, 7),
        # PyramidDrop: int(n * ratio), and 100 * 0.29 is 28.999999999999996.
        (truncated, 0.29, 100, 28),
        (truncated, 0.01, 5, 0),
        (truncated, 0.125, 1659, 207),
        # FastV: round(n * (1 - r)) with r = 1 - ratio; Python rounds halves to even.
        (rounded_from_removed, 0.5, 1659, 830),
        (rounded_from_removed, 0.5, 5, 2),
        (rounded_from_removed, 0.25, 1659, 415),
        (rounded_from_removed, 0.1, 15, 1),
        (rounded_from_removed, 0.05, 5, 0),
        # DivPrune: round(ratio * n).
        (rounded, 0.1, 15, 2),
        (rounded, 0.098, 1659, 163),
        (rounded, 0.05, 5, 0),
    ],
)
def test_each_method_counts_its_own_way(kept: KeepCount, ratio: float, n: int, expected: int) -> None:
    assert kept(ratio, n) == expected
    assert Schedule.of([1], [ratio]).counts(n, 3, kept) == (n, expected, expected)


def test_fastv_counts_what_its_removed_share_says_for_every_decimal_setting() -> None:
    for thousandths in range(1, 1000):
        removed = thousandths / 1000
        for n in (1, 5, 64, 576, 1659):
            assert rounded_from_removed((1000 - thousandths) / 1000, n) == round(n * (1 - removed))


@pytest.mark.parametrize(
    ("layers", "ratios", "named"),
    [
        ([8, 8], [0.5, 0.25], "8 follows 8"),
        ([8, 4], [0.5, 0.25], "4 follows 8"),
        ([4, 8], [0.25, 0.5], "0.5 follows 0.25"),
        ([4], [0.0], "0.0"),
        ([4], [1.5], "1.5"),
        ([4], [float("nan")], "nan"),
        ([-1], [0.5], "-1"),
        ([4, 8], [0.5], "2 gate layers but 1 keep ratios"),
    ],
)
def test_what_cannot_be_is_refused_by_name(layers: list[int], ratios: list[float], named: str) -> None:
    with pytest.raises(ScheduleError, match=named.replace(".", r"\.")):
        Schedule.of(layers, ratios)


def test_a_gate_past_the_model_is_refused() -> None:
    with pytest.raises(ScheduleError, match="gate layer 9 is outside a model of 8 layers"):
        Schedule.of([9], [0.5]).counts(10, 8)
    with pytest.raises(ScheduleError, match="withdraw layer -2"):
        Schedule((Stage(1, 0.5),), -2)


@given(
    st.lists(st.integers(0, 12), unique=True, max_size=5).map(sorted),
    st.lists(st.floats(0.01, 1.0), min_size=5, max_size=5).map(lambda r: sorted(r, reverse=True)),
    st.integers(0, 3000),
)
def test_counts_never_rise(layers: list[int], ratios: list[float], n: int) -> None:
    counts = Schedule.of(layers, ratios[: len(layers)]).counts(n, 12)
    assert all(a >= b for a, b in zip((n, *counts), counts, strict=False))
    assert n == 0 or min(counts) >= 1


def test_buckets_by_hand() -> None:
    """Rows are 61 more: 161, 111, 111, 74 of 172."""
    counts = [100, 50, 50, 13, 0]
    assert in_buckets(counts, 111, 61, 16).tolist() == [111, 51, 51, 19, 0]  # 176 are more than there are; 112, 112, 80
    assert in_buckets(counts, 111, 61, 1).tolist() == counts
    assert in_buckets(np.array([counts, counts]), np.array([111, 200]), 61, 16)[:, 0].tolist() == [111, 115]
    with pytest.raises(ScheduleError, match="a bucket of 0 rows"):
        in_buckets(counts, 111, 61, 0)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=8), st.integers(0, 99), st.integers(1, 130), st.integers(0, 9)
)
def test_buckets_only_add(counts: list[int], others: int, bucket: int, more: int) -> None:
    counts = sorted(counts, reverse=True)
    n_spatial = counts[0] + more
    found = in_buckets(counts, n_spatial, others, bucket).tolist()
    for before, n, now in zip((n_spatial, *found), counts, found, strict=False):
        assert n <= now <= min(before, n + bucket - 1) and (now > 0) == (n > 0)
        assert now in (0, n_spatial) or (now + others) % bucket == 0
