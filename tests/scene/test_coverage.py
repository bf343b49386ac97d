# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.scene.coverage import Coverage
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector
from adatoken3d_ros.scene.patches import PatchConfig
from adatoken3d_ros.scene.token_map import TokenMap


def test_by_hand() -> None:
    held = {7: torch.tensor([1, 2, 2, 3]), 8: torch.tensor([3, 4]), 9: torch.tensor([], dtype=torch.int64)}
    coverage = Coverage(held)
    assert (len(coverage), coverage.n_voxels, coverage.exclusive()) == (3, 4, {7: 2, 8: 1, 9: 0})
    coverage.remove(7)
    assert (len(coverage), coverage.n_voxels, coverage.exclusive()) == (2, 2, {8: 2, 9: 0})
    coverage.remove(8)
    assert (len(coverage), coverage.n_voxels, coverage.exclusive()) == (1, 0, {9: 0})
    with pytest.raises(KeyError):
        coverage.remove(8)
    assert (len(Coverage({})), Coverage({}).exclusive()) == (0, {})


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 12)), max_size=6), st.randoms(use_true_random=False))
def test_equals_counting_anew_after_each_view_that_goes(sets: list[set[int]], random: object) -> None:
    left = {100 + i: sorted(voxels) for i, voxels in enumerate(sets)}
    coverage = Coverage({view: torch.tensor(keys, dtype=torch.int64) for view, keys in left.items()})
    while True:
        others = {view: {key for one, keys in left.items() if one != view for key in keys} for view in left}
        assert coverage.exclusive() == {view: len(set(keys) - others[view]) for view, keys in left.items()}
        assert coverage.n_voxels == len({key for keys in left.values() for key in keys})
        if not left:
            return
        view = random.choice(sorted(left))  # type: ignore[attr-defined]
        coverage.remove(view)
        del left[view]


def test_views_that_go_by_the_coverage_are_those_that_go_from_the_map() -> None:
    def scene() -> tuple[TokenMap, KeyFrameSelector]:
        token_map, g = TokenMap(0.2), torch.Generator().manual_seed(0)
        patches = PatchConfig(PatchGeometry.square(112, 14))
        selector = KeyFrameSelector(KeyFrameConfig(max_views=5, max_voxels=150), patches, token_map)
        poses = {}
        for stamp in range(1, 31):
            where = 3 * torch.rand(3, generator=g)
            points = where + 0.7 * torch.rand(40, 3, generator=g)
            token_map.add_view(stamp, torch.randn(40, 4, generator=g), points, torch.zeros(40, 3))
            poses[stamp] = np.eye(4)
            poses[stamp][:3, 3] = where
        selector.restore(poses)
        return token_map, selector

    token_map, selector = scene()
    one_by_one = []
    while (stamp := selector.evict()) is not None:
        token_map.remove_view(stamp)
        one_by_one.append(stamp)
    other, selector = scene()
    held, gone = other.coverage(), []
    while (stamp := selector.evict(held)) is not None:
        held.remove(stamp)
        gone.append(stamp)
    assert gone == one_by_one and len(gone) >= 25
    other.restore({key: view for key, view in other.contributions().items() if key not in gone})
    assert torch.equal(other.tokens().features, token_map.tokens().features)
    assert other.keys() == token_map.keys()
