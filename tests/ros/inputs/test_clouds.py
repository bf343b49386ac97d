# SPDX-License-Identifier: Apache-2.0
"""Clouds by their bytes, by hand, and the frames that they become."""

from __future__ import annotations

import math
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import cloud_message

from adatoken3d_ros.ros.inputs import clouds
from adatoken3d_ros.ros.inputs.clouds import (
    MAX_POINTS,
    Cloud,
    cloud_depth,
    draw_cloud,
    organised_frame,
    read_cloud,
    virtual_cameras,
)
from adatoken3d_ros.ros.inputs.conversions import Camera, ConversionError
from adatoken3d_ros.scene.frames import FrameError, PosedFrame

NAN = math.nan
INT8, UINT8, UINT16, INT32, UINT32, FLOAT32, FLOAT64 = 1, 2, 4, 5, 6, 7, 8
XYZ = [("x", 0, FLOAT32), ("y", 4, FLOAT32), ("z", 8, FLOAT32)]


def message(fields: list[tuple[str, int, int]], points: bytes, step: int, /, **changes: Any) -> Any:
    """One row of points."""
    n = len(points) // step
    described = [SimpleNamespace(name=name, offset=at, datatype=kind, count=1) for name, at, kind in fields]
    values: dict[str, Any] = {
        "width": n,
        "height": 1,
        "point_step": step,
        "row_step": n * step,
        "fields": described,
        "is_bigendian": False,
        "is_dense": True,
        "data": points,
    }
    return SimpleNamespace(**{**values, **changes})


def virtual_frames(cloud: Cloud, T: np.ndarray, stamp: int, **where: bool) -> list[PosedFrame]:
    return [draw_cloud(cloud, T, camera, stamp + i) for i, camera in enumerate(virtual_cameras(cloud, T, **where))]


def test_two_points_by_hand() -> None:
    data = struct.pack("<fffI fffI", 1, 2, 3, 0x00FF8001, -1, NAN, 0.5, 0xAA000203)
    cloud = read_cloud(message([*XYZ, ("rgb", 12, UINT32)], data, 16))
    np.testing.assert_array_equal(cloud.xyz, np.array([[1, 2, 3], [-1, NAN, 0.5]], np.float32))
    np.testing.assert_array_equal(cloud.rgb, [[255, 128, 1], [0, 2, 3]])
    assert (cloud.width, cloud.height) == (2, 1)


def test_rgb_that_is_packed_into_a_float_keeps_its_bits() -> None:
    packed = struct.pack("<I", 0x00102030)
    data = struct.pack("<fff", 1, 2, 3) + packed
    for kind in (FLOAT32, UINT32, INT32):
        cloud = read_cloud(message([*XYZ, ("rgb", 12, kind)], data, 16))
        np.testing.assert_array_equal(cloud.rgb, [[0x10, 0x20, 0x30]])


def test_big_endian_doubles_in_another_order_with_padding_between_fields_points_and_rows() -> None:
    fields = [("rgba", 4, UINT32), ("z", 8, FLOAT64), ("x", 16, FLOAT32), ("y", 20, FLOAT32)]
    point = struct.pack(">4xIdff8x", 0xFF010203, 3.0, 1.0, 2.0)
    row = 2 * point + b"padding"
    cloud = read_cloud(message(fields, 2 * row, 32, width=2, height=2, row_step=71, is_bigendian=True))
    np.testing.assert_array_equal(cloud.xyz, np.tile(np.float32([1, 2, 3]), (4, 1)))
    np.testing.assert_array_equal(cloud.rgb, np.tile(np.uint8([1, 2, 3]), (4, 1)))
    assert (cloud.width, cloud.height) == (2, 2)


KINDS = {INT8: "i1", UINT8: "u1", UINT16: "u2", INT32: "i4", UINT32: "u4", FLOAT32: "f4", FLOAT64: "f8"}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_layout_gives_the_same_numbers(data: st.DataObject) -> None:
    """Fields in any order with any padding, either byte order, rows with padding; written by numpy's own structures."""
    order, (height, width) = data.draw(st.sampled_from("<>")), data.draw(st.sampled_from([(1, 7), (3, 4)]))
    kinds = {name: data.draw(st.sampled_from([FLOAT32, FLOAT64])) for name in "xyz"}
    colour = data.draw(st.sampled_from(["rgb", "rgba", "r g b", "intensity", ""]))
    if colour in ("rgb", "rgba"):
        kinds[colour] = data.draw(st.sampled_from([FLOAT32, UINT32, INT32]))
    elif colour == "r g b":
        kinds |= dict.fromkeys("rgb", UINT8)
    elif colour:
        kinds[colour] = data.draw(st.sampled_from([UINT8, UINT16, FLOAT32, FLOAT64]))
    kinds["ring"] = UINT16
    names, offsets, end = data.draw(st.permutations(list(kinds))), [], 0
    for name in names:
        offsets.append(end + data.draw(st.integers(0, 5)))
        end = offsets[-1] + np.dtype(KINDS[kinds[name]]).itemsize
    step = end + data.draw(st.integers(0, 9))
    written = {name: "u4" if name in ("rgb", "rgba") else KINDS[kinds[name]] for name in names}
    layout = {"names": names, "formats": [order + written[name] for name in names], "offsets": offsets}
    points = np.zeros((height, width), np.dtype({**layout, "itemsize": step}))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    for name in names:
        points[name] = rng.integers(0, 256, (height, width))
    for i, axis in enumerate("xyz"):
        points[axis] += i / 4
    packed = rng.integers(0, 256, (height, width, 3))
    if colour in ("rgb", "rgba"):
        points[colour] = packed[..., 0] << 16 | packed[..., 1] << 8 | packed[..., 2]
    padding = bytes(data.draw(st.integers(0, 6)))
    rows = b"".join(row.tobytes() + padding for row in points)
    fields = [(name, at, kinds[name]) for name, at in zip(names, offsets, strict=True)]
    cloud = read_cloud(
        message(fields, rows, step, width=width, height=height, row_step=width * step + len(padding),
                is_bigendian=order == ">")
    )  # fmt: skip
    np.testing.assert_array_equal(cloud.xyz, np.stack([points[axis].reshape(-1) for axis in "xyz"], 1), strict=False)
    if colour in ("rgb", "rgba"):
        np.testing.assert_array_equal(cloud.rgb, packed.reshape(-1, 3))
    elif colour == "r g b":
        np.testing.assert_array_equal(cloud.rgb, np.stack([points[name].reshape(-1) for name in "rgb"], 1))
    elif colour:
        assert cloud.rgb is not None and (np.ptp(cloud.rgb, axis=1) == 0).all()
        brightest, darkest = (cloud.rgb[pick(points[colour])] for pick in (np.argmax, np.argmin))
        assert (brightest >= darkest).all()
    else:
        assert cloud.rgb is None


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("padding", [0, 7])
def test_ros_reads_the_same_numbers(monkeypatch: pytest.MonkeyPatch, big_endian: bool, padding: int) -> None:
    """What sensor_msgs_py reads, and what is left to us because it would read it wrong."""
    point_cloud2 = pytest.importorskip("sensor_msgs_py.point_cloud2", reason="sensor_msgs_py is not installed")
    from sensor_msgs.msg import PointCloud2, PointField

    order = ">" if big_endian else "<"
    formats = [order + "f4", order + "f4", order + "f8", order + "u4"]
    layout = {"names": ["z", "x", "y", "rgb"], "formats": formats, "offsets": [0, 8, 16, 24]}
    points = np.zeros((5, 10), np.dtype({**layout, "itemsize": 30}))
    for name in "xyz":
        points[name] = np.random.default_rng(ord(name)).normal(size=points.shape)
    points["rgb"] = np.random.default_rng(0).integers(0, 1 << 24, points.shape)
    row = 30 * 10 + padding
    sent = PointCloud2(height=5, width=10, point_step=30, row_step=row, is_bigendian=big_endian)
    kinds = {"z": (0, FLOAT32), "x": (8, FLOAT32), "y": (16, FLOAT64), "rgb": (24, FLOAT32)}
    sent.fields = [PointField(name=name, offset=at, datatype=kind, count=1) for name, (at, kind) in kinds.items()]
    sent.data.frombytes(b"".join(line.tobytes() + bytes(padding) for line in points))
    asked: list[str] = []

    def read_points(cloud: Any, field_names: list[str]) -> Any:
        asked.extend(field_names)
        return point_cloud2.read_points(cloud, field_names)

    monkeypatch.setattr(clouds, "read_points", read_points)
    theirs = read_cloud(sent)
    assert asked == ([] if big_endian or padding else ["x", "y", "z", "rgb"])
    monkeypatch.setattr(clouds, "read_points", None)
    ours = read_cloud(sent)
    np.testing.assert_array_equal(ours.xyz, theirs.xyz)
    np.testing.assert_array_equal(ours.rgb, theirs.rgb)
    np.testing.assert_array_equal(
        ours.xyz, np.stack([points[axis].reshape(-1) for axis in "xyz"], 1).astype(np.float32)
    )


def test_separate_bytes_of_colour_and_intensity() -> None:
    data = struct.pack("<fffBBB", 0, 0, 0, 7, 8, 9)
    cloud = read_cloud(message([*XYZ, ("r", 12, UINT8), ("g", 13, UINT8), ("b", 14, UINT8)], data, 15))
    np.testing.assert_array_equal(cloud.rgb, [[7, 8, 9]])
    data = b"".join(struct.pack("<fffH", 0, 0, 0, value) for value in (0, 500, 1000))
    grey = read_cloud(message([*XYZ, ("intensity", 12, UINT16)], data, 14)).rgb
    # The 99th percentile of 0, 500, 1000 is 990.
    np.testing.assert_array_equal(grey, [[0] * 3, [129] * 3, [255] * 3])


@pytest.mark.parametrize("values", [[0.0, 0.0], [NAN, NAN], [-3.0, -1.0], [NAN, 5.0], [math.inf, 1.0]])
def test_strange_intensities_are_only_dark_or_bright(values: list[float]) -> None:
    data = b"".join(struct.pack("<ffff", 0, 0, 0, value) for value in values)
    grey = read_cloud(message([*XYZ, ("intensity", 12, FLOAT32)], data, 16)).rgb
    assert grey is not None and set(np.unique(grey)) <= {0, 255}


ONE = struct.pack("<fff", 1, 2, 3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"width": 0}, "empty: 0x1"),
        ({"width": 3000, "height": 3000}, f"9000000 points, more than {MAX_POINTS}"),
        ({"point_step": 0}, "point_step 0"),
        ({"point_step": 5000, "row_step": 5000}, "point_step 5000"),
        ({"row_step": 11}, "row_step 11 is too small for 1 points of 12"),
        ({"data": ONE[:-1]}, "11 bytes of data.* 12"),
        ({"height": 2}, "12 bytes of data.*2 rows are 24"),
        ({"fields": []}, "no field x, y, z; it has none"),
        ({"fields": [SimpleNamespace(name="x", offset=0, datatype=UINT8, count=1)]}, "no field y, z; it has .'x'"),
        (
            {"fields": [SimpleNamespace(name=n, offset=0, datatype=UINT8, count=1) for n in "xyz"]},
            "'x' has datatype 2",
        ),
        ({"fields": [SimpleNamespace(name=n, offset=0, datatype=99, count=1) for n in "xyz"]}, "datatype 99"),
        ({"fields": [SimpleNamespace(name=n, offset=9, datatype=7, count=1) for n in "xyz"]}, "'x' at offset 9"),
        ({"fields": [SimpleNamespace(name=n, offset=0, datatype=7, count=2) for n in "xyz"]}, "count 2"),
        ({"fields": [SimpleNamespace(name=n, offset=0, datatype=7, count=1) for n in "xxyz"]}, "two fields"),
    ],
)
def test_malformed_clouds_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        read_cloud(message(XYZ, ONE, 12, **changes))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_message_is_read_or_refused_with_words(data: st.DataObject) -> None:
    field = st.builds(
        SimpleNamespace,
        name=st.sampled_from(["x", "y", "z", "rgb", "rgba", "intensity", "r", "g", "b", "ring"]),
        offset=st.integers(0, 24),
        datatype=st.integers(0, 9),
        count=st.integers(0, 2),
    )
    xyz = [SimpleNamespace(name=n, offset=4 * i, datatype=7, count=1) for i, n in enumerate("xyz")]
    fields = data.draw(st.lists(field, max_size=6)) if data.draw(st.booleans()) else [*xyz, data.draw(field)]
    width, height, step = (data.draw(st.integers(0, 5)), data.draw(st.integers(0, 4)), data.draw(st.integers(0, 28)))
    row_step = width * step + data.draw(st.integers(-1, 3))
    size = max(0, row_step * height + data.draw(st.sampled_from([0, 0, 0, -1, 1])))
    msg = message(
        [], b"", 1, width=width, height=height, point_step=step, row_step=row_step, fields=fields,
        data=data.draw(st.binary(min_size=size, max_size=size)), is_bigendian=data.draw(st.booleans()),
    )  # fmt: skip
    try:
        cloud = read_cloud(msg)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clouds, "VIRTUAL_SIZE", 16)
            frames = virtual_frames(cloud, np.eye(4), 1)
            virtual_frames(cloud, np.eye(4), 1, is_map=True)
        organised_frame(cloud, None, np.eye(4), 1)
    except (ConversionError, FrameError):
        return
    assert frames and len(cloud.xyz) == width * height


# --- frames


def test_an_organised_cloud_is_a_frame_and_tells_its_camera() -> None:
    K = np.array([[60.0, 0, 20.5], [0, 55.0, 14.5], [0, 0, 1]])
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 3, (30, 40)).astype(np.float32)
    depth[5, 6] = NAN
    rgb = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    cloud = read_cloud(cloud_message(rgb, depth, K))
    for camera in (None, Camera(K, np.zeros(0), "plumb_bob", 40, 30)):
        frame = organised_frame(cloud, camera, np.eye(4), 5)
        np.testing.assert_array_equal(frame.rgb, rgb)
        np.testing.assert_array_equal(frame.depth, depth)
        np.testing.assert_allclose(frame.K, K, atol=1e-2)
        assert frame.stamp_ns == 5


def test_organised_clouds_that_are_no_image_are_named() -> None:
    K = np.array([[60.0, 0, 20], [0, 60.0, 15], [0, 0, 1]])
    rgb, depth = np.zeros((30, 40, 3), np.uint8), np.full((30, 40), 2, np.float32)
    cloud = read_cloud(cloud_message(rgb, depth, K))
    with pytest.raises(ConversionError, match="40x30.*60x80"):
        organised_frame(cloud, Camera(K, np.zeros(0), "", 60, 80), np.eye(4), 1)
    other = K * np.array([[2.0], [2.0], [1.0]])
    with pytest.raises(ConversionError, match="CameraInfo tells.*120"):
        organised_frame(cloud, Camera(other, np.zeros(0), "", 40, 30), np.eye(4), 1)
    body = Cloud(cloud.xyz[:, [2, 0, 1]] * np.float32([1, -1, -1]), cloud.rgb, 30, 40)
    with pytest.raises(ConversionError, match="optical frame"):
        organised_frame(body, None, np.eye(4), 1)
    with pytest.raises(ConversionError, match="1200x1 points is not organised"):
        organised_frame(Cloud(cloud.xyz, cloud.rgb, 1, 1200), None, np.eye(4), 1)
    with pytest.raises(ConversionError, match="no colour"):
        organised_frame(Cloud(cloud.xyz, None, 30, 40), None, np.eye(4), 1)
    with pytest.raises(ConversionError, match="0 measured points"):
        organised_frame(Cloud(np.full_like(cloud.xyz, NAN), cloud.rgb, 30, 40), None, np.eye(4), 1)


def test_few_points_give_an_image_its_depth_in_squares() -> None:
    # A body frame, x forward: the point 2 m ahead is at the principal point; the one behind it is hidden.
    T = np.eye(4)
    T[:3, :3] = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])
    K = np.array([[10.0, 0, 10], [0, 10.0, 10], [0, 0, 1]])
    cloud = Cloud(np.array([[2, 0, 0], [4, 0, 0], [-1, 0, 0], [NAN, 0, 0]], np.float32), None, 1, 4)
    depth = cloud_depth(cloud, K, T, 21, 21)
    assert depth[10, 10] == 2.0 and np.nanmax(depth) == 2.0
    assert np.isfinite(depth).sum() == 17**2, "one visible point in 441 pixels: the largest square"


def test_a_coloured_room_is_drawn_into_the_pictures_that_show_something() -> None:
    """A red wall 2 m ahead (+x) of the sensor and a green one 1 m to its left (+y), in a map far away."""
    y, z = (a.reshape(-1) for a in np.meshgrid(np.linspace(-2, 2, 150), np.linspace(-2, 2, 150)))
    ahead = np.stack([np.full_like(y, 2.0), y, z], axis=1)
    left = np.stack([y, np.full_like(y, 1.0), z], axis=1)[np.abs(y) < 0.9]
    xyz = np.concatenate([ahead, left]).astype(np.float32)
    rgb = np.zeros((len(xyz), 3), np.uint8)
    rgb[: len(ahead), 0], rgb[len(ahead) :, 1] = 255, 255
    T = np.eye(4)
    T[:3, 3] = (50.0, -20.0, 1.0)
    frames = virtual_frames(Cloud(xyz, rgb, 1, len(xyz)), T, 100)
    assert [frame.stamp_ns for frame in frames] == [100, 101]
    red, green = sorted(frames, key=lambda frame: frame.rgb[168, 168].tolist(), reverse=True)
    assert red.rgb[168, 168].tolist() == [255, 0, 0] and green.rgb[168, 168].tolist() == [0, 255, 0]
    np.testing.assert_allclose(red.depth[168, 168], 2.0, rtol=1e-6)
    np.testing.assert_allclose(red.T_world_camera[:3, 3], T[:3, 3])
    # The picture of the wall ahead is full and upright: what is to the left of the sensor is on its left.
    assert np.isfinite(red.depth).mean() > 0.95
    np.testing.assert_allclose(red.T_world_camera[:3, 0], (0, -1, 0), atol=1e-12)


def test_what_a_camera_sees_of_a_large_cloud_is_told_by_a_sample() -> None:
    """As many points as a lidar gives, one ring after the other in each column: regular steps would miss the rings."""
    ring, column = np.meshgrid(np.radians(np.linspace(-15, 15, 64)), np.linspace(0, 2 * np.pi, 1600), indexing="xy")
    flat = np.stack([np.cos(column), np.sin(column), np.tan(ring)], -1).reshape(-1, 3).astype(np.float32)
    ahead = flat[flat[:, 0] > 0.8]
    for xyz, cameras in ((flat, 4), (ahead, 1), (np.vstack([np.full_like(flat, NAN), ahead]), 1)):
        cloud = Cloud(xyz, np.full_like(xyz, 9, dtype=np.uint8), 1, len(xyz))
        poses = virtual_cameras(cloud, np.eye(4))
        assert len(poses) == cameras
    # The camera that is left sees what is ahead: +x.
    np.testing.assert_allclose(poses[0][:3, 2], (1, 0, 0), atol=1e-12)


def test_cameras_stand_around_a_map_and_look_inwards() -> None:
    rng = np.random.default_rng(1)
    xyz = rng.uniform((0, 0, 0), (8, 4, 3), (20_000, 3)).astype(np.float32)
    frames = virtual_frames(Cloud(xyz, np.full_like(xyz, 9, dtype=np.uint8), 1, len(xyz)), np.eye(4), 1, is_map=True)
    assert len(frames) == 4
    for frame in frames:
        ahead = np.array([4, 2, 1.65]) - frame.T_world_camera[:3, 3]
        assert ahead @ frame.T_world_camera[:3, 2] == pytest.approx(np.linalg.norm(ahead), abs=0.1)


def test_clouds_without_anything_to_show_are_named() -> None:
    with pytest.raises(ConversionError, match="none of the cloud's 2 points is finite"):
        virtual_frames(Cloud(np.full((2, 3), NAN, np.float32), np.zeros((2, 3), np.uint8), 1, 2), np.eye(4), 1)
    with pytest.raises(ConversionError, match="no colour"):
        virtual_frames(Cloud(np.zeros((2, 3), np.float32), None, 1, 2), np.eye(4), 1)
