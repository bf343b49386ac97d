# SPDX-License-Identifier: Apache-2.0
"""What a frame may be: cameras that people have pass, what no camera can be is refused by its value."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.scene import frames
from adatoken3d_ros.scene.frames import FrameError, PosedFrame, check_intrinsics, check_position, check_size


def pinhole(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    return np.array([[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]])


# width, height, fx, fy, cx, cy
CAMERAS = {
    "the smallest depth camera": (160, 120, 120.0, 120.0, 79.5, 59.5),
    "640 x 480": (640, 480, 615.3, 615.1, 320.2, 239.9),
    "4096 x 3072, 90 degrees": (4096, 3072, 2048.0, 2048.0, 2047.5, 1535.5),
    "a fisheye of 160 degrees": (1280, 1024, 180.0, 180.0, 640.0, 512.0),
    "fx a tenth of the width": (640, 480, 64.0, 64.0, 319.5, 239.5),
    "telephoto of one degree": (1920, 1080, 110_000.0, 110_000.0, 960.0, 540.0),
    "a window in the corner of a wide sensor": (64, 64, 2000.0, 2000.0, -3900.0, -2900.0),
    "a spinning lidar's image": (1024, 128, 160.0, 160.0, 511.5, 63.5),
    "binned along one axis": (320, 480, 300.0, 600.0, 160.0, 240.0),
}


@pytest.mark.parametrize("camera", CAMERAS.values(), ids=CAMERAS.keys())
def test_cameras_that_people_have(camera: tuple[int, int, float, float, float, float]) -> None:
    width, height, *numbers = camera
    check_size(width, height)
    check_intrinsics(pinhole(*numbers), width, height)


@pytest.mark.parametrize(
    ("width", "height", "named"),
    [
        (3000, 1, "3000x1 pixels is too narrow"),
        (1, 20_000, "1x20000"),
        (20_000, 20_000, "20000x20000 pixels is too large: at most 8192 a side"),
        (8192, 8192, "at most 8192 a side and 16777216 in all"),
        (8193, 2048, "8193x2048"),
        (81, 10, "81x10"),
        (0, 480, "0x480 pixels is empty"),
        (2**32 - 1, 2**32 - 1, "4294967295x4294967295"),
    ],
)
def test_a_size_that_no_camera_has(width: int, height: int, named: str) -> None:
    with pytest.raises(FrameError, match=named):
        check_size(width, height)


def test_the_limits_themselves_are_allowed() -> None:
    for width, height in ((4096, 4096), (80, 10), (10, 80), (1, 1), (8, 1)):
        check_size(width, height)
    # 640 pixels: the outer border is 320 beside the middle, at a tangent of 10 for f = 32.
    check_intrinsics(pinhole(32.0, 24.0, 319.5, 239.5), 640, 480)
    for f in (31.99, frames.MAX_FOCAL * 1.01):
        with pytest.raises(FrameError, match="no camera of 640x480 pixels has fx="):
            check_intrinsics(pinhole(f, 500.0, 319.5, 239.5), 640, 480)
    check_position((1e5, -1e5, 0.0))


@pytest.mark.parametrize(
    ("K", "named"),
    [
        # Positive focal lengths, and no inverse: 500 * 500 - 250000 * 1 = 0.
        ([[500.0, 250_000.0, 320.0], [1.0, 500.0, 240.0], [0.0, 0.0, 1.0]], "not the matrix of a pinhole camera"),
        ([[500.0, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 0.0]], "not the matrix of a pinhole camera"),
        ([[500.0, 100.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]], "not the matrix of a pinhole camera"),
        ([[0.03, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]], "fx=0.03"),
        ([[500.0, 0.0, 320.0], [0.0, 1e-300, 240.0], [0.0, 0.0, 1.0]], "fy=1e-300"),
        ([[500.0, 0.0, 1e300], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]], "cx=1e.300"),
        ([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], "not calibrated"),
        ([[math.nan, 0.0, 320.0], [0.0, 500.0, 240.0], [0.0, 0.0, 1.0]], "nan"),
    ],
)
def test_a_matrix_that_no_camera_has(K: list[list[float]], named: str) -> None:
    with pytest.raises(FrameError, match=named):
        check_intrinsics(np.array(K), 640, 480)


@pytest.mark.parametrize("z", [1e6, 1e30, -1e308, math.inf, math.nan])
def test_a_pose_where_no_scene_can_be(z: float) -> None:
    with pytest.raises(FrameError, match=r"position \(0, 0, .*\) m is not within 100000 m"):
        check_position((0.0, 0.0, z))


def test_at_the_farthest_place_points_keep_their_centimetre() -> None:
    assert np.spacing(np.float32(frames.MAX_POSITION)) < 0.01 < np.spacing(np.float32(2 * frames.MAX_POSITION))


@pytest.mark.parametrize("what", ["size", "camera", "place"])
def test_a_frame_is_within_all_limits(what: str) -> None:
    shape = (1, 20) if what == "size" else (48, 64)
    T = np.eye(4)
    T[2, 3] = 1e6 if what == "place" else 0.0
    K = pinhole(0.03 if what == "camera" else 50.0, 50.0, 10.0, 0.5)
    with pytest.raises(FrameError, match={"size": "20x1", "camera": "fx=0.03", "place": r"1e\+06"}[what]):
        PosedFrame(np.zeros((*shape, 3), np.uint8), np.ones(shape, np.float32), K, T, 1)


NUMBERS = st.floats() | st.sampled_from([0.0, 1e-320, 1e-3, 1.0, 50.0, 1e3, 1e7, 1e300])


@given(st.lists(NUMBERS, min_size=9, max_size=9), st.integers(-1, 10_000), st.integers(-1, 10_000))
def test_whatever_is_believed_can_be_inverted(numbers: list[float], width: int, height: int) -> None:
    K = np.array(numbers).reshape(3, 3)
    K[1, 0], K[2] = 0.0, (0.0, 0.0, 1.0)
    try:
        check_size(width, height)
        check_intrinsics(K, width, height)
    except FrameError as error:
        assert str(error)
        return
    rays = np.linalg.inv(K) @ [[0, width - 1], [0, height - 1], [1, 1]]
    assert np.isfinite(rays).all() and np.abs(rays[1]).max() <= frames.MAX_TANGENT
    assert max(width, height) <= frames.MAX_ASPECT * min(width, height) and width * height <= frames.MAX_PIXELS
