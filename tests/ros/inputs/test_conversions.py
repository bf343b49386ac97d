# SPDX-License-Identifier: Apache-2.0
"""Conversions against numbers worked out by hand, and against random bytes."""

from __future__ import annotations

import array
import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import image, info
from scipy.spatial.transform import Rotation

from adatoken3d_ros.ros.inputs import conversions as c
from adatoken3d_ros.ros.outputs import fill


def test_no_ros_is_imported() -> None:
    code = (
        "import sys, adatoken3d_ros.ros.inputs.conversions, adatoken3d_ros.ros.inputs.pairing, adatoken3d_ros.ros.bag; "
        "assert not {'rclpy', 'sensor_msgs', 'geometry_msgs', 'adatoken3d'} & set(sys.modules), 'ROS was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- colour


@pytest.mark.parametrize(
    ("encoding", "pixel"),
    [
        ("rgb8", [10, 20, 30]),
        ("bgr8", [30, 20, 10]),
        ("rgba8", [10, 20, 30, 99]),
        ("bgra8", [30, 20, 10, 99]),
    ],
)
def test_colour_orders(encoding: str, pixel: list[int]) -> None:
    other = [value + 1 for value in pixel]
    message = image(encoding, 2, 1, 2 * len(pixel), bytes(pixel + other))
    found = c.image_to_rgb(message)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[10, 20, 30], [11, 21, 31]]]
    assert all(stride > 0 for stride in found.strides)


def test_mono_becomes_grey() -> None:
    assert c.image_to_rgb(image("mono8", 2, 1, 2, bytes([7, 9]))).tolist() == [[[7, 7, 7], [9, 9, 9]]]


def test_padding_of_rows_is_skipped() -> None:
    rows = bytes([1, 2, 3, 250, 251]) + bytes([4, 5, 6, 252, 253])
    assert c.image_to_rgb(image("rgb8", 1, 2, 5, rows)).tolist() == [[[1, 2, 3]], [[4, 5, 6]]]


def test_rgb8_is_a_view_of_the_message() -> None:
    message = image("rgb8", 1, 1, 3, bytes([1, 2, 3]))
    assert np.shares_memory(c.image_to_rgb(message), np.frombuffer(message.data, np.uint8))


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (image("yuv422", 2, 1, 4, bytes(4)), "'yuv422'"),
        (image("16UC1", 2, 1, 4, bytes(4)), "'16UC1'"),
        (image("rgb8", 0, 1, 0, b""), "0x1"),
        (image("rgb8", 2, 1, 5, bytes(5)), "step 5"),
        (image("rgb8", 2, 2, 6, bytes(11)), "11 bytes"),
        (image("rgb8", 2, 2, 6, bytes(13)), "13 bytes"),
    ],
)
def test_bad_colour_names_the_value(message: Any, named: str) -> None:
    with pytest.raises(c.ConversionError, match=named):
        c.image_to_rgb(message)


# --- depth


@pytest.mark.parametrize(("encoding"), ["16UC1", "mono16"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_millimetres_to_metres(encoding: str, order: str) -> None:
    data = np.array([0, 1, 1234, 65534, 65535], dtype=order + "u2").tobytes()
    found = c.depth_to_metres(image(encoding, 5, 1, 10, data, big=int(order == ">")))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([[np.nan, 0.001, 1.234, 65.534, np.nan]], np.float32))


@pytest.mark.parametrize("order", ["<", ">"])
def test_float_depth_is_metres_and_only_positive_numbers_count(order: str) -> None:
    data = np.array([1.5, 0.0, -2.0, np.nan, np.inf, -np.inf], dtype=order + "f4").tobytes()
    found = c.depth_to_metres(image("32FC1", 6, 1, 24, data, big=int(order == ">")))
    np.testing.assert_array_equal(found, np.array([[1.5, np.nan, np.nan, np.nan, np.nan, np.nan]], np.float32))


def test_depth_with_a_step_that_is_no_multiple_of_the_pixel() -> None:
    rows = np.array([1000], "<u2").tobytes() + b"\xff" + np.array([2000], "<u2").tobytes() + b"\xff"
    assert c.depth_to_metres(image("16UC1", 1, 2, 3, rows)).tolist() == [[1.0], [2.0]]


def test_float_depth_does_not_change_the_message() -> None:
    message = image("32FC1", 1, 1, 4, np.array([-1.0], "<f4").tobytes())
    c.depth_to_metres(message)
    assert np.frombuffer(message.data, "<f4")[0] == -1.0


def test_bad_depth_names_the_value() -> None:
    with pytest.raises(c.ConversionError, match="'64FC1'"):
        c.depth_to_metres(image("64FC1", 1, 1, 8, bytes(8)))


# --- calibration


def test_camera_uses_k_or_p() -> None:
    raw = c.camera_info_to_camera(info())
    assert raw.K.tolist() == [[500.0, 0.0, 320.0], [0.0, 510.0, 240.0], [0.0, 0.0, 1.0]]
    assert (raw.width, raw.height, raw.D.size) == (640, 480, 0)
    assert c.camera_info_to_camera(info(), rectified=True).K[0].tolist() == [400.0, 0.0, 310.0]


def test_region_of_interest_then_binning() -> None:
    roi = SimpleNamespace(x_offset=100, y_offset=50, width=400, height=300)
    camera = c.camera_info_to_camera(info(roi=roi, binning_x=2, binning_y=3))
    assert (camera.width, camera.height) == (200, 100)
    assert camera.K.tolist() == [[250.0, 0.0, 110.0], [0.0, 170.0, 190.0 / 3], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"k": [0.0] * 9}, r"K\[0\] = 0"),
        ({"k": [np.nan] + [1.0] * 8}, "nan"),
        ({"k": [1.0] * 4}, "4 numbers"),
        ({"width": 0}, "0x480"),
        ({"d": [0.1], "distortion_model": "plumb_bob"}, "1 coefficients"),
        ({"d": [0.1] * 5, "distortion_model": "wavy"}, "'wavy'"),
        ({"d": [np.inf] * 5}, "inf"),
    ],
)
def test_bad_calibration_names_the_value(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(c.ConversionError, match=named):
        c.camera_info_to_camera(info(**changes))


def test_rectify_moves_a_distorted_point_to_the_pinhole_position() -> None:
    camera = c.camera_info_to_camera(info(d=[0.2, -0.1, 0.0, 0.0, 0.0]))
    ray = np.array([0.4, 0.3, 1.0])
    r2 = 0.4**2 + 0.3**2
    bent = ray[:2] * (1 + 0.2 * r2 - 0.1 * r2 * r2)
    u, v = (camera.K[:2, :2] @ bent + camera.K[:2, 2]).round().astype(int)
    rgb, depth = np.zeros((480, 640, 3), np.uint8), np.full((480, 640), np.nan, np.float32)
    rgb[v - 1 : v + 2, u - 1 : u + 2] = 255
    depth[v - 1 : v + 2, u - 1 : u + 2] = 2.0
    flat, far = c.rectify_rgb(rgb, camera), c.rectify_depth(depth, camera)
    at = (camera.K @ ray)[:2].round().astype(int)
    assert flat[at[1], at[0], 0] > 128
    assert far[at[1], at[0]] == 2.0
    assert np.isnan(far[240, 320])
    straight = c.camera_info_to_camera(info())
    assert c.rectify_rgb(rgb, straight) is rgb and c.rectify_depth(depth, straight) is depth


def bent_by(model: str, d: list[float], ray: np.ndarray) -> np.ndarray:
    """Where a lens shows a ray (x, y, 1), at focal length 1: as OpenCV defines its models."""
    x, y = ray
    r2 = float(x * x + y * y)
    if model == "equidistant":
        theta = math.atan(math.sqrt(r2))
        k1, k2, k3, k4 = d
        bent = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8)
        return ray * bent / math.sqrt(r2)
    k1, k2, p1, p2, k3, k4, k5, k6 = d
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return ray * radial + (2 * p1 * x * y + p2 * (r2 + 2 * x * x), p1 * (r2 + 2 * y * y) + 2 * p2 * x * y)


@pytest.mark.parametrize(
    ("model", "d"),
    [
        ("equidistant", [0.1, -0.02, 0.01, -0.003]),
        ("rational_polynomial", [0.4, -0.15, 0.004, -0.003, 0.02, 0.1, -0.05, 0.01]),
    ],
)
def test_every_lens_against_its_formula(model: str, d: list[float]) -> None:
    """Bright near squares, drawn where the lens shows them, come out where a pinhole camera would."""
    camera = c.camera_info_to_camera(info(distortion_model=model, d=d))
    rays = [np.array([x, y]) for x in (-0.5, 0.0, 0.45) for y in (-0.38, 0.05, 0.35)]
    bent = np.array([bent_by(model, d, ray) for ray in rays])
    if model == "equidistant":
        theirs = cv2.fisheye.distortPoints(np.array(rays)[None], np.eye(3), np.array(d))[0]
    else:
        points = np.array([[*ray, 1.0] for ray in rays])
        theirs = cv2.projectPoints(points, np.zeros(3), np.zeros(3), np.eye(3), np.array(d))[0][:, 0]
    np.testing.assert_allclose(bent, theirs, atol=1e-9)
    rgb, depth = np.zeros((480, 640, 3), np.uint8), np.full((480, 640), 9.0, np.float32)
    moved = 0.0
    for i, (ray, at) in enumerate(zip(rays, bent, strict=True)):
        (x, y), (u, v) = ((p * (500, 510) + (320, 240)).round().astype(int) for p in (ray, at))
        rgb[v - 1 : v + 2, u - 1 : u + 2], depth[v - 1 : v + 2, u - 1 : u + 2] = 255, 1 + i
        moved = max(moved, math.hypot(u - x, v - y))
    assert moved > 10, "or this test would see nothing"
    flat, far = c.rectify_rgb(rgb, camera), c.rectify_depth(depth, camera)
    for i, ray in enumerate(rays):
        x, y = (ray * (500, 510) + (320, 240)).round().astype(int)
        assert flat[y, x, 0] > 128 and far[y, x] == 1 + i


# --- poses


def test_quaternions_agree_with_scipy_both_ways() -> None:
    for quaternion in Rotation.random(50, random_state=0).as_quat():
        R = c.quaternion_to_rotation(*quaternion)
        np.testing.assert_allclose(R, Rotation.from_quat(quaternion).as_matrix(), atol=1e-12)
        back = np.array(fill.rotation_to_quaternion(R))
        np.testing.assert_allclose(back, quaternion * np.sign(quaternion[3]), atol=1e-9)
    for axis in np.eye(3):
        half_turn = Rotation.from_rotvec(np.pi * axis).as_matrix()
        np.testing.assert_allclose(
            c.quaternion_to_rotation(*fill.rotation_to_quaternion(half_turn)), half_turn, atol=1e-12
        )


@pytest.mark.parametrize("quaternion", [(0, 0, 0, 0), (0, 0, 0, 1.1), (np.nan, 0, 0, 1), (np.inf, 0, 0, 1)])
def test_what_is_no_rotation_is_refused(quaternion: tuple[float, ...]) -> None:
    with pytest.raises(c.ConversionError, match="quaternion"):
        c.quaternion_to_rotation(*quaternion)


def test_small_rounding_is_normalised_away() -> None:
    R = c.quaternion_to_rotation(0.0, 0.0, 0.0, 1.01)
    np.testing.assert_allclose(R, np.eye(3))


def test_pose_round_trip() -> None:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("xyz", [0.3, -0.7, 2.0]).as_matrix()
    T[:3, 3] = (1.0, -2.0, 3.0)
    pose = SimpleNamespace(position=SimpleNamespace(), orientation=SimpleNamespace())
    np.testing.assert_allclose(c.pose_to_matrix(fill.fill_pose(pose, T)), T, atol=1e-12)


def test_stamps() -> None:
    stamp = fill.ns_to_stamp(SimpleNamespace(), 1_305_031_102_175_304_000)
    assert (stamp.sec, stamp.nanosec) == (1_305_031_102, 175_304_000)
    assert c.stamp_to_ns(stamp) == 1_305_031_102_175_304_000


def test_written_images_can_be_read() -> None:
    rgb = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    message = fill.fill_image(SimpleNamespace(data=array.array("B")), rgb[:, ::-1], "rgb8")
    assert (c.image_to_rgb(message) == rgb[:, ::-1]).all()
    depth = np.array([[0, 1500]], np.uint16)
    message = fill.fill_image(SimpleNamespace(data=array.array("B")), depth, "16UC1")
    np.testing.assert_array_equal(c.depth_to_metres(message), np.array([[np.nan, 1.5]], np.float32))


# --- anything at all

ENCODINGS = st.sampled_from([*c.COLOUR_ENCODINGS, *c.DEPTH_ENCODINGS, "", "yuv422", "8UC3"]) | st.text(max_size=8)
SIZES = st.integers(0, 9) | st.sampled_from([640, 2**31, 2**32 - 1])
NUMBERS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(max_examples=400, deadline=None)
@given(ENCODINGS, SIZES, SIZES, SIZES, st.binary(max_size=300), st.integers(0, 255))
def test_random_images_raise_nothing_else(
    encoding: str, width: int, height: int, step: int, data: bytes, big: int
) -> None:
    message = image(encoding, width, height, step, data, big)
    for convert in (c.image_to_rgb, c.depth_to_metres):
        try:
            found = convert(message)
        except c.ConversionError:
            continue
        assert found.shape[:2] == (height, width)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(NUMBERS, max_size=14),
    st.lists(NUMBERS, min_size=9, max_size=9),
    st.sampled_from(["plumb_bob", "rational_polynomial", "equidistant", "x"]),
    SIZES,
    SIZES,
)
def test_random_calibrations_raise_nothing_else(
    d: list[float], k: list[float], model: str, size: int, binning: int
) -> None:
    try:
        camera = c.camera_info_to_camera(info(d=d, k=k, distortion_model=model, width=size, binning_x=binning))
    except c.ConversionError:
        return
    assert np.isfinite(camera.K).all() and camera.K[0, 0] > 0


@settings(max_examples=200, deadline=None)
@given(st.lists(NUMBERS, min_size=7, max_size=7))
def test_random_poses_raise_nothing_else(numbers: list[float]) -> None:
    x, y, z, qx, qy, qz, qw = numbers
    pose = SimpleNamespace(position=SimpleNamespace(x=x, y=y, z=z), orientation=SimpleNamespace(x=qx, y=qy, z=qz, w=qw))
    try:
        T = c.pose_to_matrix(pose)
    except c.ConversionError:
        return
    np.testing.assert_allclose(T[:3, :3] @ T[:3, :3].T, np.eye(3), atol=1e-9)
