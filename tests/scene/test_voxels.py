# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from adatoken3d_ros.scene.voxels import TokenMapError, voxel_indices, voxel_keys, voxel_pool
from tests.scene.maps import view


def pool_by_loop(features: Tensor, xyz: Tensor, voxel_size: float) -> dict[tuple[int, ...], tuple[list[float], int]]:
    """The slow obvious way: Python's round is half to even, too."""
    members: dict[tuple[int, ...], list[Tensor]] = {}
    for feature, point in zip(features, xyz, strict=True):
        quotient = (point / voxel_size).tolist()
        members.setdefault(tuple(round(q) for q in quotient), []).append(feature.double())
    return {v: (torch.stack(f).mean(dim=0).tolist(), len(f)) for v, f in members.items()}


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
