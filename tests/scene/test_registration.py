# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.scene import registration
from adatoken3d_ros.scene.registration import (
    register_depth,
    resample_depth,
    scaled_intrinsics,
    splat_radius,
    z_buffer,
)

NAN = math.nan
K2 = np.array([[2.0, 0, 1.0], [0, 2.0, 1.0], [0, 0, 1]])


def test_points_land_on_their_pixels_and_the_nearest_wins() -> None:
    # u = 2 x / z + 1: x = 0 -> 1, x = 1 at z = 2 -> 2; y likewise. Points 0 and 3 share a pixel, 3 is nearer.
    xyz = np.array([[0, 0, 2.0], [1, 0, 2.0], [0, -1, 2.0], [0, 0, 1.5], [0, 0, -1], [NAN, 0, 1], [9, 0, 1]])
    depth, index = z_buffer(xyz, K2, 3, 2)
    np.testing.assert_array_equal(depth, np.array([[NAN, 2.0, NAN], [NAN, 1.5, 2.0]], np.float32))
    np.testing.assert_array_equal(index, [[-1, 2, -1], [-1, 3, 1]])


def test_squares_reach_into_the_picture_and_near_ones_cover_far_ones() -> None:
    # Point 0 at column -1 (outside by one), point 1 at column 2.
    xyz = np.array([[-1.0, 0, 1.0], [1.0, 0, 2.0]])
    K = np.array([[2.0, 0, 1.0], [0, 2.0, 0.0], [0, 0, 1]])
    depth, index = z_buffer(xyz, K, 4, 1, radius=1)
    np.testing.assert_array_equal(index, [[0, 1, 1, 1]])
    np.testing.assert_array_equal(depth, np.array([[1, 2, 2, 2]], np.float32))
    _, index = z_buffer(xyz, K, 4, 1, radius=2)
    np.testing.assert_array_equal(index, [[0, 0, 1, 1]])


def test_huge_and_infinite_points_are_no_trouble() -> None:
    xyz = np.array([[1e38, 1e38, 1e38], [np.inf, 0, 1], [0, 0, np.inf], [0, 0, 0]], np.float32)
    depth, index = z_buffer(xyz, K2, 4, 4)
    assert index.max() == 0 and depth[3, 3] == np.float32(1e38) and np.isnan(depth).sum() == 15


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(0, 3))
def test_the_z_buffer_equals_the_loop(seed: int, n: int, radius: int) -> None:
    rng = np.random.default_rng(seed)
    xyz = rng.uniform(-1.5, 1.5, (n, 3))
    xyz[:, 2] = rng.choice([1.0, 1.5, 2.0, -1.0], n)
    width, height = 5, 4
    want = np.full((height, width), np.inf)
    who = np.full((height, width), -1)
    for i, (x, y, z) in enumerate(xyz):
        if z <= 0:
            continue
        u, v = round(2 * x / z + 1), round(2 * y / z + 1)
        for r in range(v - radius, v + radius + 1):
            for c in range(u - radius, u + radius + 1):
                if 0 <= r < height and 0 <= c < width and z < want[r, c]:
                    want[r, c], who[r, c] = z, i
    depth, index = z_buffer(xyz, K2, width, height, radius)
    np.testing.assert_array_equal(index, who)
    np.testing.assert_array_equal(depth, np.where(who < 0, np.nan, want).astype(np.float32))


def test_without_a_radius_the_pixels_that_are_hit_tell_it() -> None:
    # Point 0 lies outside of the picture, but its square reaches in.
    xyz = np.append([[-1.0, 20, 1]], np.random.default_rng(3).uniform((0, 0, 1), (40, 40, 1), (80, 3)), axis=0)
    K = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1]])
    hit = int((z_buffer(xyz, K, 40, 40)[1] >= 0).sum())
    radius = splat_radius(hit, 40, 40)
    assert 60 < hit <= 80 and radius == 2
    for found, wanted in zip(z_buffer(xyz, K, 40, 40, None), z_buffer(xyz, K, 40, 40, radius), strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert 0 in z_buffer(xyz, K, 40, 40, None)[1]


def test_squares_about_touch() -> None:
    assert splat_radius(640 * 480, 640, 480) == 0
    assert splat_radius(640 * 480 // 16, 640, 480) == 2
    assert splat_radius(0, 640, 480) == 8


def test_depth_of_a_camera_beside_this_one_by_hand() -> None:
    """The depth camera is 0.5 m to the left of the colour camera's centre: disparity f b / z."""
    K = np.array([[4.0, 0, 2.0], [0, 4.0, 0.0], [0, 0, 1]])
    T = np.eye(4)
    T[0, 3] = -0.5
    # z = 2: moves by -1 pixel; z = 1: by -2 pixels. Columns 3 (far) and 4 (near) both land on column 2: near wins.
    depth = np.array([[2, NAN, NAN, 2, 1]], np.float32)
    found = register_depth(depth, K, K, T, 5, 1)
    np.testing.assert_array_equal(found, np.array([[NAN, NAN, 1, NAN, NAN]], np.float32))


def test_a_camera_behind_measures_less() -> None:
    T = np.eye(4)
    T[2, 3] = -0.25  # the depth camera stands 0.25 m behind
    found = register_depth(np.full((3, 3), 1.25, np.float32), K2, K2, T, 3, 3)
    assert found[1, 1] == 1.0


def test_the_same_camera_changes_nothing() -> None:
    depth = np.random.default_rng(0).uniform(0.5, 4, (7, 9)).astype(np.float32)
    depth[2, 3] = NAN
    K = np.array([[8.0, 0, 4.0], [0, 8.0, 3.0], [0, 0, 1]])
    np.testing.assert_allclose(register_depth(depth, K, K, np.eye(4), 9, 7), depth, rtol=1e-6)
    np.testing.assert_array_equal(resample_depth(depth, K, K, 9, 7), depth)


def test_finer_pixels_leave_no_holes_and_cover_no_measurement() -> None:
    K = np.array([[8.0, 0, 4.0], [0, 8.0, 4.0], [0, 0, 1]])
    depth = np.array([[1, 1], [1, 3]], np.float32)
    K_depth = scaled_intrinsics(K, 0.25, 0.25)
    found = register_depth(depth, K_depth, K, np.eye(4), 8, 8)
    assert not np.isnan(found[1:7, 1:7]).any() and set(np.unique(found[~np.isnan(found)])) == {1.0, 3.0}
    exact, _ = z_buffer(np.array([[1.5 / 8 * 3, 1.5 / 8 * 3, 3.0]]), K, 8, 8)
    assert found[~np.isnan(exact)] == 3.0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.integers(0, 12))
def test_spreading_gives_the_least_of_each_square(seed: int, height: int, width: int, radius: int) -> None:
    """Also where the square is larger than the picture; by the loop."""
    values = np.random.default_rng(seed).integers(0, 50, (height, width)).astype(np.uint64)
    found = registration._spread(values, radius)
    for v in range(height):
        for u in range(width):
            square = values[max(0, v - radius) : v + radius + 1, max(0, u - radius) : u + radius + 1]
            assert found[v, u] == square.min()


@pytest.mark.parametrize(("coarser", "radius"), [(4.0, 2), (65.0, 32), (66.0, 32), (16_000.0, 32), (1e12, 32)])
def test_no_pixel_is_drawn_larger_than_the_limit(monkeypatch: pytest.MonkeyPatch, coarser: float, radius: int) -> None:
    """A depth camera whose pixels are so many times coarser: the work is bounded whatever its CameraInfo says."""
    radii: list[int] = []
    original = registration.z_buffer

    def watched(xyz: Any, K: Any, width: int, height: int, radius: int = 0) -> Any:
        radii.append(radius)
        return original(xyz, K, width, height, min(radius, 99))

    monkeypatch.setattr(registration, "z_buffer", watched)
    K = np.array([[500.0, 0, 31.5], [0, 500.0, 23.5], [0, 0, 1]])
    K_depth = K.copy()
    K_depth[:2] /= coarser
    register_depth(np.ones((3, 4), np.float32), K_depth, K, np.eye(4), 64, 48)
    assert radii == [0, radius] and radius <= registration.LARGEST_PIXEL


def test_a_smaller_image_of_the_same_view_is_looked_up() -> None:
    K = np.array([[8.0, 0, 1.5], [0, 8.0, 1.5], [0, 0, 1]])
    K_half = scaled_intrinsics(K, 0.5, 0.5)
    assert K_half[0, 2] == 0.5 and K_half[0, 0] == 4.0
    found = resample_depth(np.array([[1, 2], [3, NAN]], np.float32), K_half, K, 4, 4)
    np.testing.assert_array_equal(
        found, np.array([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, NAN, NAN], [3, 3, NAN, NAN]], np.float32)
    )


def test_what_the_depth_camera_does_not_see_stays_empty() -> None:
    K = np.array([[4.0, 0, 2.0], [0, 4.0, 0.0], [0, 0, 1]])
    narrow = np.array([[4.0, 0, 0.0], [0, 4.0, 0.0], [0, 0, 1]])
    found = resample_depth(np.ones((1, 1), np.float32), narrow, K, 5, 1)
    np.testing.assert_array_equal(found, np.array([[NAN, NAN, 1, NAN, NAN]], np.float32))


@pytest.mark.parametrize("shift", [0.0, 0.05])
def test_registering_a_plane_gives_the_plane(shift: float) -> None:
    """A wall that both cameras face is at the same distance in both."""
    K_depth = np.array([[40.0, 0, 31.5], [0, 40.0, 23.5], [0, 0, 1]])
    K = np.array([[50.0, 0, 39.5], [0, 50.0, 29.5], [0, 0, 1]])
    T = np.eye(4)
    T[0, 3] = shift
    found = register_depth(np.full((48, 64), 2.0, np.float32), K_depth, K, T, 80, 60)
    np.testing.assert_allclose(found[2:-2, 3:-3], 2.0, rtol=1e-6)
