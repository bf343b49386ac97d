# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import TokenMapError, voxel_keys, voxel_pool
from tests.scene.maps import assert_same, built, single, view


def test_two_views_by_hand() -> None:
    token_map = TokenMap()
    black, white = torch.zeros(2, 3, dtype=torch.uint8), torch.full((2, 3), 255, dtype=torch.uint8)
    token_map.add_view(10, torch.tensor([[1.0], [2]]), torch.tensor([[0.0, 0, 0], [1, 0, 0]]), black)
    token_map.add_view(20, torch.tensor([[3.0], [9]]), torch.tensor([[0.04, 0, 0], [-1, 0, 0]]), white)
    tokens = token_map.tokens()
    assert tokens.voxel.tolist() == [[-5, 0, 0], [0, 0, 0], [5, 0, 0]]
    assert tokens.features.tolist() == [[9], [2], [2]]
    assert tokens.count.tolist() == [1, 2, 1]
    assert_close(tokens.xyz[:, 0], torch.tensor([-1.0, 0.02, 1]))
    assert tokens.rgb[:, 0].tolist() == [255, 128, 0]
    assert (tokens.features.dtype, tokens.xyz.dtype, tokens.rgb.dtype) == (torch.float32, torch.float32, torch.uint8)
    assert token_map.keys() == (10, 20) and len(token_map) == 2 and token_map.n_voxels == 3

    token_map.remove_view(10)
    tokens = token_map.tokens()
    assert tokens.voxel.tolist() == [[-5, 0, 0], [0, 0, 0]]
    assert tokens.features.tolist() == [[9], [3]]


def test_equal_to_pooling_all_points_at_once() -> None:
    views = [view(seed) for seed in range(6)]
    tokens = built(views).tokens()
    features, xyz = torch.cat([v[1] for v in views]), torch.cat([v[2] for v in views])
    mean, inverse, count, voxel = voxel_pool(features, xyz)
    assert torch.equal(tokens.voxel, voxel) and torch.equal(tokens.count, count)
    assert_close(tokens.features, mean, atol=1e-5, rtol=1e-5)
    centroid = torch.zeros(len(count), 3).index_add_(0, inverse, xyz) / count[:, None]
    assert_close(tokens.xyz, centroid, atol=1e-5, rtol=1e-5)


@settings(deadline=None)
@given(st.data())
def test_any_history_equals_building_from_scratch(data: st.DataObject) -> None:
    token_map, present = TokenMap(), set[int]()
    for key in data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=30)):
        if key in present:
            token_map.remove_view(key)
            present.remove(key)
        else:
            token_map.add_view(*view(key))
            present.add(key)
    assert token_map.keys() == tuple(sorted(present))
    if not present:
        with pytest.raises(TokenMapError, match="empty"):
            token_map.tokens()
        return
    scratch = data.draw(st.permutations(sorted(present)))
    tokens, expected = token_map.tokens(), built([view(key) for key in scratch]).tokens()
    assert_same(tokens, expected)
    # Stronger than asked: not a bit depends on the history.
    assert torch.equal(tokens.features, expected.features) and torch.equal(tokens.xyz, expected.xyz)


def test_removing_a_view_of_huge_numbers_leaves_no_trace() -> None:
    # Subtracting 1e8 from 1e8 + 1 in float32 would leave 0.
    token_map, zero, black = TokenMap(), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.uint8)
    token_map.add_view(1, torch.tensor([[1.0]]), zero, black)
    token_map.add_view(2, torch.tensor([[1e8]]), zero, black)
    token_map.remove_view(2)
    assert token_map.tokens().features.item() == 1.0


def test_a_long_life_reuses_its_rows() -> None:
    token_map = TokenMap()
    for seed in range(60):
        token_map.add_view(*view(seed, n=80, extent=4.0))
        if seed >= 4:
            token_map.remove_view(seed - 4)
    assert token_map.keys() == (56, 57, 58, 59)
    assert_same(token_map.tokens(), built([view(s, n=80, extent=4.0) for s in (56, 57, 58, 59)]).tokens())
    assert token_map._sums is not None and len(token_map._sums.count) <= 512


def test_the_cap_keeps_the_best_covered_voxels_in_order() -> None:
    token_map = TokenMap(voxel_size=1.0)
    places = torch.tensor([[float(x), 0, 0] for x in (0, 1, 1, 2, 3, 3, 3, 4)])
    token_map.add_view(1, torch.arange(8.0)[:, None], places, torch.zeros(8, 3, dtype=torch.uint8))
    assert token_map.tokens(5).voxel[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert token_map.tokens(3).voxel[:, 0].tolist() == [0, 1, 3]
    assert token_map.tokens(1).voxel[:, 0].tolist() == [3]
    assert token_map.tokens(1).features.tolist() == [[5.0]]
    with pytest.raises(TokenMapError, match="0"):
        token_map.tokens(0)


def test_views_from_inference_mode_can_be_removed_outside_of_it() -> None:
    token_map = TokenMap()
    with torch.inference_mode():
        for seed in range(3):
            token_map.add_view(*view(seed))
    token_map.remove_view(1)
    token_map.add_view(*view(1))
    assert not token_map.tokens().features.is_inference()
    assert_same(token_map.tokens(), built([view(seed) for seed in range(3)]).tokens())


def test_numpy_points_and_a_mask() -> None:
    key, features, xyz, rgb = view(1)
    valid = np.arange(len(xyz)) % 3 != 0
    broken = xyz.numpy().copy()
    broken[~valid] = np.nan
    token_map = TokenMap()
    token_map.add_view(key, features, broken, rgb.numpy(), valid)
    chosen = torch.from_numpy(valid)
    assert_same(token_map.tokens(), built([(key, features[chosen], xyz[chosen], rgb[chosen])]).tokens())


def test_a_refused_view_changes_nothing() -> None:
    token_map = built([view(1)])
    before = token_map.tokens()
    key, features, xyz, rgb = view(2)
    poisoned, away = features.clone(), xyz.clone()
    poisoned[7, 2], away[7, 2] = math.nan, math.inf
    refused: list[tuple[str, tuple]] = [
        ("view 1 ", view(1)),
        ("patch 7 ", (key, poisoned, xyz, rgb)),
        ("point 7 ", (key, features, away, rgb)),
        ("5 channels|4 channels", (key, features[:, :4], xyz, rgb)),
        (r"\(39, 3\)", (key, features, xyz[:39], rgb)),
        (r"\(40, 2\)", (key, features, xyz, rgb[:, :2])),
        ("none of the 40", (key, features, xyz, rgb, torch.zeros(40, dtype=torch.bool))),
        (r"valid must be \(40,\)", (key, features, xyz, rgb, torch.ones(3, dtype=torch.bool))),
    ]
    for message, arguments in refused:
        with pytest.raises(TokenMapError, match=message):
            token_map.add_view(*arguments)
    with pytest.raises(TokenMapError, match="99"):
        token_map.remove_view(99)
    assert token_map.keys() == (1,)
    assert_same(token_map.tokens(), before, 0.0)


def test_clear_forgets_everything_even_the_number_of_channels() -> None:
    token_map = built([view(1), view(2)])
    token_map.clear()
    assert len(token_map) == 0 and token_map.n_voxels == 0
    token_map.add_view(*view(1, channels=3))
    assert token_map.tokens().features.shape[1] == 3


@pytest.mark.parametrize("options", [{"voxel_size": 0.0}, {"voxel_size": math.nan}, {"origin": (0, 0)}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(TokenMapError):
        TokenMap(**options)


# --- parts of views: carving, coverage, subsets ----------------------------------------------------------------------


def test_views_may_have_an_order_that_is_not_that_of_their_keys() -> None:
    token_map = TokenMap(0.2)
    for order, (key, xs) in enumerate([(100, (0.0, 1.0)), (101, (2.0,)), (3, (0.0, 3.0)), (5, (3.0,))]):
        token_map.add_view(*single(key, *xs), order=order)
    assert token_map.keys() == (100, 101, 3, 5)
    assert token_map.cover(1) == (3,), "of equal ones the newest"
    assert token_map.cover(3, first=(5,)) == (100, 101, 5)
    assert token_map.subset((3, 100)).keys() == (100, 3)
    other = TokenMap(0.2)
    other.restore(token_map.contributions())
    assert other.keys() == token_map.keys()
    there = voxel_keys(torch.tensor([[0.0, 0.0, 0.0], [3.0, 0.0, 0.0]]), 0.2)
    assert token_map.carve(there, before=3) == 3
    assert token_map.exclusive() == {100: 1, 101: 1, 3: 0, 5: 1}


def test_coverage_that_only_one_view_has() -> None:
    token_map = built([single(1, 0.0, 1.0, 1.01), single(2, 1.0, 2.0, 3.0), single(3, 3.0)])
    assert token_map.exclusive() == {1: 1, 2: 1, 3: 0}
    assert TokenMap().exclusive() == {}


def test_views_are_chosen_by_what_they_add() -> None:
    # 3 holds most; then 1 adds two more, 2 adds one; 4 adds nothing.
    token_map = built(
        [single(1, 0.0, 1.0, 2.0), single(2, 3.0, 4.0, 9.0), single(3, 2.0, 3.0, 4.0, 5.0), single(4, 3.0)]
    )
    assert token_map.cover(1) == (3,)
    assert token_map.cover(2) == (1, 3)
    assert token_map.cover(3) == (1, 2, 3)
    assert token_map.cover(9) == (1, 2, 3, 4)
    assert built([single(5, 0.0), single(6, 0.0)]).cover(1) == (6,), "of equal ones the newest"


def test_a_subset_is_the_map_of_those_views() -> None:
    token_map = built([view(seed) for seed in range(5)])
    part = token_map.subset((3, 1))
    assert part.keys() == (1, 3)
    assert torch.equal(part.tokens().features, built([view(1), view(3)]).tokens().features)
    part.remove_view(1)
    assert len(token_map) == 5
    with pytest.raises(TokenMapError, match="view 9"):
        token_map.subset((9,))


def test_level_points_are_of_the_views_that_are_there() -> None:
    token_map = TokenMap()
    for key in (1, 2):
        xyz = torch.tensor([[0.0, 0.0, float(key)], [1.0, 0.0, 5.0], [2.0, 0.0, float(key)]])
        rgb, level = torch.zeros(3, 3, dtype=torch.uint8), torch.tensor([True, False, True])
        token_map.add_view(key, torch.ones(3, 1), xyz, rgb, level=level)
    assert token_map.level_points()[:, 2].tolist() == [1, 1, 2, 2]
    token_map.carve(voxel_keys(torch.tensor([[2.0, 0.0, 1.0]]), 0.2), before=2)
    assert token_map.level_points()[:, 2].tolist() == [1, 2, 2]
    token_map.remove_view(1)
    assert token_map.level_points()[:, 2].tolist() == [2, 2]
    with pytest.raises(TokenMapError, match=r"level must be \(1,\) bool"):
        token_map.add_view(3, torch.ones(1, 1), torch.zeros(1, 3), torch.zeros(1, 3), level=torch.zeros(1))


def test_some_views_are_chosen_before_all_others() -> None:
    token_map = TokenMap(1.0)
    for key, width in ((1, 5), (2, 3), (3, 1)):
        xyz = torch.tensor([[float(x), 10.0 * key, 0.0] for x in range(width)])
        token_map.add_view(key, torch.ones(width, 1), xyz, torch.zeros(width, 3, dtype=torch.uint8))
    assert token_map.cover(2) == (1, 2)
    assert token_map.cover(2, first=(3,)) == (1, 3)
    assert token_map.cover(1, first=(3,)) == (3,)
    assert token_map.cover(2, first=(99,)) == (1, 2)
