# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adatoken3d_ros.scene.contributions import Sums
from adatoken3d_ros.scene.token_map import SpatialTokens, TokenMap, TokenMapError, voxel_indices, voxel_keys, voxel_pool


def pool_by_loop(features: Tensor, xyz: Tensor, voxel_size: float) -> dict[tuple[int, ...], tuple[list[float], int]]:
    """The slow obvious way: Python's round is half to even, too."""
    members: dict[tuple[int, ...], list[Tensor]] = {}
    for feature, point in zip(features, xyz, strict=True):
        quotient = (point / voxel_size).tolist()
        members.setdefault(tuple(round(q) for q in quotient), []).append(feature.double())
    return {v: (torch.stack(f).mean(dim=0).tolist(), len(f)) for v, f in members.items()}


def view(seed: int, n: int = 40, channels: int = 5, extent: float = 1.0) -> tuple[int, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    xyz = (torch.rand(n, 3, generator=g) - 0.5) * extent
    return seed, torch.randn(n, channels, generator=g), xyz, torch.randint(0, 256, (n, 3), generator=g).to(torch.uint8)


def built(views: list[tuple[int, Tensor, Tensor, Tensor]], **options: bool) -> TokenMap:
    token_map = TokenMap(**options)
    for v in views:
        token_map.add_view(*v)
    return token_map


def assert_same(a: SpatialTokens, b: SpatialTokens, tolerance: float = 1e-5) -> None:
    assert torch.equal(a.voxel, b.voxel)
    assert torch.equal(a.count, b.count)
    assert_close(a.features, b.features, atol=tolerance, rtol=tolerance)
    assert_close(a.xyz, b.xyz, atol=tolerance, rtol=tolerance)
    assert (a.rgb.int() - b.rgb.int()).abs().max() <= 1


# --- pooling ---------------------------------------------------------------------------------------------------------


def test_pooling_by_hand() -> None:
    xyz = torch.tensor([[0.05, 0, 0], [0.35, 0, 0], [-0.05, 0.0, 0], [0.05, 0.2, 0]])
    features = torch.tensor([[1.0, 2], [5, 6], [3, 4], [7, 8]])
    mean, inverse, count, voxel = voxel_pool(features, xyz)
    assert voxel.tolist() == [[0, 0, 0], [0, 1, 0], [2, 0, 0]]
    assert mean.tolist() == [[2, 3], [7, 8], [5, 6]]
    assert inverse.tolist() == [0, 2, 0, 1]
    assert count.tolist() == [2, 1, 1]


def test_halves_round_to_even() -> None:
    # With voxels of 1 m: 0.5 -> 0, 1.5 -> 2, 2.5 -> 2, -0.5 -> 0, -1.5 -> -2.
    xyz = torch.tensor([[h, 0.0, 0.0] for h in (0.5, 1.5, 2.5, -0.5, -1.5)])
    _, inverse, _, voxel = voxel_pool(torch.ones(5, 1), xyz, 1.0)
    assert voxel[inverse][:, 0].tolist() == [0, 2, 2, 0, -2]


def test_order_is_lexicographic_with_negative_indices() -> None:
    corners = torch.tensor([[x, y, z] for x in (1.0, -1) for y in (1.0, -1) for z in (1.0, -1)])
    *_, voxel = voxel_pool(torch.ones(8, 1), corners, 1.0)
    assert voxel.tolist() == sorted(corners.long().tolist())


def test_rows_that_are_not_valid_are_never_read() -> None:
    xyz = torch.tensor([[0.0, 0, 0], [math.nan, 0, 0], [0.01, 0, 0]])
    features = torch.tensor([[1.0], [math.nan], [3.0]])
    mean, inverse, count, _ = voxel_pool(features, xyz, valid=torch.tensor([True, False, True]))
    assert (mean.tolist(), inverse.tolist(), count.tolist()) == ([[2.0]], [0, -1, 0], [2])


@settings(deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(1, 60), voxel_size=st.sampled_from([0.1, 0.2, 0.37]))
def test_pooling_equals_the_loop(seed: int, n: int, voxel_size: float) -> None:
    _, features, xyz, _ = view(seed, n)
    mean, inverse, count, voxel = voxel_pool(features, xyz, voxel_size)
    expected = pool_by_loop(features, xyz, voxel_size)
    assert [tuple(v) for v in voxel.tolist()] == sorted(expected)
    for row, v in enumerate(sorted(expected)):
        assert_close(mean[row].double(), torch.tensor(expected[v][0], dtype=torch.float64), atol=1e-5, rtol=1e-5)
        assert count[row] == expected[v][1] == (inverse == row).sum()


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(-(2**20) + 1, 2**20 - 1)] * 3), min_size=1, max_size=20))
def test_keys_keep_the_voxel_and_its_order(voxels: list[tuple[int, int, int]]) -> None:
    keys = voxel_keys(torch.tensor(voxels, dtype=torch.float64), 1.0)
    assert voxel_indices(keys).tolist() == [list(v) for v in voxels]
    assert [voxels[i] for i in torch.argsort(keys, stable=True)] == sorted(voxels)


def test_upstream_numbers_stop_counting_at_256() -> None:
    # 300 ones in bfloat16: sum and count both stay at 256 (257 is not a bfloat16 number), the mean stays 1.
    mean, _, count, _ = voxel_pool(torch.ones(300, 1), torch.zeros(300, 3), dtype=torch.bfloat16)
    assert (mean.item(), count.item()) == (1.0, 300)
    # A sum of 512 ones would not move either; one two after 300 ones is divided by 256, not by 301.
    mean, *_ = voxel_pool(torch.tensor([[1.0]] * 300 + [[64.0]]), torch.zeros(301, 3), dtype=torch.bfloat16)
    assert mean.item() == 1.25


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e9])
def test_points_that_have_no_voxel_are_named(bad: float) -> None:
    with pytest.raises(TokenMapError, match="point 1"):
        voxel_pool(torch.ones(2, 1), torch.tensor([[0.0, 0, 0], [0, bad, 0]]))


def test_bad_shapes_and_sizes_are_named() -> None:
    with pytest.raises(TokenMapError, match=r"\(3, 1\).*\(2, 3\)"):
        voxel_pool(torch.ones(3, 1), torch.zeros(2, 3))
    with pytest.raises(TokenMapError, match="none of the 2"):
        voxel_pool(torch.ones(2, 1), torch.zeros(2, 3), valid=torch.tensor([False, False]))
    with pytest.raises(TokenMapError, match="-0.2"):
        voxel_pool(torch.ones(2, 1), torch.zeros(2, 3), -0.2)
    with pytest.raises(TokenMapError, match="int64"):
        voxel_keys(torch.zeros(2, 3, dtype=torch.int64), 0.2)


# --- the map ---------------------------------------------------------------------------------------------------------


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


def test_the_random_cap_is_seeded_and_in_random_order() -> None:
    token_map = built([view(0, n=200, extent=3.0)])

    def draw(seed: int) -> list[list[int]]:
        return token_map.tokens(50, generator=torch.Generator().manual_seed(seed)).voxel.tolist()

    assert draw(1) == draw(1) != draw(2)
    assert draw(1) != sorted(draw(1))
    assert len({tuple(v) for v in draw(1)}) == 50


def test_voxels_are_taken_from_the_origin_and_points_stay_in_the_scene_frame() -> None:
    origin = (10.03, -4.0, 0.5)
    shifted = TokenMap(origin=origin)
    _, features, xyz, rgb = view(3)
    moved = (xyz.double() + torch.tensor(origin, dtype=torch.float64)).float()
    shifted.add_view(3, features, moved, rgb)
    plain = built([view(3)]).tokens()
    tokens = shifted.tokens()
    assert torch.equal(tokens.voxel, plain.voxel)
    assert_close(tokens.xyz, plain.xyz + torch.tensor(origin), atol=1e-5, rtol=0)


def test_upstream_numbers_are_those_of_one_bfloat16_pooling() -> None:
    views = [view(seed, n=60) for seed in range(5)]
    token_map = built(views, upstream_numerics=True)
    features, xyz = torch.cat([v[1] for v in views]), torch.cat([v[2] for v in views])
    mean, _, count, voxel = voxel_pool(features, xyz, dtype=torch.bfloat16)
    tokens = token_map.tokens()
    assert torch.equal(tokens.voxel, voxel) and torch.equal(tokens.count, count)
    assert torch.equal(tokens.features, mean.float())
    exact = built(views).tokens()
    assert len(exact) != len(tokens) or not torch.equal(exact.features, tokens.features)
    token_map.remove_view(2)
    assert_same(token_map.tokens(), built([v for v in views if v[0] != 2], upstream_numerics=True).tokens())


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


def single(key: int, *xs: float) -> tuple[int, Tensor, Tensor, Tensor]:
    """A view with a patch at each (x, 0, 0), all with the feature `key`."""
    xyz = torch.tensor([[x, 0.0, 0.0] for x in xs])
    return key, torch.full((len(xs), 2), float(key)), xyz, torch.zeros(len(xs), 3, dtype=torch.uint8)


def test_what_older_views_hold_of_a_voxel_is_taken_out() -> None:
    token_map = built([single(1, 0.0, 1.0), single(2, 0.0), single(3, 0.0, 1.0)])
    there = voxel_keys(torch.tensor([[0.0, 0.0, 0.0]]), 0.2)
    assert token_map.carve(there, before=3) == 2
    tokens = token_map.tokens()
    assert tokens.features[:, 0].tolist() == [3.0, 2.0] and tokens.count.tolist() == [1, 2]
    assert token_map.carve(there, before=4) == 1
    assert token_map.tokens().xyz[:, 0].tolist() == [1.0] and token_map.n_voxels == 1
    assert token_map.keys() == (1, 2, 3), "a view without patches is still one"
    token_map.remove_view(2)
    assert token_map.carve(there, before=9) == 0


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


CHANGES: dict[str, Callable[[TokenMap], object]] = {
    "add the newest": lambda m: m.add_view(*view(9, n=300)),
    "add an older one": lambda m: m.add_view(*view(2)),
    "remove": lambda m: m.remove_view(3),
    "carve": lambda m: m.carve(m.occupied_keys[::3], before=5),
    "move the origin": lambda m: m.move_origin((1, 0, -2)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("upstream", [False, True])
def test_a_change_that_runs_out_of_memory_has_not_been(
    name: str, upstream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, failures = CHANGES[name], 0

    def start() -> TokenMap:
        token_map = TokenMap(0.2, embed=lambda xyz: 2.0 * xyz, upstream_numerics=upstream)
        for seed in (1, 3, 5):
            token_map.add_view(*view(seed))
        return token_map

    before, after = start(), start()
    change(after)
    for failing in ("add", "take", "zero", "give_back"):
        original, calls = getattr(Sums, failing), 0
        for k in range(20):
            token_map, calls = start(), 0

            def fail(self: Sums, *args: Any, original: Any = original, k: int = k) -> Any:
                nonlocal calls
                calls += 1
                made = original(self, *args)  # half of the change is done
                if calls == k + 1:
                    raise torch.OutOfMemoryError
                return made

            with monkeypatch.context() as patch:
                patch.setattr(Sums, failing, fail)
                try:
                    change(token_map)
                    break
                except torch.OutOfMemoryError:
                    failures += 1
            for expected in (before, after):
                assert token_map.keys() == expected.keys() and torch.equal(token_map.shift, expected.shift)
                assert torch.equal(token_map.occupied_keys, expected.occupied_keys)
                assert token_map.exclusive() == expected.exclusive()
                a, b = token_map.tokens(), expected.tokens()
                for field in ("features", "position", "xyz", "rgb", "count"):
                    assert torch.equal(getattr(a, field), getattr(b, field)), field
                if expected is before:
                    change(token_map)
    assert failures > 0 or name == "move the origin"


def test_an_origin_that_cannot_be_moved_stays() -> None:
    left = 100

    def embed(xyz: Tensor) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise torch.OutOfMemoryError
        return 2.0 * xyz

    token_map = TokenMap(0.2, embed=embed)
    for seed in (1, 3, 5):
        token_map.add_view(*view(seed))
    before, left = token_map.tokens().position, 2
    with pytest.raises(torch.OutOfMemoryError):
        token_map.move_origin((5, 5, 5))
    assert token_map.shift.tolist() == [0, 0, 0] and torch.equal(token_map.tokens().position, before)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_history_with_carving_equals_building_from_what_is_left(data: st.DataObject) -> None:
    upstream = data.draw(st.booleans())
    token_map = TokenMap(upstream_numerics=upstream)
    kept: dict[int, Tensor] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        key = data.draw(st.integers(0, 6))
        if key not in kept:
            token_map.add_view(*view(key))
            kept[key] = torch.ones(40, dtype=torch.bool)
        elif data.draw(st.booleans()):
            token_map.remove_view(key)
            del kept[key]
        else:
            held = token_map.occupied_keys
            gone = held[
                torch.tensor(
                    data.draw(st.lists(st.booleans(), min_size=len(held), max_size=len(held))), dtype=torch.bool
                )
            ]
            token_map.carve(gone, before=key)
            for other in kept:
                if other < key:
                    points = view(other)[2].to(torch.bfloat16 if upstream else torch.float32)
                    kept[other] &= ~torch.isin(voxel_keys(points, 0.2), gone)
    left = {key: mask for key, mask in kept.items() if bool(mask.any())}
    if not left:
        assert token_map.n_voxels == 0
        return
    scratch = TokenMap(upstream_numerics=upstream)
    for key, mask in left.items():
        scratch.add_view(*view(key), mask)
    assert torch.equal(token_map.occupied_keys, scratch.occupied_keys)
    assert_same(token_map.tokens(), scratch.tokens())
    assert torch.equal(token_map.tokens().features, scratch.tokens().features)
    assert {key: n for key, n in token_map.exclusive().items() if key in left} == scratch.exclusive()


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


def test_near_and_centres_are_taken_from_the_origin() -> None:
    token_map = TokenMap(0.2, (10.0, 0.0, 0.05))
    token_map.add_view(1, torch.ones(1, 2), np.array([[10.41, 0.0, 0.0]]), torch.zeros(1, 3))
    np.testing.assert_allclose(token_map.centres(), [[10.4, 0.0, 0.05]])
    points = np.array([[10.4, 0.0, 0.0], [10.6, 0.2, 0.2], [10.8, 0.0, 0.0], [10.2, -0.2, 0.1]])
    assert token_map.near_occupied(points).tolist() == [True, True, False, True]


# --- the model's origin -----------------------------------------------------------------------------------------------


def embedding(points: torch.Tensor) -> torch.Tensor:
    """(P, 3) -> (P, 4), not linear and not bounded, as the hidden layer of a position embedding."""
    weight = torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.3, 1.0, -1.0, 0.5], [-0.2, 0.4, 1.0, -2.0]])
    return torch.relu(points @ weight + 0.1)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    shift=st.tuples(*[st.integers(-200, 200)] * 3),
    history=st.lists(st.sampled_from(["add", "remove", "carve", "move"]), max_size=8),
)
def test_a_moved_origin_equals_a_map_that_was_filled_there(
    seed: int, shift: tuple[int, int, int], history: list[str]
) -> None:
    generator = torch.Generator().manual_seed(seed)
    token_map, kept, carved = TokenMap(0.2, (1.0, 2.0, 3.0), embed=embedding), {}, []
    for key, what in enumerate(["add", "add", *history]):
        if what == "add":
            _, features, xyz, rgb = view(seed + key, 20)
            kept[key] = features, xyz, rgb
            token_map.add_view(key, features, xyz, rgb)
        elif what == "remove" and len(kept) > 1:
            del kept[min(kept)]
            token_map.remove_view(token_map.keys()[0])
        elif what == "carve":
            gone = token_map.occupied_keys[::5]
            carved.append((key, gone))
            token_map.carve(gone, before=key)
        elif what == "move":
            token_map.move_origin(torch.randint(-50, 50, (3,), generator=generator))
    token_map.move_origin(shift)
    there = TokenMap(0.2, (1.0, 2.0, 3.0), embed=embedding)
    there.move_origin(shift)
    for key, (features, xyz, rgb) in kept.items():
        there.add_view(key, features, xyz, rgb)
        for when, gone in carved:
            if key < when:
                there.carve(gone, before=key + 1)
    if not there.n_voxels:
        return
    a, b = token_map.tokens(), there.tokens()
    assert torch.equal(a.voxel, b.voxel) and torch.equal(a.features, b.features)
    assert_close(a.position, b.position, atol=1e-5, rtol=1e-5)
    assert_close(token_map.subset(token_map.keys()).tokens().position, b.position, atol=1e-5, rtol=1e-5)
    # By the loop: the mean of what each patch's point is embedded to.
    origin = torch.tensor([1.0, 2.0, 3.0]).double() + 0.2 * torch.tensor(shift)
    if not carved:
        points = torch.cat([xyz for _, xyz, _ in kept.values()])
        seen = embedding((points - origin).float())
        keys = voxel_keys((points.double() - torch.tensor([1.0, 2.0, 3.0]).double()).float(), 0.2)
        for row, key in enumerate(token_map.occupied_keys.tolist()):
            assert_close(a.position[row], seen[keys == key].mean(dim=0), atol=1e-5, rtol=1e-5)
    # Nor does it matter whether the voxels begin there, too; only that a point on a border may go to the other side.
    elsewhere = TokenMap(0.2, origin.numpy(), embed=embedding)
    for key, (features, xyz, rgb) in kept.items():
        elsewhere.add_view(key, features, xyz, rgb)
    if not carved and torch.equal(elsewhere.tokens().voxel + torch.tensor(shift), a.voxel):
        assert_close(elsewhere.tokens().position, a.position, atol=1e-4, rtol=1e-4)


def test_voxels_begin_where_they_are_told_when_the_map_is_empty() -> None:
    token_map = TokenMap(0.2, embed=embedding)
    token_map.move_origin((1, 2, 3))
    token_map.clear((0.05, 0.0, 0.0))
    assert token_map.shift.tolist() == [0, 0, 0] and token_map.model_origin.tolist() == [0.05, 0.0, 0.0]
    token_map.add_view(1, torch.ones(1, 2), torch.tensor([[0.05, 0.0, 0.1]]), torch.zeros(1, 3, dtype=torch.uint8))
    token_map.move_origin((0, 0, -1))
    np.testing.assert_allclose(token_map.model_origin, [0.05, 0.0, -0.2])
    assert_close(token_map.tokens().position, embedding(torch.tensor([[0.0, 0.0, 0.3]])))
    token_map.clear()
    assert token_map.shift.tolist() == [0, 0, -1]
    with pytest.raises(TokenMapError, match="nan"):
        token_map.clear((math.nan, 0.0, 0.0))


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
