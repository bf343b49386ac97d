# SPDX-License-Identifier: Apache-2.0
"""Views whose poses were corrected: what the map holds then, against one that was given the moved patches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.view_blocks import ViewTokenMap
from adatoken3d_ros.scene.voxels import TokenMapError
from tests.scene.maps import assert_same, view


def turned(degrees: float, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> NDArray[np.float64]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0, x], [s, c, 0, y], [0, 0, 1, z], [0, 0, 0, 1.0]])


MOVES = {2: turned(30, 0.7, -0.2), 3: turned(-170, z=0.15)}


def embed(points: torch.Tensor) -> torch.Tensor:
    return torch.relu(points @ torch.tensor([[1.0, -0.5], [0.3, 1.0], [-0.2, 0.4]]))


def there(key: int, T: NDArray[np.float64] | None) -> Any:
    """A view, and where T takes it, as a camera would have seen it there."""
    stamp, features, xyz, rgb = view(key)
    points = xyz.numpy() if T is None else (xyz.double().numpy() @ T[:3, :3].T + T[:3, 3]).astype(np.float32)
    return stamp, features, torch.from_numpy(points), rgb


def test_a_view_that_is_moved_is_where_it_would_have_been_seen() -> None:
    moved, scratch = (TokenMap(0.2, (0.03, 0.0, 0.0), embed=embed) for _ in range(2))
    for key in (1, 2, 3, 4):
        moved.add_view(*there(key, None))
        scratch.add_view(*there(key, MOVES.get(key)))
    moved.move_origin((1, 0, -1))
    scratch.move_origin((1, 0, -1))
    moved.move_views(MOVES)
    assert_same(moved.tokens(), scratch.tokens())
    torch.testing.assert_close(moved.tokens().position, scratch.tokens().position, atol=1e-5, rtol=1e-5)
    # It lives on: what comes and goes afterwards is right, too.
    for one in (moved, scratch):
        one.remove_view(3)
        one.add_view(*view(7))
    assert_same(moved.tokens(), scratch.tokens())
    assert moved.exclusive() == scratch.exclusive()
    # And back: nothing is lost on the way.
    moved.move_views({2: np.linalg.inv(MOVES[2])})
    scratch.remove_view(2)
    scratch.add_view(*view(2))
    assert_same(moved.tokens(), scratch.tokens())


def test_what_was_carved_stays_out() -> None:
    token_map = TokenMap(0.2)
    for key in (1, 2):
        token_map.add_view(*view(key))
    before = int(token_map.tokens().count.sum())
    taken = token_map.carve(token_map.occupied_keys[::2], before=2)
    token_map.move_views({1: turned(10, 5.0)})
    assert taken and int(token_map.tokens().count.sum()) == before - taken


def test_a_move_that_cannot_be_leaves_the_map_as_it_was() -> None:
    token_map = TokenMap(0.2)
    token_map.add_view(*view(1))
    before = token_map.tokens()
    for moves, named in (({9: np.eye(4)}, "view 9"), ({1: turned(0, 1e9)}, "more than 1048576 voxels")):
        with pytest.raises(TokenMapError, match=named):
            token_map.move_views(moves)
        assert torch.equal(token_map.tokens().xyz, before.xyz)


def test_blocks_of_views_move_with_their_parts_and_without_what_was_carved() -> None:
    def add(token_map: ViewTokenMap, key: int, T: NDArray[np.float64] | None) -> None:
        stamp, features, xyz, rgb = there(key, T)
        xyz, parts = xyz.numpy(), np.stack([xyz.numpy(), xyz.numpy()], axis=1)
        parts[::3, 1] = np.nan
        token_map.add_block(stamp, features, xyz, rgb.numpy(), np.ones(40, bool), (5, 8), parts=parts)

    moved, scratch = (ViewTokenMap(0.2, parts=2) for _ in range(2))
    for key in (1, 2, 3):
        add(moved, key, None)
        add(scratch, key, MOVES.get(key))
    moved.move_views(MOVES)
    a, b = moved.tokens(), scratch.tokens()
    assert torch.equal(a.cell, b.cell) and torch.equal(a.voxel, b.voxel)
    torch.testing.assert_close(a.xyz, b.xyz, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(a.parts, b.parts, atol=1e-5, rtol=1e-5, equal_nan=True)
    kept = moved.tokens()
    moved.carve(moved.occupied_keys[::2], before=3)
    left = moved.n_tokens
    moved.move_views({1: turned(5, 3.0)})
    assert moved.n_tokens == left < len(kept)
