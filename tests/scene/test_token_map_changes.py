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
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import TokenMapError, voxel_keys
from tests.scene.maps import assert_same, built, single, view


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


CHANGES: dict[str, Callable[[TokenMap], object]] = {
    "add the newest": lambda m: m.add_view(*view(9, n=300)),
    "add an older one": lambda m: m.add_view(*view(2)),
    "remove": lambda m: m.remove_view(3),
    "carve": lambda m: m.carve(m.occupied_keys[::3], before=5),
    "move the origin": lambda m: m.move_origin((1, 0, -2)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_that_runs_out_of_memory_has_not_been(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, failures = CHANGES[name], 0

    def start() -> TokenMap:
        token_map = TokenMap(0.2, embed=lambda xyz: 2.0 * xyz)
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
    token_map = TokenMap()
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
                    points = view(other)[2]
                    kept[other] &= ~torch.isin(voxel_keys(points, 0.2), gone)
    left = {key: mask for key, mask in kept.items() if bool(mask.any())}
    if not left:
        assert token_map.n_voxels == 0
        return
    scratch = TokenMap()
    for key, mask in left.items():
        scratch.add_view(*view(key), mask)
    assert torch.equal(token_map.occupied_keys, scratch.occupied_keys)
    assert_same(token_map.tokens(), scratch.tokens())
    assert torch.equal(token_map.tokens().features, scratch.tokens().features)
    assert {key: n for key, n in token_map.exclusive().items() if key in left} == scratch.exclusive()


def test_near_and_centres_are_taken_from_the_origin() -> None:
    token_map = TokenMap(0.2, (10.0, 0.0, 0.05))
    token_map.add_view(1, torch.ones(1, 2), np.array([[10.41, 0.0, 0.0]]), torch.zeros(1, 3))
    np.testing.assert_allclose(token_map.centres(), [[10.4, 0.0, 0.05]])
    points = np.array([[10.4, 0.0, 0.0], [10.6, 0.2, 0.2], [10.8, 0.0, 0.0], [10.2, -0.2, 0.1]])
    assert token_map.near_occupied(points).tolist() == [True, True, False, True]
    # Its voxel reaches from 10.3 to 10.5; what is 0.05 m beside it may be in it.
    points = np.array([[10.4, 0.0, 0.0], [10.54, 0.0, 0.0], [10.56, 0.0, 0.0], [10.54, 0.14, 0.0], [10.54, 0.16, 0.0]])
    assert token_map.holds(points, 0.05).tolist() == [True, True, False, True, False]
    assert not TokenMap(0.2).holds(points, 0.05).any()


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
