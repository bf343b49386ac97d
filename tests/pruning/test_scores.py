# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.pruning.scores import (
    attention_of_last_rows,
    diverse_features,
    diverse_places,
    farthest_points,
    keep_top,
    likeness,
    position_bias,
    sink_tokens,
)


def test_attention_by_hand() -> None:
    # one head of width 1, keys ln 1, ln 2, ln 5: row 1 sees two keys, row 2 all three; queries are 1
    keys = torch.tensor([1.0, 2.0, 5.0]).log().view(1, 3, 1)
    share = attention_of_last_rows(torch.ones(1, 2, 1), keys, 1.0)
    expected = (torch.tensor([1 / 3, 2 / 3, 0]) + torch.tensor([1 / 8, 2 / 8, 5 / 8])) / 2
    torch.testing.assert_close(share, expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(0, 60), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(0, 9))
def test_attention_equals_full_maps(n_rows: int, n_before: int, heads: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = n_rows + n_before
    queries = torch.randn(heads[0], n_rows, 8, generator=generator)
    keys = torch.randn(heads[1], n, 8, generator=generator)
    logits = queries @ keys.repeat_interleave(heads[0] // heads[1], 0).transpose(1, 2) / math.sqrt(8)
    causal = torch.ones(n, n, dtype=torch.bool).tril()[n_before:]
    expected = logits.masked_fill(~causal, -torch.inf).softmax(-1).mean((0, 1))
    actual = attention_of_last_rows(queries, keys, 8**-0.5)
    torch.testing.assert_close(actual, expected)
    assert math.isclose(actual.sum().item(), 1, abs_tol=1e-5)


def test_keep_top_keeps_the_order_and_prefers_the_earlier_of_equals() -> None:
    assert keep_top(torch.tensor([1.0, 3.0, 2.0, 3.0]), 3).tolist() == [1, 2, 3]
    assert keep_top(torch.zeros(9), 4).tolist() == [0, 1, 2, 3]
    assert keep_top(torch.zeros(2), 0).tolist() == []


def test_sinks_have_one_huge_activation() -> None:
    hidden = torch.ones(3, 400)
    hidden[1, 7] = 1000  # 1000 over a root mean square of about 50: close to the largest ratio that 400 columns allow
    hidden[2, 8] = 1000
    assert sink_tokens(hidden, (7,), 15.0).tolist() == [False, True, False]
    assert sink_tokens(hidden, (7, 8), 15.0).tolist() == [False, True, True]


def test_position_bias_is_linear_between_the_points_of_the_curve() -> None:
    curve = torch.tensor([1.0, 3.0, 2.0])
    assert position_bias(curve, torch.arange(5), 5).tolist() == [1, 2, 3, 2.5, 2]
    assert position_bias(torch.tensor([4.0]), torch.arange(3), 3).tolist() == [4, 4, 4]
    assert position_bias(curve, torch.tensor([0]), 1).tolist() == [1]


def test_farthest_points_by_hand() -> None:
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0]])  # centroid at 3.25
    assert farthest_points(line).tolist() == [2, 3, 0, 1]


def test_coincident_points_are_picked_once_each() -> None:
    assert sorted(farthest_points(torch.zeros(5, 3)).tolist()) == [0, 1, 2, 3, 4]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.data())
def test_farthest_points_are_a_greedy_max_min(n: int, data: st.DataObject) -> None:
    xyz = torch.rand(n, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    order = farthest_points(xyz)
    assert sorted(order.tolist()) == list(range(n))
    for i in range(1, n):
        gap = torch.cdist(xyz, xyz[order[:i]]).amin(1)
        assert gap[order[i]] >= gap.max() - 1e-6


def test_diverse_features_are_a_greedy_max_min_of_cosines() -> None:
    # directions at 0, 10, 20, 90 and 200 degrees; the loneliest is 200 (110 from 90), then 20 (180 away), then 90
    angles = torch.tensor([0.0, 10, 20, 90, 200]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [5], [2], [3], [0.1]])
    assert diverse_features(features, 3).tolist() == [4, 2, 3]
    assert diverse_features(features, 0).tolist() == []
    assert diverse_features(features[:1], 1).tolist() == [0]


def test_diverse_places_by_hand() -> None:
    # Four tokens that look alike at 0, 1, 2 and 10 m (centroid 3.25), the second of them turned by 90 degrees.
    line = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [10, 0, 0]])
    features = torch.tensor([[1.0, 0], [0, 3], [2, 0], [1, 0]])
    # From 2 m: 0.05 * 2, 1 + 0.05, -, 0.05 * 8. Then the nearer of two: 0.1, -, -, 0.4.
    assert diverse_places(line, features).tolist() == [2, 1, 3, 0]
    assert diverse_places(line, features, per_metre=0.9).tolist() == [2, 3, 1, 0]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(0, 9))
def test_diverse_places_are_a_greedy_max_min(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    xyz, features = 5 * torch.rand(n, 3, generator=generator), torch.randn(n, 6, generator=generator)
    order = diverse_places(xyz, features)
    assert sorted(order.tolist()) == list(range(n))
    unit = torch.nn.functional.normalize(features, dim=1)
    distance = 1 - unit @ unit.T + 0.05 * torch.cdist(xyz, xyz)
    for i in range(1, n):
        gap = distance[:, order[:i]].amin(1).index_fill(0, order[:i], -1.0)
        assert gap[order[i]] >= gap.max() - 1e-5


def test_likeness_by_hand() -> None:
    # Cosines with the first word are 1, 0, 0, 0; with the second 0.6, 1, 0.6, 0.6, over the root of 1.72.
    tokens = torch.tensor([[2.0, 0, 0], [0, 0, 3], [0, 1, 0], [0, 5, 0]])
    words = torch.tensor([[7.0, 0, 0], [0.6, 0.6, 1.0]])
    found = likeness(tokens, words)
    second = torch.tensor([0.6, 1.0, 0.6, 0.6]) / math.sqrt(1.72)
    of_words = torch.stack([torch.tensor([1.0, 0, 0, 0]), second], dim=1)
    expected = ((of_words - of_words.mean(0)) / of_words.std(0, correction=0)).amax(1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found[:2], torch.full((2,), math.sqrt(3.0)))  # a rare word counts as much as a loud one
    assert likeness(torch.ones(3, 2), torch.ones(1, 2)).tolist() == [0.0, 0.0, 0.0]
