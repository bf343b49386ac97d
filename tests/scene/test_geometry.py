# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from adatoken3d_ros.scene.geometry import (
    GeometryError,
    PatchGeometry,
    backproject,
    crop_transform,
    cropped_intrinsics,
    sample_pixels,
)

SIDE = st.integers(1, 1500)


def pillow_sample_pixels(
    width: int, height: int, size: int, grid: int, x0: int, y0: int
) -> tuple[list[int], list[int]]:
    """Resize images of row and column numbers with Pillow, crop, pick: what the closed form must predict."""
    numbers = np.mgrid[0:height, 0:width].astype(np.int32)
    crop = crop_transform(width, height, size)
    resized = [
        np.asarray(Image.fromarray(n).resize((crop.resized_width, crop.resized_height), Image.Resampling.NEAREST))
        for n in numbers
    ]
    step = size // grid
    rows = resized[0][y0 : y0 + size : step, x0].tolist()
    cols = resized[1][y0, x0 : x0 + size : step].tolist()
    return rows, cols


def test_landscape_by_hand() -> None:
    # 640x480: the height shrinks by 336/480 = 0.7, the width to 448, and (448 - 336) / 2 = 56 columns go on each side.
    crop = crop_transform(640, 480, 336)
    assert (crop.scale_x, crop.scale_y, crop.x0, crop.y0) == (0.7, 0.7, 56, 0)
    assert (crop.resized_width, crop.resized_height) == (448, 336)
    K = cropped_intrinsics(np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]]), crop)
    assert_allclose(K, [[350, 0, 320 * 0.7 - 56], [0, 357, 168], [0, 0, 1]])


def test_portrait_is_the_transpose() -> None:
    K = np.array([[500.0, 0, 320], [0, 510, 240], [0, 0, 1]])
    turned = cropped_intrinsics(K[[1, 0, 2]][:, [1, 0, 2]], crop_transform(480, 640, 336))
    assert_allclose(turned, cropped_intrinsics(K, crop_transform(640, 480, 336))[[1, 0, 2]][:, [1, 0, 2]])
    rows, cols = sample_pixels(480, 640, PatchGeometry.square(336, 24))
    other_rows, other_cols = sample_pixels(640, 480, PatchGeometry.square(336, 24))
    assert_array_equal(rows, other_cols)
    assert_array_equal(cols, other_rows)


def test_scannet_colour_size_by_hand() -> None:
    # 1296x968 becomes int(336 * 1296 / 968) = 449 wide; an odd margin of 113 is cut at 56.
    crop = crop_transform(1296, 968, 336)
    assert (crop.resized_width, crop.x0) == (449, 56)


@pytest.mark.parametrize(
    ("width", "height"),
    [(640, 480), (480, 640), (1296, 968), (968, 1296), (641, 479), (336, 336), (337, 500), (320, 240)],
)
def test_sampled_pixels_are_those_of_pillow(width: int, height: int) -> None:
    crop = crop_transform(width, height, 336)
    rows, cols = sample_pixels(width, height, PatchGeometry.square(336, 24))
    assert (rows.tolist(), cols.tolist()) == pillow_sample_pixels(width, height, 336, 24, crop.x0, crop.y0)


@settings(deadline=None)
@given(width=SIDE, height=SIDE, size_and_grid=st.sampled_from([(336, 24), (112, 8), (56, 4), (30, 5), (7, 7)]))
@example(width=40, height=28, size_and_grid=(56, 4))  # halves and wholes: rounding decides between two pixels
def test_sampled_pixels_are_those_of_pillow_for_any_size(
    width: int, height: int, size_and_grid: tuple[int, int]
) -> None:
    size, grid = size_and_grid
    crop = crop_transform(width, height, size)
    if crop.resized_width * crop.resized_height > 3_000_000:
        return  # slivers, which Pillow would blow up to gigabytes
    rows, cols = sample_pixels(width, height, PatchGeometry.square(size, grid))
    assert (rows.tolist(), cols.tolist()) == pillow_sample_pixels(width, height, size, grid, crop.x0, crop.y0)


def test_back_projection_by_hand() -> None:
    # Pixel 50 right of the centre at f = 100 and 2 m is 1 m to the right; the camera at (1, 2, 3) looks along +x.
    K = np.array([[100.0, 0, 40], [0, 100, 30], [0, 0, 1]])
    T = np.eye(4)
    T[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
    T[:3, 3] = (1, 2, 3)
    xyz = backproject(np.float32(2.0), np.array(90), np.array(30), K, T)
    assert xyz.dtype == np.float32
    assert_allclose(xyz, (3, 1, 3))
    assert np.isnan(backproject(np.float32("nan"), np.array(90), np.array(30), K, T)).all()


@settings(deadline=None)
@given(
    depth=st.floats(0.1, 20),
    pixel=st.tuples(st.floats(0, 640), st.floats(0, 480)),
    angle=st.floats(-3, 3),
    place=st.tuples(*[st.floats(-50, 50)] * 3),
)
def test_projecting_a_back_projected_pixel_returns_it(
    depth: float, pixel: tuple[float, float], angle: float, place: tuple[float, float, float]
) -> None:
    K = np.array([[520.0, 0, 320], [0, 500, 240], [0, 0, 1]])
    T = np.eye(4)
    T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    T[:3, 3] = place
    xyz = backproject(np.array(depth), np.array(pixel[0]), np.array(pixel[1]), K, T).astype(np.float64)
    camera = T[:3, :3].T @ (xyz - T[:3, 3])
    # float32 metres at up to 70 m are exact to 4 um, which is 0.02 pixels at 0.1 m.
    assert_allclose((K @ camera)[:2] / camera[2], pixel, atol=0.05)
    assert_allclose(camera[2], depth, atol=1e-5)


def test_sizes_that_cannot_be_sampled_are_named() -> None:
    with pytest.raises(GeometryError, match="0x480"):
        crop_transform(0, 480, 336)
    with pytest.raises(GeometryError, match="336 pixels .* 25 patches"):
        sample_pixels(640, 480, PatchGeometry.square(336, 25))


def test_a_stretched_picture_is_sampled_where_its_patches_begin() -> None:
    """40x20 pixels to 32x48 with 3 rows of 4: every patch is 10 x 6.67 pixels of the picture, of which Pillow's nearest
    picks the one at floor((k + 0.5) * scale)."""
    stretched = PatchGeometry(48, 32, 3, 4, crop=False)
    rows, cols = sample_pixels(40, 20, stretched)
    assert (rows.tolist(), cols.tolist()) == ([0, 6, 13], [0, 10, 20, 30])
    K = np.array([[30.0, 0, 19.5], [0, 40.0, 9.5], [0, 0, 1]])
    cropped = cropped_intrinsics(K, stretched.transform(40, 20))
    assert_allclose(cropped, [[24.0, 0, 15.6], [0, 96.0, 22.8], [0, 0, 1]])
    assert stretched.patches == 12


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ((336, 336, 25, 24), "336 pixels .* 25 patches"),
        ((336, 336, 24, 0), "336 pixels .* 0 patches"),
        ((336, 280, 24, 20), "280x336 pixels is no square"),
    ],
)
def test_geometries_that_cannot_be_are_named(sizes: tuple[int, int, int, int], says: str) -> None:
    with pytest.raises(GeometryError, match=says):
        PatchGeometry(*sizes)
    with pytest.raises(GeometryError, match="0x20"):
        PatchGeometry(48, 32, 3, 4, crop=False).transform(0, 20)
