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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.ros.inputs.clocks import Clocks
from adatoken3d_ros.ros.inputs.pictures import (
    COLOURED_POINTS,
    DEPTH,
    DEPTH_INFO,
    RGB,
    RGB_INFO,
    RGBD,
    STREAMS,
    LazyFrame,
    Pair,
)
from adatoken3d_ros.ros.inputs.poses import PoseError, PoseSource, PoseUnavailable
from adatoken3d_ros.ros.inputs.transforms import MAX_NAME
from adatoken3d_ros.scene.frames import FrameError, check_position
from adatoken3d_ros.settings import DEFAULTS
from adatoken3d_ros.text import quoted


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
    `out_of_order`, `no_stamp`, `future_stamp`, `time_jump`, `two_clocks` (see `clocks.Clocks`), `stopped`.

    Args:
        slop_ns: largest difference of the stamps, nanoseconds; 0 pairs equal stamps only.
        capacity: messages of a stream that may wait for a partner.
        streams: names of one or two streams, colour first.
        clocks: judge the stamps; None: those of `streams`, without a clock.
        name: what people call a stream: its topic on the graph.

    Attributes:
        refused: (reason, text with the stamp) of the last message if it was dropped by itself, else None.
    """

    def __init__(
        self,
        slop_ns: int = 0,
        capacity: int = 30,
        streams: tuple[str, ...] = (RGB, DEPTH),
        clocks: Clocks | None = None,
        name: Callable[[str], str] = str,
    ) -> None:
        self.slop_ns = slop_ns
        self.capacity = capacity
        self.streams = streams
        self.counts = {stream: StreamCounts() for stream in streams}
        self.jumps = 0
        self.refused: tuple[str, str] | None = None
        self._clocks = clocks or Clocks(streams)
        self._name = name
        self._pending: dict[str, list[tuple[int, Any]]] = {stream: [] for stream in streams}
        self._used = dict.fromkeys(streams, 0)

    @property
    def newest(self) -> dict[str, int]:
        """Greatest stamp of each stream since time last jumped, nanoseconds; 0 before the first."""
        return self._clocks.newest

    def pending(self, stream: str) -> int:
        """Messages of a stream that wait for a partner."""
        return len(self._pending[stream])

    def add(self, stream: str, stamp_ns: int, message: Any, refusal: tuple[str, str] | None = None) -> Pair | None:
        """Takes one message; returns the pair that it completes. `refusal`: why it is not used, (reason, text)."""
        counts = self.counts[stream]
        counts.received += 1
        self.refused = None
        other = self.streams[0] if stream == self.streams[-1] else self.streams[-1]
        refusal = refusal or self._clocks.judge(stream, stamp_ns)
        if refusal is not None:
            self._refuse(stream, *refusal)
            return None
        if self._clocks.jumped:
            self.jumps += 1
            self._forget("time_jump")
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
        self._clocks.forget()

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
            self._used[stream] = 0


class WildPose(PoseError):
    """A pose beyond `scene.frames.MAX_POSITION`."""


def _other_frame(info: Any, frame: str) -> bool:
    """Whether a calibration names another frame than `frame`, and both have a name."""
    own = str(info.header.frame_id)
    return bool(own and frame) and own != frame


class Assembler:
    """Turns messages into frames that only have to be converted; what is late waits, what cannot come is dropped.

    Pairs are counted: matched == ready + sum(dropped) + waiting. Reasons: `no_camera_info`, `no_pose`, `wild_pose`,
    `time_jump`, `stopped`. Waiting is measured in the stamps' own time, so that a bag gives the same frames at any
    speed.

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
        on_warn: told (stream, text) of a calibration that is of another frame than the images that it belongs to; an
            empty text where it is so no more.
        clock_ns, publishers: see clocks.Clocks. name: see Pairer.
    """

    def __init__(
        self,
        poses: PoseSource,
        *,
        source: str = RGBD,
        slop_ns: int = 0,
        timeout_ns: int = round(DEFAULTS["pose.timeout"] * 1e9),
        rectified: bool = False,
        T_camera_depth: NDArray[np.float64] | None = None,
        capacity: int = 30,
        on_drop: Callable[[str, str], None] | None = None,
        on_refuse: Callable[[str, str], None] | None = None,
        on_time_jump: Callable[[], None] | None = None,
        on_warn: Callable[[str, str], None] | None = None,
        clock_ns: Callable[[], float] = lambda: math.inf,
        publishers: Callable[[str], int] = lambda stream: 1,
        name: Callable[[str], str] = str,
    ) -> None:
        self.poses = poses
        self.source = source
        streams = STREAMS[source]
        self.pairer = Pairer(slop_ns, capacity, streams, Clocks(streams, clock_ns, publishers, name), name)
        self._name = name
        self.timeout_ns = timeout_ns
        self.rectified = rectified
        self.capacity = capacity
        self.matched = 0
        self.ready = 0
        self.dropped: Counter[str] = Counter()
        self.infos: Counter[str] = Counter()
        self.other_frame: Counter[str] = Counter()
        self._on_warn = on_warn or (lambda stream, text: None)
        self._T_camera_depth = T_camera_depth
        self._on_drop = on_drop
        self._on_refuse = on_refuse
        self._on_time_jump = on_time_jump
        self._info: dict[str, Any] = {}
        self._image_frames: dict[str, str] = {}  # frame_id of the last image that belongs to each calibration
        self._mistaken: set[str] = set()  # calibrations of another frame that are used
        self._waiting: list[Pair] = []
        self._jumps = 0

    @property
    def camera_frame(self) -> str:
        """Frame of the last colour image, or cloud; empty before the first."""
        return self._image_frames.get(RGB_INFO, "")

    @property
    def waiting(self) -> int:
        """Pairs that wait for their pose or for a calibration."""
        return len(self._waiting)

    def add_info(self, stream: str, message: Any) -> None:
        """The newest calibration of a stream counts, but none of another frame where there is one of the image's."""
        self.infos[stream] += 1
        if len(message.header.frame_id) > MAX_NAME:
            self._warn_of(stream, message, "", "not used")
            return
        held, frame = self._info.get(stream), self._image_frames.get(stream, "")
        if held is None or not _other_frame(message, frame) or _other_frame(held, frame):
            self._info[stream] = message
        else:
            self._warn_of(stream, message, frame, "not used")

    def add(self, stream: str, stamp_ns: int, message: Any) -> list[LazyFrame]:
        """Takes an image or a cloud; returns the frames that are now complete, oldest first."""
        # The name is looked up, compared and told again and again while its frame waits.
        name = len(message.header.frame_id)
        bad = ("bad_frame_id", f"a frame_id of {name} characters, at most {MAX_NAME}") if name > MAX_NAME else None
        pair = self.pairer.add(stream, stamp_ns, message, bad)
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
            self._look_at_frames(pair)
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
                self._drop("wild_pose" if isinstance(error, WildPose) else "no_pose", str(error))
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
        counters.update({f"other_frame.{name}": n for name, n in self.other_frame.items()})
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
            T = self._pose(pair.depth_ns, depth_frame or rgb_frame, final)
        elif self._T_camera_depth is not None:
            T, T_camera_depth = self._pose(pair.depth_ns, rgb_frame, final), self._T_camera_depth
        else:
            # Each at its own time: what moved between the two exposures is the camera, not the scene.
            T = self._pose(pair.rgb_ns, rgb_frame, final)
            T_camera_depth = np.linalg.inv(T) @ self._pose(pair.depth_ns, depth_frame, final)
        info, depth_info = self._info.get(RGB_INFO), self._info.get(DEPTH_INFO)
        own = (self.source, pair, info, depth_info, T, T_camera_depth, self.rectified, is_map)
        return LazyFrame(*own, depth_info_name=self._name(DEPTH_INFO))

    def _pose(self, stamp_ns: int, frame: str, final: bool) -> NDArray[np.float64]:
        """Raises PoseError or PoseUnavailable, WildPose for one where no scene can be."""
        T = self.poses.lookup(stamp_ns, frame, final=final)
        try:
            check_position(T[:3, 3])
        except FrameError as error:
            raise WildPose(f"the pose of {quoted(frame)} at {stamp_ns / 1e9:.6f} s: {error}") from error
        return T

    def _look_at_frames(self, pair: Pair) -> None:
        """Some drivers tell a frame for the calibration that is not the images', and mean the same camera."""
        self._image_frames = {RGB_INFO: str(pair.rgb.header.frame_id), DEPTH_INFO: str(pair.depth.header.frame_id)}
        for stream, frame in self._image_frames.items():
            held = self._info.get(stream)
            if held is not None and _other_frame(held, frame):
                self._warn_of(stream, held, frame, "used all the same")
                self._mistaken.add(stream)
            elif stream in self._mistaken:
                self._mistaken.remove(stream)
                self._on_warn(stream, "")

    def _warn_of(self, stream: str, info: Any, frame: str, what: str) -> None:
        self.other_frame[stream] += 1
        own = quoted(str(info.header.frame_id))
        self._on_warn(stream, f"the CameraInfo is of frame {own}, the images of {quoted(frame)}: it is {what}")

    def _drop_waiting(self, reason: str, text: str) -> None:
        for _ in self._waiting:
            self._drop(reason, text)
        self._waiting = []

    def _drop(self, reason: str, text: str) -> None:
        self.dropped[reason] += 1
        if self._on_drop is not None:
            self._on_drop(reason, text)
