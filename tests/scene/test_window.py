# SPDX-License-Identifier: Apache-2.0
"""The floor and the middle of a scene: by hand, on a rendered room, and where there is no floor to be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.views import orbit
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.window import best_shift, floor_height, level_patches, middle


def plane(right: tuple[float, float, float], down: tuple[float, float, float], side: int = 5) -> np.ndarray:
    """(side * side, 3) points of a plane whose patches lie so much further with each column and row."""
    row, column = np.mgrid[:side, :side]
    xyz = column[..., None] * np.float32(right) + row[..., None] * np.float32(down)
    return xyz.reshape(-1, 3).astype(np.float32)


def test_only_what_faces_up_is_level() -> None:
    # A camera that looks along +x: right is -y; lower in the picture is nearer on a floor and on the ceiling farther.
    assert level_patches(plane((0, -0.1, 0), (-0.1, 0, 0)), 5).all()
    assert not level_patches(plane((0, -0.1, 0), (0.1, 0, 0)), 5).any(), "a ceiling"
    assert not level_patches(plane((0, -0.1, 0), (0, 0, -0.1)), 5).any(), "a wall"
    ten, forty = np.radians((10.0, 40.0))
    for angle, level in ((ten, True), (forty, False)):
        ramp = plane((0, -0.1, 0), (-0.1 * np.cos(angle), 0, -0.1 * np.sin(angle)))
        assert (level_patches(ramp, 5) == level).all()
    assert not level_patches(np.zeros((1, 3), np.float32), 1).any()


def test_grids_need_not_be_square() -> None:
    wide = plane((0, -0.1, 0), (-0.1, 0, 0)).reshape(5, 5, 3)[:2].reshape(-1, 3)  # two rows of five
    wide[0] = np.nan
    assert level_patches(wide, 5).reshape(2, 5).tolist() == [[False, False, *[True] * 3], [False, *[True] * 4]]


def test_a_patch_beside_a_hole_is_not_level() -> None:
    floor = plane((0, -0.1, 0), (-0.1, 0, 0))
    floor[12] = np.nan  # the middle of five times five
    level = level_patches(floor, 5).reshape(5, 5)
    assert not level[2, 1:4].any() and not level[1:4, 2].any()
    assert level[0].all() and level[4].all() and level.sum() == 20


def surface(x: float, y: float, z: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Points on a level surface of x by y metres, about 50 on each square of 0.2 m."""
    n = int(50 * x * y / 0.04)
    return np.c_[rng.uniform(0, x, n), rng.uniform(0, y, n), rng.normal(z, noise, n)]


@pytest.mark.parametrize("height", [0.0, -1.37, 12.51])
def test_the_floor_is_the_lowest_large_surface(height: float) -> None:
    rng = np.random.default_rng(0)
    table = surface(2.0, 1.0, height + 0.75, 0.01, rng)
    floor = surface(1.0, 1.0, height, 0.01, rng)  # half of what the table shows
    reflection = surface(0.4, 0.4, height - 0.8, 0.01, rng)
    found = floor_height(np.concatenate([table, floor, reflection]))
    assert found == pytest.approx(height, abs=0.01)
    assert floor_height(table) == pytest.approx(height + 0.75, abs=0.01), "until a floor is seen"


def test_points_that_are_far_away_do_not_hide_the_floor() -> None:
    rng = np.random.default_rng(1)
    room = surface(4.0, 4.0, -0.4, 0.005, rng)
    far = np.array([[2e5, -2e5, 2e5], [-2e5, 2e5, -2e5]])  # as far as voxels reach
    assert floor_height(np.concatenate([far, room])) == floor_height(room) == pytest.approx(-0.4, abs=0.02)


def test_no_floor_is_no_floor() -> None:
    rng = np.random.default_rng(1)
    assert floor_height(np.zeros((0, 3))) is None
    assert floor_height(surface(0.3, 0.3, 0.0, 0.01, rng)) is None, "too small to be one"


def test_the_middle_is_not_moved_by_a_few_far_points() -> None:
    grid = np.stack(np.meshgrid(np.arange(0, 6, 0.2), np.arange(2, 6, 0.2)), axis=-1).reshape(-1, 2)
    centres = np.c_[grid, np.ones(len(grid))]
    far = np.array([[80.0, -50.0, 0.0]] * 5)
    np.testing.assert_allclose(middle(np.concatenate([centres, far])), [2.9, 3.9], atol=0.11)


def floor_map(*, z: float, shift: tuple[int, int, int] = (0, 0, 0), width: float = 4.0) -> TokenMap:
    """A map of a floor from x = -width / 2 to width / 2, 4 m deep."""
    token_map = TokenMap(0.2)
    grid = np.stack(np.meshgrid(np.arange(-width / 2, width / 2, 0.1), np.arange(-2, 2, 0.1)), axis=-1).reshape(-1, 2)
    xyz = np.c_[grid, np.full(len(grid), z)].astype(np.float32) + 0.01
    n = len(xyz)
    token_map.add_view(1, torch.zeros(n, 1), xyz, np.zeros((n, 3), np.uint8), level=np.ones(n, bool))
    token_map.move_origin(shift)
    return token_map


def test_the_origin_moves_by_whole_voxels_and_only_when_it_is_far_off() -> None:
    assert best_shift(floor_map(z=0.1)).tolist() == [0, 0, 0], "half a voxel is near enough"
    assert best_shift(floor_map(z=-0.72)).tolist() == [0, 0, -4]
    # Coverage that grows to one side moves the middle, and the origin follows late and in one step.
    for right, expected in ((1.5, 0), (2.5, 6)):
        token_map = floor_map(z=0.0)
        x = np.arange(2.0, 2.0 + right, 0.1)
        xyz = np.stack(np.meshgrid(x, np.arange(-2, 2, 0.1), [0.0]), axis=-1).reshape(-1, 3).astype(np.float32)
        token_map.add_view(2, torch.zeros(len(xyz), 1), xyz, np.zeros((len(xyz), 3), np.uint8))
        assert best_shift(token_map).tolist() == [expected, 0, 0]
    assert best_shift(floor_map(z=0.0, shift=(4, -4, 0))).tolist() == [4, -4, 0], "0.8 m are near enough"
    assert best_shift(TokenMap(0.2)).tolist() == [0, 0, 0]


def test_a_map_without_a_floor_keeps_its_height() -> None:
    token_map = TokenMap(0.2)
    wall = np.stack(np.meshgrid([3.0], np.arange(-2, 2, 0.1), np.arange(0.5, 2, 0.1)), axis=-1)
    wall = wall.reshape(-1, 3).astype(np.float32)
    token_map.add_view(1, torch.zeros(len(wall), 1), wall, np.zeros((len(wall), 3), np.uint8))
    assert best_shift(token_map).tolist() == [15, 0, 0]


def test_the_floor_of_a_room_is_found_wherever_its_frame_is() -> None:
    room, config = make_room(3), PatchConfig()
    renderer, K = Renderer(room), np.array([[277.0, 0, 159.5], [0, 277.0, 119.5], [0, 0, 1]])
    away = np.array([31.0, -7.0, 1.63])
    token_map = TokenMap(0.2)
    for i in range(6):
        T = orbit(room, 3.0 * i)
        rgb, depth, _ = renderer.render(K, 320, 240, T)
        depth += np.random.default_rng(i).normal(0, 0.005, depth.shape).astype(np.float32)
        moved = T.copy()
        moved[:3, 3] += away
        points = patch_points(PosedFrame(rgb, depth, K, moved, i), config)
        level = level_patches(points.xyz, config.geometry.columns)
        token_map.add_view(i, torch.zeros(len(level), 1), points.xyz, points.rgb, points.valid, level)
    assert floor_height(token_map.level_points()) == pytest.approx(away[2], abs=0.03)
    token_map.move_origin(best_shift(token_map))
    assert np.abs(token_map.model_origin - away).max() < 1.0 and abs(token_map.model_origin[2] - away[2]) <= 0.1
