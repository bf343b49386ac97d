# SPDX-License-Identifier: Apache-2.0
"""Colour, depth, calibration and pose become frames. Pure bookkeeping: the same for live topics and for a bag.

Every message is accounted for. A stream's messages are paired, dropped for a reason, or still pending; pairs become
frames, are dropped for a reason, or still wait for their pose.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.conversions import (
    Camera,
    ConversionError,
    camera_info_to_camera,
    check_size,
    decode_depth,
    decode_rgb,
    rectify,
)
from adatoken3d_ros.ros.poses import JUMP_BACK_NS, PoseError, PoseSource, PoseUnavailable
from adatoken3d_ros.scene.frames import PosedFrame

RGB = "rgb/image"
DEPTH = "depth/image"
RGB_INFO = "rgb/camera_info"
DEPTH_INFO = "depth/camera_info"

# Pixels by which the depth camera's matrix may differ from the colour camera's before depth counts as unregistered.
REGISTERED_PIXELS = 1.0
NO_CAMERA_INFO = f"images have come, but no CameraInfo on {RGB_INFO}"


@dataclass(frozen=True, eq=False)
class Pair:
    """A colour and a depth message that belong together, and their stamps in nanoseconds."""

    rgb_ns: int
    depth_ns: int
    rgb: Any
    depth: Any


@dataclass
class StreamCounts:
    """What became of one stream's messages: received == paired + sum(dropped) + pending."""

    received: int = 0
    paired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


class Pairer:
    """Pairs two streams by stamp; newest wins, and no stamp is used twice.

    A message takes the nearest partner within the slop as soon as there is one; all that is older than a pair is
    dropped as `unmatched`. Other reasons: `duplicate_stamp`, `out_of_order`, `no_stamp`, `time_jump`, `stopped`.

    Args:
        slop_ns: largest difference of the stamps, nanoseconds; 0 pairs equal stamps only.
        capacity: messages of a stream that may wait for a partner.
    """

    def __init__(self, slop_ns: int = 0, capacity: int = 30) -> None:
        self.slop_ns = slop_ns
        self.capacity = capacity
        self.counts = {RGB: StreamCounts(), DEPTH: StreamCounts()}
        self.newest = {RGB: 0, DEPTH: 0}
        self.jumps = 0
        self._pending: dict[str, list[tuple[int, Any]]] = {RGB: [], DEPTH: []}
        self._used = {RGB: 0, DEPTH: 0}

    def pending(self, stream: str) -> int:
        """Messages of a stream that wait for a partner."""
        return len(self._pending[stream])

    def add(self, stream: str, stamp_ns: int, message: Any) -> Pair | None:
        """Takes one message; returns the pair that it completes."""
        counts = self.counts[stream]
        counts.received += 1
        if stamp_ns <= 0:
            counts.dropped["no_stamp"] += 1
            return None
        if stamp_ns < self.newest[stream] - JUMP_BACK_NS:
            self.jumps += 1
            self._forget("time_jump")
        pending = self._pending[stream]
        if stamp_ns == self._used[stream] or any(waiting == stamp_ns for waiting, _ in pending):
            counts.dropped["duplicate_stamp"] += 1
            return None
        if stamp_ns < self._used[stream]:
            counts.dropped["out_of_order"] += 1
            return None
        self.newest[stream] = max(self.newest[stream], stamp_ns)
        insort(pending, (stamp_ns, message), key=lambda item: item[0])
        other = DEPTH if stream == RGB else RGB
        partner = min(self._pending[other], key=lambda item: abs(item[0] - stamp_ns), default=None)
        if partner is None or abs(partner[0] - stamp_ns) > self.slop_ns:
            if len(pending) > self.capacity:
                pending.pop(0)
                counts.dropped["unmatched"] += 1
            return None
        rgb, depth = ((stamp_ns, message), partner) if stream == RGB else (partner, (stamp_ns, message))
        self._take(RGB, rgb[0])
        self._take(DEPTH, depth[0])
        return Pair(rgb[0], depth[0], rgb[1], depth[1])

    def stop(self) -> None:
        """Drops what is pending, counted as `stopped`."""
        self._forget("stopped")

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
class LazyFrame:
    """A pair with its calibration and pose. Calling it converts the messages, which is work for another thread."""

    pair: Pair
    info: Any
    depth_info: Any | None
    T_world_camera: NDArray[np.float64]
    rectified: bool

    @property
    def stamp_ns(self) -> int:
        """The depth image's stamp: the geometry is what the pose is applied to."""
        return self.pair.depth_ns

    def __call__(self) -> PosedFrame:
        """Raises ConversionError or FrameError, which name the value that is wrong."""
        frames = self.pair.rgb.header.frame_id, self.pair.depth.header.frame_id
        if all(frames) and frames[0] != frames[1]:
            raise ConversionError(f"depth is in frame {frames[1]!r}, colour in {frames[0]!r}: depth must be registered")
        camera = camera_info_to_camera(self.info, rectified=self.rectified)
        if self.depth_info is not None:
            check_registered(camera, camera_info_to_camera(self.depth_info, rectified=self.rectified))
        rgb, depth = decode_rgb(self.pair.rgb), decode_depth(self.pair.depth)
        check_size("colour", rgb.shape, camera)
        if depth.shape != rgb.shape[:2]:
            raise ConversionError(
                f"the depth image is {depth.shape[1]}x{depth.shape[0]} but the colour image is "
                f"{rgb.shape[1]}x{rgb.shape[0]}: depth must be registered to colour"
            )
        rgb, depth = rectify(rgb, depth, camera)
        return PosedFrame(rgb, depth, camera.K, self.T_world_camera, self.stamp_ns)


def check_registered(colour: Camera, depth: Camera) -> None:
    """Raises ConversionError unless both cameras are the same to a pixel, as they are for registered depth."""
    if (colour.width, colour.height) != (depth.width, depth.height):
        raise ConversionError(
            f"depth is not registered to colour: {DEPTH_INFO} describes {depth.width}x{depth.height}, "
            f"{RGB_INFO} {colour.width}x{colour.height}"
        )
    if np.abs(colour.K - depth.K).max() > REGISTERED_PIXELS:
        raise ConversionError(
            f"depth is not registered to colour: {DEPTH_INFO} has K = {depth.K.reshape(-1).tolist()}, "
            f"{RGB_INFO} K = {colour.K.reshape(-1).tolist()}"
        )


class Assembler:
    """Turns messages into frames that only have to be converted; what is late waits, what cannot come is dropped.

    Pairs are counted: matched == ready + sum(dropped) + waiting. Reasons: `no_camera_info`, `no_pose`, `time_jump`,
    `stopped`. Waiting is measured in the stamps' own time, so that a bag gives the same frames at any speed.

    Args:
        poses: where the camera was.
        slop_ns: see Pairer.
        timeout_ns: a pair waits for its pose and calibration until one this much newer has come, nanoseconds; 0: never.
        rectified: images are rectified already (use P of CameraInfo).
        capacity: see Pairer; also the number of pairs that may wait for their pose.
        on_drop: told (reason, text with the offending value) of every pair that is dropped.
    """

    def __init__(
        self,
        poses: PoseSource,
        *,
        slop_ns: int = 0,
        timeout_ns: int = 500_000_000,
        rectified: bool = False,
        capacity: int = 30,
        on_drop: Callable[[str, str], None] | None = None,
    ) -> None:
        self.poses = poses
        self.pairer = Pairer(slop_ns, capacity)
        self.timeout_ns = timeout_ns
        self.rectified = rectified
        self.capacity = capacity
        self.matched = 0
        self.ready = 0
        self.dropped: Counter[str] = Counter()
        self.infos: Counter[str] = Counter()
        self._on_drop = on_drop
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

    def add_image(self, stream: str, stamp_ns: int, message: Any) -> list[LazyFrame]:
        """Takes an image; returns the frames that are now complete, oldest first."""
        pair = self.pairer.add(stream, stamp_ns, message)
        if self.pairer.jumps > self._jumps:
            self._jumps = self.pairer.jumps
            self.poses.reset(stamp_ns)
            self._drop_waiting("time_jump", "time went back")
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
            if RGB_INFO not in self._info:
                if overdue:
                    self._drop("no_camera_info", NO_CAMERA_INFO)
                else:
                    waiting.append(pair)
                continue
            try:
                T = self.poses.lookup(pair.depth_ns, _camera_frame(pair), final=overdue)
            except PoseUnavailable as error:
                if overdue:
                    self._drop("no_pose", str(error))
                else:
                    waiting.append(pair)
            except PoseError as error:
                self._drop("no_pose", str(error))
            else:
                self.ready += 1
                frames.append(LazyFrame(pair, self._info[RGB_INFO], self._info.get(DEPTH_INFO), T, self.rectified))
        self._waiting = waiting
        return frames

    def why_waiting(self) -> str:
        """What the newest waiting pair lacks; empty if none waits."""
        if not self._waiting:
            return ""
        if RGB_INFO not in self._info:
            return NO_CAMERA_INFO
        pair = self._waiting[-1]
        try:
            self.poses.lookup(pair.depth_ns, _camera_frame(pair))
        except PoseError as error:
            return str(error)
        return ""

    def stop(self) -> None:
        """Drops all that waits, counted as `stopped`."""
        self.pairer.stop()
        self._drop_waiting("stopped", "the inputs were stopped")

    def _drop_waiting(self, reason: str, text: str) -> None:
        for _ in self._waiting:
            self._drop(reason, text)
        self._waiting = []

    def _drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        if self._on_drop is not None:
            self._on_drop(reason, text)


def _camera_frame(pair: Pair) -> str:
    return str(pair.depth.header.frame_id or pair.rgb.header.frame_id)
