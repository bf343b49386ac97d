# SPDX-License-Identifier: Apache-2.0
"""Which pixels a token stands for, and where it is."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lmm.qwen3vl.geometry import grid_of, token_points
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import GeometryError

PIXELS = (32 * 32, 640 * 480)


def make_frame(height: int, width: int, seed: int = 0, holes: float = 0.3) -> PosedFrame:
    generator = np.random.default_rng(seed)
    depth = generator.uniform(0.5, 12.0, (height, width)).astype(np.float32)
    depth[generator.uniform(size=depth.shape) < holes] = np.nan
    depth[:20, :20] = 0.0  # no depth at all in a corner
    T = np.eye(4)
    T[:3, :3] = [[1, 0, 0], [0, 0, 1], [0, -1, 0]]
    T[:3, 3] = [1.0, -2.0, 0.5]
    K = np.array([[200.0, 0, width / 2 + 3], [0, 210.0, height / 2 - 5], [0, 0, 1]])
    return PosedFrame(generator.integers(0, 255, (height, width, 3), dtype=np.uint8), depth, K, T, 1)


@pytest.mark.parametrize(
    ("size", "stride", "pixels", "grid"),
    [
        ((480, 640), 32, (65_536, 640 * 480), (15, 20)),
        ((720, 1280), 32, (65_536, 640 * 480), (12, 23)),
        ((100, 70), 32, (65_536, 640 * 480), (10, 7)),
        ((32, 32), 32, PIXELS, (1, 1)),
    ],
)
def test_grid_is_the_originals(size, stride: int, pixels: tuple[int, int], grid: tuple[int, int]) -> None:
    assert grid_of(*size, stride, pixels) == grid


@pytest.mark.parametrize("size", [(31, 640), (480, 31), (1, 1)])
def test_smaller_than_a_patch_is_refused(size) -> None:
    with pytest.raises(GeometryError, match=r"smaller than a patch of 32x32"):
        grid_of(*size, 32, PIXELS)


@pytest.mark.parametrize(("size", "grid"), [((64, 96), (4, 6)), ((67, 91), (4, 6)), ((50, 40), (10, 7))])
def test_points_by_hand(size: tuple[int, int], grid: tuple[int, int]) -> None:
    """Pixel by pixel: each belongs to the token into which its centre is resized; the median of those with depth."""
    frame = make_frame(*size)
    found = token_points(frame, grid, max_depth=10.0)
    members: dict[int, list[tuple[float, int, int]]] = {}
    for v in range(size[0]):
        for u in range(size[1]):
            cell = int((v + 0.5) * grid[0] / size[0]) * grid[1] + int((u + 0.5) * grid[1] / size[1])
            z = float(frame.depth[v, u])
            if 0 < z <= 10.0:
                members.setdefault(cell, []).append((z, v, u))
    assert len(found.xyz) == grid[0] * grid[1]
    for cell in range(len(found.xyz)):
        assert found.valid[cell] == (cell in members)
        if cell not in members:
            assert np.isnan(found.xyz[cell]).all()
            continue
        z, v, u = sorted(members[cell])[(len(members[cell]) - 1) // 2]
        camera = np.linalg.inv(frame.K) @ [u, v, 1] * z
        np.testing.assert_allclose(found.xyz[cell], (frame.T_world_camera @ [*camera, 1])[:3], atol=1e-5)
        assert (found.rgb[cell] == frame.rgb[v, u]).all()
    assert not found.valid.all()


def test_on_a_flat_wall_a_token_is_where_its_middle_is() -> None:
    frame = make_frame(64, 96)
    wall = PosedFrame(frame.rgb, np.full((64, 96), 2.0, np.float32), frame.K, frame.T_world_camera, 1)
    found = token_points(wall, (4, 6), max_depth=10.0)
    across, up = found.xyz.reshape(4, 6, 3)[0, :, 0], found.xyz.reshape(4, 6, 3)[:, 0, 2]
    middle = 1.0 + (np.arange(6) * 16 + 7.5 - frame.K[0, 2]) * 2.0 / frame.K[0, 0]
    np.testing.assert_allclose(across, middle, atol=0.51 * 2.0 / frame.K[0, 0])
    np.testing.assert_allclose(np.diff(up), -16 * 2.0 / frame.K[1, 1], atol=1e-5)
