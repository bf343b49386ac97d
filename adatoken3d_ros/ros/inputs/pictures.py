# SPDX-License-Identifier: Apache-2.0
"""Messages that belong together become a frame: checked first, converted only if somebody needs it. No ROS import."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.inputs.clouds import cloud_depth, draw_cloud, organised_frame, read_cloud, virtual_cameras
from adatoken3d_ros.ros.inputs.compressed import colour_shape, decode_depth, decode_rgb, depth_shape
from adatoken3d_ros.ros.inputs.conversions import (
    Camera,
    ConversionError,
    camera_info_to_camera,
    check_size,
    rectify_depth,
    rectify_rgb,
)
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.registration import register_depth, resample_depth, scaled_intrinsics
from adatoken3d_ros.text import quoted

RGB = "rgb/image"
DEPTH = "depth/image"
RGB_INFO = "rgb/camera_info"
DEPTH_INFO = "depth/camera_info"
POINTS = "points"

# What frames are made of (parameter input.source) -> the streams that must come, and what they become.
RGBD = "rgbd"
ORGANISED_POINTS = "organised_points"
POINTS_WITH_CAMERA = "points_with_camera"
COLOURED_POINTS = "points"
STREAMS: dict[str, tuple[str, ...]] = {
    RGBD: (RGB, DEPTH),
    ORGANISED_POINTS: (POINTS,),
    POINTS_WITH_CAMERA: (RGB, POINTS),
    COLOURED_POINTS: (POINTS,),
}

# Pixels by which the depth camera's matrix may differ from the colour camera's and still be the same camera's.
REGISTERED_PIXELS = 1.0
# Share by which the sides of a smaller depth image may be scaled differently (rounded sizes) without a CameraInfo.
SAME_SHAPE = 0.02


@dataclass(frozen=True, eq=False)
class Pair:
    """A colour message and one with geometry, an image or a cloud, and their stamps in nanoseconds.

    A cloud that brings its own colour is both.
    """

    rgb_ns: int
    depth_ns: int
    rgb: Any
    depth: Any


@dataclass(frozen=True, eq=False)
class Picture:
    """A frame that is not converted yet; when and where it was taken is known.

    Attributes:
        stamp_ns: of the frame, nanoseconds.
        T_world_camera: (4, 4) of the frame.
        draw: converts it; raises ConversionError or FrameError, which name the value that is wrong.
    """

    stamp_ns: int
    T_world_camera: NDArray[np.float64]
    draw: Callable[[], PosedFrame]

    def view(self) -> tuple[int, NDArray[np.float64]]:
        """Stamp and pose: enough to tell most frames that nobody needs."""
        return self.stamp_ns, self.T_world_camera


@dataclass(frozen=True, eq=False)
class LazyFrame:
    """A pair with its calibration and pose. Converting the messages is work for another thread.

    Attributes:
        source: one of STREAMS.
        info, depth_info: CameraInfo of both images, None where there is none.
        T_world_camera: (4, 4) pose of the camera of the picture, or of the cloud that is alone.
        T_camera_depth: (4, 4) from the frame of the depth image or cloud to the colour camera's; None: the same frame.
        is_map: the cloud is in the scene frame, so that there is no place from which it was taken.
        depth_info_name: where depth's CameraInfo is expected, for people.
    """

    source: str
    pair: Pair
    info: Any | None
    depth_info: Any | None
    T_world_camera: NDArray[np.float64]
    T_camera_depth: NDArray[np.float64] | None
    rectified: bool
    is_map: bool = False
    depth_info_name: str = DEPTH_INFO

    @property
    def stamp_ns(self) -> int:
        """The depth's stamp: the geometry is what the pose is applied to."""
        return self.pair.depth_ns

    def pictures(self) -> list[Picture]:
        """At least one; more than one only of a coloured cloud alone, with stamps one nanosecond apart.

        Raises:
            ConversionError: for what can be told to be wrong without decoding a picture; `Picture.draw` says the rest.
        """
        T = self.T_world_camera
        if self.source != COLOURED_POINTS:
            self._check()
            return [Picture(self.stamp_ns, T, self._frame)]
        cloud = read_cloud(self.pair.depth)
        cameras = enumerate(virtual_cameras(cloud, T, is_map=self.is_map), self.stamp_ns)
        return [Picture(stamp, camera, partial(draw_cloud, cloud, T, camera, stamp)) for stamp, camera in cameras]

    def frames(self) -> list[PosedFrame]:
        """All pictures, converted. Raises ConversionError and FrameError, which name the value that is wrong."""
        return [picture.draw() for picture in self.pictures()]

    def _frame(self) -> PosedFrame:
        if self.source == ORGANISED_POINTS:
            camera = None if self.info is None else self._camera(self.info)
            return organised_frame(read_cloud(self.pair.depth), camera, self.T_world_camera, self.stamp_ns)
        camera = self._camera(self.info)
        rgb = decode_rgb(self.pair.rgb)
        check_size("colour", rgb.shape, camera)
        depth = self._depth_of_cloud(camera) if self.source == POINTS_WITH_CAMERA else self._depth_of_image(camera)
        return PosedFrame(rectify_rgb(rgb, camera), depth, camera.K, self.T_world_camera, self.stamp_ns)

    def _check(self) -> None:
        """Calibration, sizes, encodings and the lengths of data; a frame that nobody needs is not looked at closer."""
        if self.source != RGBD:
            read_cloud(self.pair.depth)
        camera = None if self.info is None else self._camera(self.info)
        if self.source == ORGANISED_POINTS or camera is None:
            return
        check_size("colour", colour_shape(self.pair.rgb), camera)
        if self.source == RGBD:
            self._depth_camera(camera, depth_shape(self.pair.depth))

    def _camera(self, info: Any) -> Camera:
        return camera_info_to_camera(info, rectified=self.rectified)

    def _frames_differ(self, advice: str) -> ConversionError:
        frames = self.pair.depth.header.frame_id, self.pair.rgb.header.frame_id
        return ConversionError(f"depth is in frame {quoted(frames[0])}, colour in {quoted(frames[1])}: {advice}")

    def _same_frame(self) -> bool:
        frames = self.pair.rgb.header.frame_id, self.pair.depth.header.frame_id
        return not all(frames) or frames[0] == frames[1]

    def _depth_of_cloud(self, camera: Camera) -> NDArray[np.float32]:
        T = self.T_camera_depth
        if T is None:
            if not self._same_frame():
                raise self._frames_differ("set pose.depth_to_rgb, or pose.source to 'tf'")
            T = np.eye(4)
        return cloud_depth(read_cloud(self.pair.depth), camera.K, T, camera.width, camera.height)

    def _depth_camera(self, camera: Camera, shape: tuple[int, ...]) -> Camera:
        """The camera of a depth image (H, W) beside the colour image of `camera`."""
        if self.T_camera_depth is None and not self._same_frame():
            raise self._frames_differ("depth must be registered; set pose.depth_to_rgb, or pose.source to 'tf'")
        if self.depth_info is not None:
            own = self._camera(self.depth_info)
            check_size("depth", shape, own)
            return own
        if self.T_camera_depth is not None:
            raise self._frames_differ(f"to register it, its CameraInfo is needed on {self.depth_info_name}")
        return _resized(camera, shape, self.depth_info_name)

    def _depth_of_image(self, camera: Camera) -> NDArray[np.float32]:
        """Registered depth as it is, other depth registered, both without distortion."""
        depth = decode_depth(self.pair.depth)
        T = self.T_camera_depth
        own = self._depth_camera(camera, depth.shape)
        if T is None and _same_camera(camera, own):
            # One matrix, but each image's own distortion: depth may be rectified where colour is not.
            return rectify_depth(depth, replace(camera, D=own.D, model=own.model))
        depth = rectify_depth(depth, own)
        if T is None:
            return resample_depth(depth, own.K, camera.K, camera.width, camera.height)
        return register_depth(depth, own.K, camera.K, T, camera.width, camera.height)


def _same_camera(a: Camera, b: Camera) -> bool:
    """Whether two cameras are one to a pixel, as they are for registered depth."""
    return (a.width, a.height) == (b.width, b.height) and float(np.abs(a.K - b.K).max()) <= REGISTERED_PIXELS


def _resized(camera: Camera, shape: tuple[int, ...], info_name: str) -> Camera:
    """The camera of an image (H, W) of the same view in another size. Raises ConversionError for another shape."""
    height, width = shape
    scale = width / camera.width, height / camera.height
    if abs(scale[0] / scale[1] - 1) > SAME_SHAPE:
        raise ConversionError(
            f"the depth image is {width}x{height} but the colour image is {camera.width}x{camera.height}: depth must "
            f"be registered to colour, or its CameraInfo come on {info_name}"
        )
    return replace(camera, K=scaled_intrinsics(camera.K, *scale), width=width, height=height)
