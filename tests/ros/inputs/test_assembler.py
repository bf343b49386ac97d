# SPDX-License-Identifier: Apache-2.0
"""Frames: pairs with calibration and pose, from images and clouds, and that none is lost without being counted."""

from __future__ import annotations

import array
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ros_messages import MS, at, cloud_message, image, info, pose_message

from adatoken3d_ros.ros.inputs.conversions import ConversionError
from adatoken3d_ros.ros.inputs.pairing import Assembler
from adatoken3d_ros.ros.inputs.pictures import DEPTH, DEPTH_INFO, RGB, RGB_INFO
from adatoken3d_ros.ros.inputs.poses import BufferedPose, StaticPose


def stamped(message: Any, frame: str = "camera") -> Any:
    message.header = SimpleNamespace(frame_id=frame)
    return message


def colour() -> Any:
    return stamped(image("rgb8", 2, 1, 6, bytes(6)))


def depth() -> Any:
    return stamped(image("16UC1", 2, 1, 4, np.array([1000, 0], "<u2").tobytes()))


def small_info(**changes: Any) -> Any:
    return info(**{"width": 2, "height": 1, **changes})


def feed(assembler: Assembler, stamp: int) -> list[Any]:
    assembler.add(RGB, stamp, colour())
    return assembler.add(DEPTH, stamp, depth())


def test_a_frame_has_the_stamp_the_metres_and_the_pose() -> None:
    assembler = Assembler(StaticPose(at(3.0)))
    assembler.add_info(RGB_INFO, small_info())
    (lazy,) = feed(assembler, 7)
    (frame,) = lazy.frames()
    assert frame.stamp_ns == lazy.stamp_ns == 7
    np.testing.assert_array_equal(frame.depth, np.array([[1.0, np.nan]], np.float32))
    assert frame.T_world_camera[0, 3] == 3.0
    assert frame.K[0, 0] == 500.0


def test_a_frame_waits_for_its_pose() -> None:
    poses = BufferedPose("map")
    assembler = Assembler(poses, timeout_ns=100 * MS)
    assembler.add_info(RGB_INFO, small_info())
    assert feed(assembler, 10 * MS) == []
    assert assembler.waiting == 1 and "no pose" in assembler.why_waiting()
    poses.add(pose_message(10 * MS, at(1.0)))
    (frame,) = assembler.poll()
    assert frame.stamp_ns == 10 * MS
    assert assembler.why_waiting() == ""


def test_a_frame_waits_for_the_calibration() -> None:
    assembler = Assembler(StaticPose(at(0.0)))
    assert feed(assembler, 10) == []
    assert RGB_INFO in assembler.why_waiting()
    assembler.add_info(RGB_INFO, small_info())
    assert len(assembler.poll()) == 1


def test_what_stays_without_a_pose_is_dropped_with_the_reason() -> None:
    reasons: list[tuple[str, str]] = []
    assembler = Assembler(BufferedPose("map"), timeout_ns=100 * MS, on_drop=lambda *why: reasons.append(why))
    assembler.add_info(RGB_INFO, small_info())
    for i in range(1, 4):
        feed(assembler, i * 60 * MS)
    assert assembler.dropped == {"no_pose": 1}
    assert reasons == [("no_pose", "no pose has been received")]
    assembler.stop()
    assert assembler.dropped == {"no_pose": 1, "stopped": 2}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("cdpi"), st.integers(1, 30)), max_size=60), st.integers(0, 200))
def test_every_pair_is_accounted_for(events: list[tuple[str, int]], timeout_ms: int) -> None:
    poses = BufferedPose("map")
    assembler = Assembler(poses, slop_ns=5 * MS, timeout_ns=timeout_ms * MS, capacity=4)
    frames = []
    for kind, tens in events:
        stamp = tens * 10 * MS
        if kind == "p":
            poses.add(pose_message(stamp, at(0.0)))
            frames += assembler.poll()
        elif kind == "i":
            assembler.add_info(RGB_INFO, small_info())
        else:
            frames += assembler.add(RGB if kind == "c" else DEPTH, stamp, colour() if kind == "c" else depth())
        assert assembler.matched == assembler.ready + sum(assembler.dropped.values()) + assembler.waiting
        assert assembler.waiting <= 4
    assert len(frames) == assembler.ready


def spoiled(**messages: Any) -> Any:
    assembler = Assembler(StaticPose(at(0.0)))
    assembler.add_info(RGB_INFO, messages.get("info", small_info()))
    if "depth_info" in messages:
        assembler.add_info(DEPTH_INFO, messages["depth_info"])
    assembler.add(RGB, 1, messages.get("rgb", colour()))
    (frame,) = assembler.add(DEPTH, 1, messages.get("depth", depth()))
    return frame


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ({"info": small_info(k=[0.0] * 9)}, "not calibrated"),
        ({"info": small_info(width=4)}, "2x1 but its CameraInfo describes 4x1"),
        ({"rgb": stamped(image("strange", 2, 1, 6, bytes(6)))}, "'strange'"),
        ({"depth": stamped(image("16UC1", 1, 1, 2, bytes(2)))}, "1x1 but the colour image is 2x1"),
        ({"depth": stamped(depth(), "depth_frame")}, "'depth_frame'.*'camera'"),
        ({"depth_info": small_info(k=[0.0] * 9)}, "not calibrated"),
        ({"depth_info": small_info(width=1)}, "depth image is 2x1 but its CameraInfo describes 1x1"),
    ],
)
def test_frames_that_cannot_be_used_name_the_value(messages: dict[str, Any], named: str) -> None:
    with pytest.raises(ConversionError, match=named):
        spoiled(**messages).frames()


@pytest.mark.parametrize("kind", [".jpg", ".png"])
@pytest.mark.parametrize("depth_format", ["16UC1; compressedDepth png", "32FC1; compressedDepth png", "16UC1; png"])
def test_a_compressed_pair_is_the_frame_that_was_compressed(kind: str, depth_format: str) -> None:
    """Red, green and blue stripes, depth that grows from left to right, a row without; through the whole way."""
    rgb = np.repeat(np.array([[(200, 0, 0), (0, 200, 0), (0, 0, 200)]], np.uint8), 16, 1).repeat(16, 0)
    metres = np.tile(np.linspace(1.0, 4.0, 48, dtype=np.float32), (16, 1))
    metres[3] = np.nan
    values, prefix = np.nan_to_num(metres * 1000).round().astype(np.uint16), b""
    if depth_format.startswith("32FC1"):
        # Quantised inverse depth: value = a / metres + b.
        values = np.nan_to_num(20_000 / metres + 7).round().astype(np.uint16)
        prefix = bytes(4) + np.array([20_000.0, 7.0], "<f4").tobytes()
    elif "compressedDepth" in depth_format:
        prefix = bytes(12)
    pictures = cv2.imencode(kind, rgb[..., ::-1])[1].tobytes(), prefix + cv2.imencode(".png", values)[1].tobytes()
    formats = f"rgb8; {kind[1:]} compressed bgr8", depth_format
    both = [SimpleNamespace(format=f, data=array.array("B", data)) for f, data in zip(formats, pictures, strict=True)]
    infos = {name: info(width=48, height=16) for name in ("rgb", "depth")}
    frame = frame_of(Assembler(StaticPose(at(3.0))), *(stamped(message) for message in both), **infos)
    assert (frame.stamp_ns, frame.T_world_camera[0, 3], frame.K[0, 0]) == (10 * MS, 3.0, 500.0)
    # Away from the stripes' edges, where jpeg mixes colours.
    centres = np.abs(frame.rgb[:, 8::16].astype(int) - rgb[:, 8::16])
    assert frame.rgb.shape == rgb.shape and centres.max() <= (3 if kind == ".jpg" else 0)
    np.testing.assert_allclose(frame.depth, metres, atol=6e-4)
    assert np.isnan(frame.depth[3]).all() and frame.depth.dtype == np.float32
    with pytest.raises(ConversionError, match="the colour image is 48x16 but its CameraInfo describes 48x15"):
        frame_of(Assembler(StaticPose(at(3.0))), *both, rgb=info(width=48, height=15))


# --- depth that is not registered, and clouds


def millimetres(values: list[list[int]], frame: str = "camera") -> Any:
    pixels = np.array(values, "<u2")
    return stamped(image("16UC1", pixels.shape[1], pixels.shape[0], 2 * pixels.shape[1], pixels.tobytes()), frame)


def grey(width: int, height: int, frame: str = "camera") -> Any:
    return stamped(image("mono8", width, height, width, bytes(width * height)), frame)


def camera_info(width: int, height: int, fx: float, cx: float = 0.0) -> Any:
    return info(width=width, height=height, k=[fx, 0, cx, 0, fx, 0, 0, 0, 1])


def frame_of(assembler: Assembler, first: Any, second: Any, **infos: Any) -> Any:
    for stream, message in infos.items():
        assembler.add_info({"rgb": RGB_INFO, "depth": DEPTH_INFO}[stream], message)
    streams = assembler.pairer.streams
    assembler.add(streams[0], 10 * MS, first)
    (lazy,) = assembler.add(streams[1], 10 * MS, second)
    (frame,) = lazy.frames()
    return frame


class Frames:
    """Poses by frame, as TF gives them: the depth camera is 0.5 m to the right of the colour camera."""

    scene_frame = "map"
    by_frame = True

    def lookup(self, stamp_ns: int, camera_frame: str, *, final: bool = False) -> np.ndarray:
        return at({"colour": 1.0, "depth": 1.5}[camera_frame])

    def reset(self, stamp_ns: int) -> None:
        pass


NAN = float("nan")


def test_depth_half_the_size_is_looked_up_with_and_without_its_calibration() -> None:
    wanted = np.array([[1, 1, 2, 2], [1, 1, 2, 2]], np.float32)
    small = millimetres([[1000, 2000]])
    for infos in ({}, {"depth": info(width=2, height=1, k=[2, 0, 0.25, 0, 2, -0.25, 0, 0, 1])}):
        frame = frame_of(Assembler(StaticPose(at(0.0))), grey(4, 2), small, rgb=camera_info(4, 2, 4.0, 1.0), **infos)
        np.testing.assert_array_equal(frame.depth, wanted)
        assert frame.K[0, 0] == 4.0


@pytest.mark.parametrize("how", ["tf", "parameter"])
def test_depth_of_another_camera_is_registered(how: str) -> None:
    """Focal length 4, 0.5 m apart: 1 m away moves by two pixels, 2 m by one."""
    given = how == "parameter"
    assembler = Assembler(StaticPose(at(1.0)) if given else Frames(), T_camera_depth=at(0.5) if given else None)
    infos = {"rgb": camera_info(5, 1, 4.0), "depth": camera_info(5, 1, 4.0)}
    frame = frame_of(assembler, grey(5, 1, "colour"), millimetres([[2000, 0, 1000, 0, 0]], "depth"), **infos)
    np.testing.assert_array_equal(frame.depth, np.array([[NAN, 2, NAN, NAN, 1]], np.float32))
    np.testing.assert_array_equal(frame.T_world_camera, at(1.0), "the pose is the colour camera's")


def test_depth_of_another_camera_waits_for_its_calibration() -> None:
    assembler = Assembler(Frames())
    assembler.add_info(RGB_INFO, camera_info(5, 1, 4.0))
    assembler.add(RGB, 10, grey(5, 1, "colour"))
    assert assembler.add(DEPTH, 10, millimetres([[0] * 5], "depth")) == []
    assert DEPTH_INFO in assembler.why_waiting()
    assembler.add_info(DEPTH_INFO, camera_info(5, 1, 4.0))
    assert len(assembler.poll()) == 1


def test_distortion_is_taken_out_of_what_a_binned_region_of_the_sensor_shows() -> None:
    """A small bright near square, seen through a lens, where it would be seen through a pinhole."""
    lens = info(
        d=[0.2, -0.1, 0.0, 0.0, 0.0],
        binning_x=2,
        binning_y=2,
        roi=SimpleNamespace(x_offset=300, y_offset=200, width=320, height=240),
    )
    ray, r2 = np.array([0.4, 0.3]), 0.25
    bent = ray * (1 + 0.2 * r2 - 0.1 * r2 * r2)

    def pixel(at: np.ndarray) -> np.ndarray:
        """In the image that is sent: the sensor's pixel, in the region, two by two."""
        return ((at * (500, 510) + (320, 240) - (300, 200)) / 2).round().astype(int)

    (u, v), (x, y) = pixel(bent), pixel(ray)
    assert (abs(u - x), abs(v - y)) > (2, 2), "or this test would see nothing"
    rgb, mm = np.zeros((120, 160, 3), np.uint8), np.full((120, 160), 3000, "<u2")
    rgb[v - 1 : v + 2, u - 1 : u + 2], mm[v - 1 : v + 2, u - 1 : u + 2] = 255, 1000
    colour = stamped(image("rgb8", 160, 120, 480, rgb.tobytes()))
    geometry = stamped(image("16UC1", 160, 120, 320, mm.tobytes()))
    for infos in ({"rgb": lens}, {"rgb": lens, "depth": lens}):
        frame = frame_of(Assembler(StaticPose(at(0.0))), colour, geometry, **infos)
        assert frame.rgb[y, x, 0] > 128 and frame.depth[y, x] == 1.0
        assert frame.depth[60, 80] == 3.0 and frame.K[0].tolist() == [250.0, 0.0, 10.0]
    # Rectified already: nothing is moved, and the matrix is P's.
    frame = frame_of(Assembler(StaticPose(at(0.0)), rectified=True), colour, geometry, rgb=lens)
    assert np.array_equal(frame.rgb, rgb) and frame.depth[v, u] == 1.0 and frame.K[0].tolist() == [200.0, 0.0, 5.0]


@pytest.mark.parametrize("bent", ["colour", "depth"])
def test_each_image_is_rectified_by_its_own_calibration(bent: str) -> None:
    """Registered depth with D = 0 beside distorted colour is rectified already, and the other way round."""
    lens, flat = info(d=[0.2, -0.1, 0.0, 0.0, 0.0]), info()
    ray = np.array([0.4, 0.3])
    x, y = (ray * (500, 510) + (320, 240)).round().astype(int)
    u, v = (ray * (1 + 0.2 * 0.25 - 0.1 * 0.25**2) * (500, 510) + (320, 240)).round().astype(int)
    colour_at, depth_at = ((u, v), (x, y)) if bent == "colour" else ((x, y), (u, v))
    rgb, mm = np.zeros((480, 640, 3), np.uint8), np.full((480, 640), 3000, "<u2")
    rgb[colour_at[1] - 1 : colour_at[1] + 2, colour_at[0] - 1 : colour_at[0] + 2] = 255
    mm[depth_at[1] - 1 : depth_at[1] + 2, depth_at[0] - 1 : depth_at[0] + 2] = 1000
    frame = frame_of(
        Assembler(StaticPose(at(0.0))),
        stamped(image("rgb8", 640, 480, 1920, rgb.tobytes())),
        stamped(image("16UC1", 640, 480, 1280, mm.tobytes())),
        rgb=lens if bent == "colour" else flat,
        depth=flat if bent == "colour" else lens,
    )
    assert frame.rgb[y, x, 0] > 128 and frame.depth[y, x] == 1.0 and frame.depth[v, u] == 3.0


def test_what_nobody_needs_is_checked_but_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = spoiled()
    for name in ("decode_rgb", "decode_depth"):
        monkeypatch.setattr(f"adatoken3d_ros.ros.inputs.pictures.{name}", lambda message: pytest.fail("converted"))
    (picture,) = frame.pictures()
    stamp, T = picture.view()
    assert stamp == 1 and np.array_equal(T, at(0.0))
    for messages in (
        {"info": small_info(width=4)},
        {"rgb": stamped(image("strange", 2, 1, 6, bytes(6)))},
        {"depth": stamped(image("16UC1", 1, 1, 2, bytes(2)))},
        {"depth": stamped(image("16UC1", 2, 1, 4, bytes(3)))},
    ):
        with pytest.raises(ConversionError):
            spoiled(**messages).pictures()


def square_cloud(frame: str) -> Any:
    rgb, metres = np.full((4, 4, 3), 200, np.uint8), np.full((4, 4), 2, np.float32)
    return stamped(cloud_message(rgb, metres, np.array([[4.0, 0, 1.5], [0, 4.0, 1.5], [0, 0, 1]])), frame)


def test_an_organised_cloud_needs_no_partner_and_no_calibration() -> None:
    assembler = Assembler(StaticPose(at(3.0)), source="organised_points")
    (lazy,) = assembler.add("points", 5, square_cloud("camera"))
    (frame,) = lazy.frames()
    assert frame.depth.shape == (4, 4) and frame.T_world_camera[0, 3] == 3.0 and frame.stamp_ns == 5
    assert frame.K[0, 0] == pytest.approx(4.0)
    assert assembler.add("points", 5, square_cloud("camera")) == []
    assert assembler.pairer.counts["points"].dropped == {"duplicate_stamp": 1}


def test_a_cloud_gives_an_image_its_depth_through_the_frames() -> None:
    infos = {"rgb": info(width=4, height=4, k=[4, 0, 1.5, 0, 4, 1.5, 0, 0, 1])}
    assembler = Assembler(Frames(), source="points_with_camera")
    frame = frame_of(assembler, grey(4, 4, "colour"), square_cloud("depth"), **infos)
    # 0.5 m at 2 m with focal length 4 is one pixel to the right; column 0 is beyond the cloud's edge.
    np.testing.assert_array_equal(frame.depth, np.array([[NAN, 2, 2, 2]] * 4, np.float32))
    unknown = Assembler(StaticPose(at(1.0)), source="points_with_camera")
    with pytest.raises(ConversionError, match="'depth'.*'colour'.*pose.depth_to_rgb"):
        frame_of(unknown, grey(4, 4, "colour"), square_cloud("depth"), **infos)


def test_a_coloured_cloud_alone_gives_pictures_with_stamps_of_their_own() -> None:
    assembler = Assembler(StaticPose(at(1.0), "map"), source="points")
    (lazy,) = assembler.add("points", 5, square_cloud("lidar"))
    frames = lazy.frames()
    assert [frame.stamp_ns for frame in frames] == list(range(5, 5 + len(frames)))
    (lazy,) = assembler.add("points", 500, square_cloud("map"))
    assert lazy.is_map and np.array_equal(lazy.T_world_camera, np.eye(4)), "it is where it says"


def test_time_that_jumps_back_is_told_before_any_frame_of_it() -> None:
    events: list[str] = []
    assembler = Assembler(StaticPose(at(0.0)), source="organised_points", on_time_jump=lambda: events.append("jump"))
    for stamp in (50_000 * MS, 51_000 * MS, 1_000 * MS):
        events += [str(frame.stamp_ns // MS) for frame in assembler.add("points", stamp, square_cloud("camera"))]
    assert events == ["50000", "51000", "jump", "1000"]
