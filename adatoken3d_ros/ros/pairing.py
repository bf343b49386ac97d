# SPDX-License-Identifier: Apache-2.0
"""Colour, depth or clouds, calibration and pose become frames. Pure bookkeeping, for live topics and for a bag.

Every message is accounted for. A stream's messages are paired, dropped for a reason, or still pending; pairs become
frames, are dropped for a reason, or still wait for their pose.
"""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.clouds import cloud_depth, draw_cloud, organised_frame, read_cloud, virtual_cameras
from adatoken3d_ros.ros.conversions import (
    Camera,
    ConversionError,
    camera_info_to_camera,
    check_size,
    colour_shape,
    decode_depth,
    decode_rgb,
    depth_shape,
    rectify_depth,
    rectify_rgb,
)
from adatoken3d_ros.ros.poses import JUMP_BACK_NS, PoseError, PoseSource, PoseUnavailable
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.registration import register_depth, resample_depth, scaled_intrinsics

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

# How far ahead of the clock a stamp may be: clocks differ, wild stamps are refused.
FUTURE_NS = 10_000_000_000
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


def bad_stamp(stamp_ns: int, clock_ns: float) -> tuple[str, str] | None:
    """(reason, text with the stamp) of a stamp that cannot be used, else None; `clock_ns` is now or infinite."""
    text = f"the stamp {stamp_ns / 1e9:.6f} s"
    if stamp_ns <= 0:
        return "no_stamp", f"{text} is not set"
    ahead = stamp_ns - clock_ns - FUTURE_NS
    return ("future_stamp", f"{text} is {ahead / 1e9:.3f} s later than may be believed") if ahead > 0 else None


@dataclass
class StreamCounts:
    """What became of one stream's messages: received == paired + sum(dropped) + pending."""

    received: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Pairer:
    """Pairs two streams by stamp; newest wins, and no stamp is used twice.

    Of one stream alone each message is paired with itself. Of two, a message takes the nearest partner within the slop
    as soon as there is one; all that is older than a pair is dropped as `unmatched`. Other reasons: `duplicate_stamp`,
    `out_of_order`, `no_stamp`, `future_stamp`, `time_jump`, `stopped`.

    Args:
        slop_ns: largest difference of the stamps, nanoseconds; 0 pairs equal stamps only.
        capacity: messages of a stream that may wait for a partner.
        streams: names of one or two streams, colour first.
        clock_ns: time now, infinite if nobody knows it, asked for with each message. A stamp more than FUTURE_NS ahead
            of it is dropped as `future_stamp`, and so is one that leaps ahead of the clock and of its own stream by
            more than JUMP_BACK_NS, unless the one before it did so, too: one wild stamp would otherwise make all later
            ones look as if time had jumped back.
        name: what people call a stream: its topic on the graph.

    Attributes:
        refused: (reason, text with the stamp) of the last message if it was dropped by itself, else None.
    """

    def __init__(
        self,
        slop_ns: int = 0,
        capacity: int = 30,
        streams: tuple[str, ...] = (RGB, DEPTH),
        clock_ns: Callable[[], float] = lambda: math.inf,
        name: Callable[[str], str] = str,
    ) -> None:
        self.slop_ns = slop_ns
        self.capacity = capacity
        self.streams = streams
        self.counts = {stream: StreamCounts() for stream in streams}
        self.newest = dict.fromkeys(streams, 0)
        self.jumps = 0
        self.refused: tuple[str, str] | None = None
        self._clock_ns = clock_ns
        self._name = name
        self._ahead = dict.fromkeys(streams, -math.inf)  # of the clock, by the last stamp that was believed
        self._leapt = dict.fromkeys(streams, False)
        self._old = dict.fromkeys(streams, 0)  # newest stamp of a stream that has not jumped back yet as the other has
        self._pending: dict[str, list[tuple[int, Any]]] = {stream: [] for stream in streams}
        self._used = dict.fromkeys(streams, 0)

    def pending(self, stream: str) -> int:
        """Messages of a stream that wait for a partner."""
        return len(self._pending[stream])

    def add(self, stream: str, stamp_ns: int, message: Any) -> Pair | None:
        """Takes one message; returns the pair that it completes."""
        counts = self.counts[stream]
        counts.received += 1
        self.refused = None
        other = self.streams[0] if stream == self.streams[-1] else self.streams[-1]
        clock_ns = self._clock_ns()
        bad = bad_stamp(stamp_ns, clock_ns) or self._leap(stream, stamp_ns, stamp_ns - clock_ns)
        if bad is not None:
            self._refuse(stream, *bad)
            return None
        if self._is_old(stream, stamp_ns, self.newest[other]):
            self._refuse(
                stream,
                "time_jump",
                f"the stamp {stamp_ns / 1e9:.6f} s is of before {self._name(other)} has jumped back",
            )
            return None
        self._ahead[stream], self._old[stream] = stamp_ns - clock_ns, 0
        if stamp_ns < self.newest[stream] - JUMP_BACK_NS:
            self.jumps += 1
            old = self.newest[other] or self._old[other]
            self._forget("time_jump")
            self._old[other] = old if other != stream and old > stamp_ns + JUMP_BACK_NS else 0
        pending = self._pending[stream]
        if stamp_ns == self._used[stream] or any(waiting == stamp_ns for waiting, _ in pending):
            self._refuse(stream, "duplicate_stamp", f"the stamp {stamp_ns / 1e9:.6f} s has come before")
            return None
        if stamp_ns < self._used[stream]:
            late = f"is {(self._used[stream] - stamp_ns) / 1e9:.3f} s older than one that was used"
            self._refuse(stream, "out_of_order", f"the stamp {stamp_ns / 1e9:.6f} s {late}")
            return None
        self.newest[stream] = max(self.newest[stream], stamp_ns)
        insort(pending, (stamp_ns, message), key=lambda item: item[0])
        colour, geometry = self.streams[0], self.streams[-1]
        partner = min(self._pending[other], key=lambda item: abs(item[0] - stamp_ns), default=None)
        if partner is None or abs(partner[0] - stamp_ns) > self.slop_ns:
            if len(pending) > self.capacity:
                pending.pop(0)
                counts.dropped["unmatched"] += 1
            return None
        rgb, depth = ((stamp_ns, message), partner) if stream == colour else (partner, (stamp_ns, message))
        self._take(colour, rgb[0])
        if geometry != colour:
            self._take(geometry, depth[0])
        return Pair(rgb[0], depth[0], rgb[1], depth[1])

    def stop(self) -> None:
        """Drops what is pending, counted as `stopped`."""
        self._forget("stopped")

    def _leap(self, stream: str, stamp_ns: int, ahead: float) -> tuple[str, str] | None:
        """As `bad_stamp`, of a stamp that is not like its stream's; the second such one in a row is believed."""
        before, self._leapt[stream] = self._leapt[stream], False
        leap = ahead - max(0.0, self._ahead[stream])
        if not self.newest[stream] or stamp_ns <= self.newest[stream] + JUMP_BACK_NS or leap <= JUMP_BACK_NS or before:
            return None
        self._leapt[stream] = True
        why = f"is {ahead / 1e9:.3f} s ahead of the clock, and those before it were not"
        return "future_stamp", f"the stamp {stamp_ns / 1e9:.6f} s {why}"

    def _is_old(self, stream: str, stamp_ns: int, other_ns: int) -> bool:
        """Whether a message was under way while the other stream, now at `other_ns`, jumped back."""
        old = self._old[stream]
        return bool(old) and stamp_ns > other_ns + JUMP_BACK_NS and stamp_ns >= old - JUMP_BACK_NS

    def _refuse(self, stream: str, reason: str, text: str) -> None:
        self.counts[stream].dropped[reason] += 1
        self.refused = reason, f"{self._name(stream)}: {text}"

    def _take(self, stream: str, stamp_ns: int) -> None:
        older = [item for item in self._pending[stream] if item[0] < stamp_ns]
        self._pending[stream] = [item for item in self._pending[stream] if item[0] > stamp_ns]
        self._used[stream] = stamp_ns
        self.counts[stream].paired += 1
        if older:
            self.counts[stream].dropped["unmatched"] += len(older)

    def _forget(self, reason: str) -> None:
        for stream, pending in self._pending.items():
            if pending:
                self.counts[stream].dropped[reason] += len(pending)
            self._pending[stream] = []
            self._used[stream] = self.newest[stream] = 0


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
        colour = colour_shape(self.pair.rgb)
        if colour is not None:
            check_size("colour", colour, camera)
        depth = depth_shape(self.pair.depth) if self.source == RGBD else None
        if depth is not None:
            self._depth_camera(camera, depth)

    def _camera(self, info: Any) -> Camera:
        return camera_info_to_camera(info, rectified=self.rectified)

    def _frames_differ(self, advice: str) -> ConversionError:
        frames = self.pair.depth.header.frame_id, self.pair.rgb.header.frame_id
        return ConversionError(f"depth is in frame {frames[0]!r}, colour in {frames[1]!r}: {advice}")

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


class Assembler:
    """Turns messages into frames that only have to be converted; what is late waits, what cannot come is dropped.

    Pairs are counted: matched == ready + sum(dropped) + waiting. Reasons: `no_camera_info`, `no_pose`, `time_jump`,
    `stopped`. Waiting is measured in the stamps' own time, so that a bag gives the same frames at any speed.

    Args:
        poses: where the camera was.
        source: what frames are made of, one of STREAMS.
        slop_ns: see Pairer.
        timeout_ns: a pair waits for its pose and calibration until one this much newer has come, nanoseconds; 0: never.
        rectified: images are rectified already (use P of CameraInfo).
        T_camera_depth: (4, 4) from the frame of depth images or clouds to the colour camera's optical frame; None: by
            the frames' names, as far as the poses know frames.
        capacity: see Pairer; also the number of pairs that may wait for their pose.
        on_drop: told (reason, text with the offending value) of every pair that is dropped.
        on_refuse: told the same of every message that is dropped by itself for its stamp.
        on_time_jump: called when stamps have jumped back, before any frame of the new time.
        clock_ns, name: see Pairer.
    """

    def __init__(
        self,
        poses: PoseSource,
        *,
        source: str = RGBD,
        slop_ns: int = 0,
        timeout_ns: int = 500_000_000,
        rectified: bool = False,
        T_camera_depth: NDArray[np.float64] | None = None,
        capacity: int = 30,
        on_drop: Callable[[str, str], None] | None = None,
        on_refuse: Callable[[str, str], None] | None = None,
        on_time_jump: Callable[[], None] | None = None,
        clock_ns: Callable[[], float] = lambda: math.inf,
        name: Callable[[str], str] = str,
    ) -> None:
        self.poses = poses
        self.source = source
        self.pairer = Pairer(slop_ns, capacity, STREAMS[source], clock_ns, name)
        self._name = name
        self.timeout_ns = timeout_ns
        self.rectified = rectified
        self.capacity = capacity
        self.matched = 0
        self.ready = 0
        self.dropped: Counter[str] = Counter()
        self.infos: Counter[str] = Counter()
        self._T_camera_depth = T_camera_depth
        self._on_drop = on_drop
        self._on_refuse = on_refuse
        self._on_time_jump = on_time_jump
        self._info: dict[str, Any] = {}
        self._waiting: list[Pair] = []
        self._jumps = 0

    @property
    def waiting(self) -> int:
        """Pairs that wait for their pose or for a calibration."""
        return len(self._waiting)

    def add_info(self, stream: str, message: Any) -> None:
        """The newest calibration of a stream counts."""
        self.infos[stream] += 1
        self._info[stream] = message

    def add(self, stream: str, stamp_ns: int, message: Any) -> list[LazyFrame]:
        """Takes an image or a cloud; returns the frames that are now complete, oldest first."""
        pair = self.pairer.add(stream, stamp_ns, message)
        if self.pairer.refused is not None and self._on_refuse is not None:
            self._on_refuse(*self.pairer.refused)
        if self.pairer.jumps > self._jumps:
            self._jumps = self.pairer.jumps
            self.poses.reset(stamp_ns)
            self._drop_waiting("time_jump", "time went back")
            if self._on_time_jump is not None:
                self._on_time_jump()
        if pair is not None:
            self.matched += 1
            self._waiting.append(pair)
        return self.poll()

    def poll(self) -> list[LazyFrame]:
        """Looks again for what the waiting pairs lack; call it after a pose or a calibration has come."""
        frames, waiting = [], []
        newest = self._waiting[-1].depth_ns if self._waiting else 0
        for index, pair in enumerate(self._waiting):
            overdue = newest - pair.depth_ns >= self.timeout_ns or len(self._waiting) - index > self.capacity
            missing = self._missing_info(pair)
            if missing:
                if overdue:
                    self._drop("no_camera_info", missing)
                else:
                    waiting.append(pair)
                continue
            try:
                frame = self._frame(pair, overdue)
            except PoseUnavailable as error:
                if overdue:
                    self._drop("no_pose", str(error))
                else:
                    waiting.append(pair)
            except PoseError as error:
                self._drop("no_pose", str(error))
            else:
                self.ready += 1
                frames.append(frame)
        self._waiting = waiting
        return frames

    def counters(self) -> Counter[str]:
        """What became of messages and pairs until now, without those that still wait."""
        counters: Counter[str] = Counter({"pairs.matched": self.matched, "pairs.handed_over": self.ready})
        for name, counts in self.pairer.counts.items():
            counters[f"paired.{name}"] = counts.paired
            counters.update({f"dropped.{name}.{reason}": n for reason, n in counts.dropped.items()})
        counters.update({f"pairs.dropped.{reason}": n for reason, n in self.dropped.items()})
        return counters

    def why_waiting(self) -> str:
        """What the newest waiting pair lacks; empty if none waits."""
        if not self._waiting:
            return ""
        pair = self._waiting[-1]
        missing = self._missing_info(pair)
        if missing:
            return missing
        try:
            self._frame(pair, False)
        except PoseError as error:
            return str(error)
        return ""

    def stop(self) -> None:
        """Drops all that waits, counted as `stopped`."""
        self.pairer.stop()
        self._drop_waiting("stopped", "the inputs were stopped")

    def _missing_info(self, pair: Pair) -> str:
        """Which calibration the pair cannot do without, in words; empty if none is missing."""
        needed = []
        if RGB in self.pairer.streams:
            needed.append(RGB_INFO)
        if self.source == RGBD and self._moved(pair):
            needed.append(DEPTH_INFO)
        missing = [self._name(info) for info in needed if info not in self._info]
        return f"images have come, but no CameraInfo on {missing[0]}" if missing else ""

    def _moved(self, pair: Pair) -> bool:
        """Whether depth is in another frame than colour, and it is known how to find the way."""
        frames = str(pair.rgb.header.frame_id), str(pair.depth.header.frame_id)
        if pair.rgb is pair.depth or not all(frames) or frames[0] == frames[1]:
            return False
        return self._T_camera_depth is not None or self.poses.by_frame

    def _frame(self, pair: Pair, final: bool) -> LazyFrame:
        """Raises PoseError or PoseUnavailable."""
        depth_frame, rgb_frame = str(pair.depth.header.frame_id), str(pair.rgb.header.frame_id)
        T_camera_depth = None
        is_map = self.source == COLOURED_POINTS and bool(depth_frame) and depth_frame == self.poses.scene_frame
        if is_map:
            T = np.eye(4)
        elif not self._moved(pair):
            T = self.poses.lookup(pair.depth_ns, depth_frame or rgb_frame, final=final)
        elif self._T_camera_depth is not None:
            T, T_camera_depth = self.poses.lookup(pair.depth_ns, rgb_frame, final=final), self._T_camera_depth
        else:
            # Each at its own time: what moved between the two exposures is the camera, not the scene.
            T = self.poses.lookup(pair.rgb_ns, rgb_frame, final=final)
            T_camera_depth = np.linalg.inv(T) @ self.poses.lookup(pair.depth_ns, depth_frame, final=final)
        info, depth_info = self._info.get(RGB_INFO), self._info.get(DEPTH_INFO)
        own = (self.source, pair, info, depth_info, T, T_camera_depth, self.rectified, is_map)
        return LazyFrame(*own, depth_info_name=self._name(DEPTH_INFO))

    def _drop_waiting(self, reason: str, text: str) -> None:
        for _ in self._waiting:
            self._drop(reason, text)
        self._waiting = []

    def _drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        if self._on_drop is not None:
            self._on_drop(reason, text)
