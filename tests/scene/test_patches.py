# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from benchmarks.tokens import patch_points_upstream


def pose(rng: np.random.Generator) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    T[:3, :3] *= np.linalg.det(T[:3, :3])
    T[:3, 3] = rng.uniform(-3, 3, 3)
    return T


def random_frame(width: int, height: int, seed: int = 0) -> PosedFrame:
    rng = np.random.default_rng(seed)
    return PosedFrame(
        rgb=rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        depth=rng.uniform(0.5, 6, (height, width)).astype(np.float32),
        K=np.array([[0.8 * width, 0, 0.51 * width], [0, 0.79 * width, 0.48 * height], [0, 0, 1]]),
        T_world_camera=pose(rng),
        stamp_ns=1,
    )


def flat_frame(depth: np.ndarray) -> PosedFrame:
    """56x56 pixels, f = 56, centre (0, 0), camera at the origin."""
    K = np.array([[56.0, 0, 0], [0, 56, 0], [0, 0, 1]])
    return PosedFrame(np.zeros((56, 56, 3), np.uint8), depth.astype(np.float32), K, np.eye(4), 0)


SMALL = PatchConfig(PatchGeometry.square(56, 4))


def test_points_of_a_flat_wall_by_hand() -> None:
    # Patch (i, j) is seen at pixel (14 j, 14 i): x = 14 j / 56 * 2 m = 0.5 j.
    points = patch_points(flat_frame(np.full((56, 56), 2.0)), SMALL)
    assert points.xyz.shape == (16, 3) and points.xyz.dtype == np.float32
    grid = points.xyz.reshape(4, 4, 3)
    assert_allclose(grid[0, :, 0], [0, 0.5, 1, 1.5])
    assert_allclose(grid[:, 0, 1], [0, 0.5, 1, 1.5])
    assert_allclose(grid[..., 2], 2)
    assert points.valid.all()


def test_bad_depth_is_masked() -> None:
    depth = np.full((56, 56), 2.0)
    for column, value in enumerate((np.nan, 0.0, -1.0, np.inf)):
        depth[0, 14 * column] = value
    depth[14, 0] = 10.1
    depth[14, 14] = 10.0
    points = patch_points(flat_frame(depth), SMALL)
    assert points.valid.tolist() == [False] * 4 + [False] + [True] * 11
    assert_array_equal(np.isnan(points.xyz).all(axis=1), ~points.valid)
    assert np.isfinite(points.xyz[points.valid]).all()


def test_only_the_sampled_pixels_matter() -> None:
    depth = np.full((56, 56), np.nan)
    depth[::14, ::14] = 2.0
    assert patch_points(flat_frame(depth), SMALL).valid.all()


def test_infinite_depth_is_refused_without_a_limit_too() -> None:
    config = PatchConfig(PatchGeometry.square(56, 4), max_depth=np.inf)
    assert not patch_points(flat_frame(np.full((56, 56), np.inf)), config).valid.any()


def test_colour_is_that_of_the_sampled_pixel() -> None:
    frame = flat_frame(np.full((56, 56), 2.0))
    frame.rgb[14, 28] = (1, 2, 3)
    assert_array_equal(np.nonzero(patch_points(frame, SMALL).rgb.any(axis=1))[0], [1 * 4 + 2])


@pytest.mark.parametrize(("width", "height"), [(640, 480), (480, 640), (641, 479), (1296, 968)])
def test_equal_to_resizing_cropping_and_back_projecting_every_pixel(width: int, height: int) -> None:
    frame = random_frame(width, height)
    slow, depth = patch_points_upstream([frame.depth], [frame.K], [frame.T_world_camera])
    fast = patch_points(frame)
    assert fast.valid.all()
    assert_allclose(fast.xyz, slow.numpy().reshape(-1, 3), atol=2e-5)
    assert depth.shape == (1, 24, 24)


@settings(deadline=None)
@given(width=st.integers(26, 200), height=st.integers(26, 200), seed=st.integers(0, 100))
def test_equal_to_every_pixel_for_any_size(width: int, height: int, seed: int) -> None:
    frame = random_frame(width, height, seed)
    slow, _ = patch_points_upstream([frame.depth], [frame.K], [frame.T_world_camera], image_size=56, grid=4)
    assert_allclose(patch_points(frame, SMALL).xyz, slow.numpy().reshape(-1, 3), atol=2e-5)


@pytest.mark.parametrize("bad", [{"max_depth": 0.0}, {"max_depth": float("nan")}])
def test_bad_configurations_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        PatchConfig(**bad)  # type: ignore[arg-type]
