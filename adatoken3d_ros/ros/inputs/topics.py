# SPDX-License-Identifier: Apache-2.0
"""Topics in, frames out. Callbacks only stamp and store; converting is left to the thread that takes the frame."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2

from adatoken3d_ros.ros.inputs.accounting import InputRecord, InputState, TopicWarnings
from adatoken3d_ros.ros.inputs.conversions import ConversionError, stamp_to_ns
from adatoken3d_ros.ros.inputs.pairing import Assembler
from adatoken3d_ros.ros.inputs.pictures import (
    COLOURED_POINTS,
    DEPTH,
    DEPTH_INFO,
    ORGANISED_POINTS,
    POINTS,
    POINTS_WITH_CAMERA,
    RGB,
    RGB_INFO,
    RGBD,
    STREAMS,
    LazyFrame,
    Picture,
)
from adatoken3d_ros.ros.inputs.pose_inputs import PoseInput, check
from adatoken3d_ros.ros.inputs.poses import PoseSource, TfPose, pose_from_numbers
from adatoken3d_ros.ros.inputs.subscriptions import Subscriptions
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.text import quoted

POLL_PERIOD = 0.05  # seconds between two looks for the poses of images that wait
GRAPH_PERIOD = 0.5  # seconds between two looks at who publishes the inputs
OLD_TIME = "stamps have jumped back since"  # how the error begins of a frame that came before a jump
STOPPED = "the inputs were stopped after"  # and of one that had not been taken by then
TWO_CLOCKS = "two_clocks"  # dropped for a reason that is told as long as it happens, while frames come all the same
# What frames are made of -> the topics that must carry something; the others help where they do.
NEEDED = {
    RGBD: (RGB, RGB_INFO, DEPTH),
    ORGANISED_POINTS: (POINTS,),
    POINTS_WITH_CAMERA: (RGB, RGB_INFO, POINTS),
    COLOURED_POINTS: (POINTS,),
}
INFOS = {RGBD: (RGB_INFO, DEPTH_INFO), ORGANISED_POINTS: (RGB_INFO,), POINTS_WITH_CAMERA: (RGB_INFO,)}


Submit = Callable[[Callable[[], PosedFrame], Callable[[], tuple[int, NDArray[np.float64]]]], object]


class Inputs:
    """The node's subscriptions, from `start` to `stop`.

    Args:
        node: carries the subscriptions.
        parameters: the node's.
        submit: takes each complete frame as two functions for the thread that takes it: one that draws the frame, one
            that only says when and where it was taken: stamp (nanoseconds) and T_world_camera (4, 4). Both raise
            ConversionError or FrameError, which name the value that is wrong. Called from any thread.
        group: callback group of the subscriptions.
        on_time_jump: called when the inputs' time has jumped back and the scene is to be cleared for it.
        on_map_jump: see PoseInput.
        clock: seconds, monotonic.

    Attributes:
        warnings: what is wrong with topics whose frames are used all the same.
    """

    def __init__(
        self,
        node: Node,
        parameters: Parameters,
        submit: Submit,
        group: CallbackGroup,
        on_time_jump: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_map_jump: Callable[[NDArray[np.float64]], object] = lambda _: None,
    ) -> None:
        self._on_map_jump = on_map_jump
        self._map_jumps = 0
        self._node = node
        self._parameters = parameters
        self._submit = submit
        self._group = group
        self._on_time_jump = on_time_jump
        self._jumps = 0
        self._stops = 0
        self._newest = 0  # number of the newest frame that was handed over
        self._more: deque[Picture] = deque()  # further pictures of the cloud that was offered last
        self._more_of = (0, (0, 0))  # that cloud's number, and its era
        self._pictures = 0
        self.record = InputRecord(clock)
        self._assembler: Assembler | None = None
        self._timers: list[Any] = []
        self._subscriptions = Subscriptions(node, group)
        self._pose_input: PoseInput | None = None
        self.warnings = TopicWarnings(node, clock)

    @property
    def fates(self) -> Counter[str]:
        """What became of the frames until now."""
        return self.record.fates

    @property
    def offered(self) -> int:
        """Frames, and further pictures of clouds, that were handed over until now: each of them meets its fate."""
        return self._newest + self._pictures

    @property
    def poses(self) -> PoseSource | None:
        """The pose source while the inputs run."""
        return self._assembler.poses if self._assembler is not None else None

    def in_scene(self, point: NDArray[np.float64], frame: str) -> NDArray[np.float64]:
        """A point (3,) of a frame in the scene's, metres; without a frame, or while the inputs are stopped, as it is.

        Raises:
            ValueError: if the pose source does not know the way from that frame.
        """
        poses = self.poses
        if poses is None or frame in ("", self._parameters["scene.frame_id"]):
            return point
        if not isinstance(poses, TfPose):
            raise ValueError(f"pose.source is {quoted(self._parameters['pose.source'])}, only 'tf' knows other frames")
        T = poses.transform(0, frame)
        return np.asarray(T[:3, :3] @ point + T[:3, 3])

    def way_to_camera(self, frame: str) -> NDArray[np.float64]:
        """From the camera's optical frame to another, (4, 4), as TF says now; without a name, the identity.

        Raises:
            ValueError: if nothing leads there.
        """
        if not frame:
            return np.eye(4)
        if self._pose_input is None or self._assembler is None:
            raise ValueError(f"the inputs are stopped, so nobody knows the way from {quoted(frame)} to the camera")
        return self._pose_input.way_to_camera(frame, self._assembler.camera_frame)

    def check(self) -> None:
        """Raises PoseError if the chosen pose source cannot work with the other parameters."""
        check(self._parameters)

    def start(self) -> None:
        """Subscribes. Raises PoseError as `check`, ValueError for a quality of service that there is not."""
        self.check()
        try:
            self._start()
        except ValueError:
            self.stop()
            raise

    def _start(self) -> None:
        settings = self._parameters
        made_of = settings["input.source"]
        self._pose_input = PoseInput(settings, self._clock_ns, self.record.refused, self._warn, self._map_jumped)
        depth_to_rgb = settings["pose.depth_to_rgb"]
        self._assembler = Assembler(
            self._pose_input.poses,
            source=made_of,
            T_camera_depth=pose_from_numbers(depth_to_rgb) if any(depth_to_rgb) else None,
            on_time_jump=self._time_jumped,
            slop_ns=round(settings["sync.slop"] * 1e9),
            timeout_ns=round(settings["pose.timeout"] * 1e9),
            rectified=settings["input.rectified"],
            on_drop=self._dropped,
            on_refuse=self._refused,
            on_warn=self.warnings.add,
            name=self._subscriptions.name,
            clock_ns=self._clock_ns,
            publishers=lambda stream: len(self.warnings.publishers(stream)),
        )
        self.warnings.clear()
        image = CompressedImage if settings["input.transport"] == "compressed" else Image
        self.record.begin((*NEEDED[made_of], *self._pose_input.needed))
        # The executor looks at subscriptions in this order: what images need comes first.
        for topic in INFOS.get(made_of, ()):
            self._subscribe(CameraInfo, topic, self._on_info)
        for kind, topic, profile in self._pose_input.subscriptions:
            self._subscribe(kind, topic, self._on_pose, profile)
        for topic in STREAMS[made_of]:
            self._subscribe(PointCloud2 if topic == POINTS else image, topic, self._on_image)
        # Steady, so that waiting images are looked at even while simulated time stands still.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        for period, look in ((POLL_PERIOD, self._poll), (GRAPH_PERIOD, self._subscriptions.follow_publishers)):
            self._timers.append(self._node.create_timer(period, look, callback_group=self._group, clock=clock))
        self._node.get_logger().info(f"active, waiting for {', '.join(self._subscriptions.names().values())}")

    def stop(self) -> None:
        """Unsubscribes; images that still wait are counted as `stopped`. Does nothing when stopped."""
        for timer in self._timers:
            self._node.destroy_timer(timer)
        self._subscriptions.clear()
        self._timers.clear()
        if self._assembler is not None:
            self._assembler.stop()
            self.record.ended(self._assembler.counters())
            self._assembler = None
        with self.record.lock:
            self._stops += 1
            self._more.clear()

    @property
    def _era(self) -> tuple[int, int]:
        """Changes when time jumps back and when the inputs are stopped: what was offered before is not taken after."""
        return self._jumps, self._stops

    def frame_done(self, fate: str) -> None:
        """Counts what became of an offer: a verdict, `superseded`, `stopped` or `error: ...`. Any thread.

        What came before a jump in time is no error, but counted as `time_jump`; so is what was `stopped`.
        """
        kind, _, text = fate.partition(": ")
        kind = "time_jump" if text.startswith(OLD_TIME) else "stopped" if text.startswith(STOPPED) else kind
        problem = {"error": text, "no_depth": self._no_depth()}.get(kind, "")
        with self.record.lock:
            self.record.frame_done(kind, problem)
            if kind in ("superseded", "stopped"):
                return
            # A cloud that has come since goes before what is left of an older one, and so does a new time.
            era = self._era
            if self._more and self._more_of == (self._newest, era):
                self._pictures += 1
                # Under the lock: else a cloud that comes now would be offered first, and replaced by this.
                self._offer(partial(self._further, self._more.popleft(), era))
        if kind == "key_frame" and self.record.first(kind):
            self._node.get_logger().info("the first key frame is in the scene")
        if problem:
            self._node.get_logger().warning(f"frame not used: {problem}", throttle_duration_sec=WARN_SECONDS)

    def _no_depth(self) -> str:
        return f"the last frame had no valid depth: none between 0 and {self._parameters['scene.max_depth']:g} m"

    def state(self) -> InputState:
        """What diagnostics should know."""
        state = self.record.state(
            self._assembler,
            {"time_jumps": self._jumps, "map_jumps": self._map_jumps, "pictures.further": self._pictures},
        )
        return replace(
            state,
            names=self._subscriptions.names(),
            unheard=self._subscriptions.unheard(),
            mismatches=self._subscriptions.mismatches(),
            warnings=self.warnings.texts(),
        )

    def explain(self) -> str:
        """Why there is no scene yet, in words."""
        return self.state().explain()

    def _subscribe(
        self, kind: Any, topic: str, callback: Callable[[str, Any], None], profile: QoSProfile | None = None
    ) -> None:
        def received(message: Any) -> None:
            if self.record.received(topic):
                self._node.get_logger().info(f"the first message has come on {self._subscriptions.name(topic)}")
            callback(topic, message)

        self._subscriptions.add(kind, topic, received, self._parameters["qos.reliability"], profile)

    def _on_image(self, topic: str, message: Any) -> None:
        if self._assembler is None:
            # The executor had taken it when the inputs were stopped.
            self.record.ended({f"dropped.{topic}.stopped": 1})
        else:
            before = self._assembler.matched
            frames = self._assembler.add(topic, stamp_to_ns(message.header.stamp), message)
            if self._assembler.matched > before:
                self.record.paired()
            self._hand_over(frames)

    def _on_info(self, topic: str, message: Any) -> None:
        if self._assembler is not None:
            self._assembler.add_info(topic, message)
            self._poll()

    def _on_pose(self, topic: str, message: Any) -> None:
        if self._assembler is None or self._pose_input is None:
            return
        try:
            self._pose_input.add(topic, message)
        except ValueError as error:
            self._dropped("bad_pose", f"{self._subscriptions.name(topic)}: {error}")
        self._poll()

    def _poll(self) -> None:
        if self._assembler is not None and self._assembler.waiting:
            self._hand_over(self._assembler.poll())

    def _hand_over(self, frames: list[LazyFrame]) -> None:
        now_ns = self._node.get_clock().now().nanoseconds if frames else 0
        for frame in frames:
            if self.record.first("pose"):
                where = ", ".join(f"{value:.2f}" for value in frame.T_world_camera[:3, 3])
                source, scene_frame = self._parameters["pose.source"], self._parameters["scene.frame_id"]
                self._node.get_logger().info(f"the first pose is there ({source}): at {where} m in {scene_frame!r}")
            if now_ns:  # simulated time has begun, or it is real time
                self.record.accepted((now_ns - frame.stamp_ns) / 1e6)
            with self.record.lock:
                self._newest += 1
                self._offer(partial(self._first, frame, self._newest, self._era))

    def _offer(self, pick: Callable[[], Picture]) -> None:
        picked = cache(pick)

        def view() -> tuple[int, NDArray[np.float64]]:
            found = picked().view()
            self.record.is_well(False)
            return found

        def draw() -> PosedFrame:
            frame = picked().draw()
            self.record.is_well(True)
            return frame

        self._submit(draw, view)

    def _first(self, frame: LazyFrame, number: int, era: tuple[int, int]) -> Picture:
        """Runs in the thread that takes the frame. A cloud's further pictures follow one by one, in `frame_done`."""
        self._check_era(frame.stamp_ns, era)
        first, *more = frame.pictures()
        with self.record.lock:
            self._more, self._more_of = deque(more), (number, era)
        return first

    def _further(self, picture: Picture, era: tuple[int, int]) -> Picture:
        """As `_first`, of a cloud's further pictures."""
        self._check_era(picture.stamp_ns, era)
        return picture

    def _check_era(self, stamp_ns: int, era: tuple[int, int]) -> None:
        """Raises ConversionError for what was offered before the inputs were stopped, or before time jumped back: it
        has no place in the new scene.
        """
        if era[1] != self._stops:
            raise ConversionError(f"{STOPPED} the frame at {stamp_ns / 1e9:.6f} s")
        if era[0] != self._jumps:
            raise ConversionError(f"{OLD_TIME} the frame at {stamp_ns / 1e9:.6f} s")

    def _map_jumped(self, moved: NDArray[np.float64]) -> None:
        self._map_jumps += 1
        metres = float(np.linalg.norm(moved[:3, 3]))
        text = (
            f"the odometry's frame has jumped in the map by {metres:.2f} m (time {self._map_jumps}): the views follow"
        )
        self._node.get_logger().info(text, throttle_duration_sec=WARN_SECONDS)
        self._on_map_jump(moved)

    def _time_jumped(self) -> None:
        if self._pose_input is not None:
            self._pose_input.jumps.reset()
        with self.record.lock:
            self._jumps += 1
            self._more.clear()
        clear = self._parameters["scene.on_time_jump"] == "clear"
        self._node.get_logger().warning(
            f"stamps have jumped back (time {self._jumps}); the scene is {'cleared' if clear else 'kept'}",
            throttle_duration_sec=WARN_SECONDS,
        )
        if clear and self._on_time_jump is not None:
            self._on_time_jump()

    def _clock_ns(self) -> float:
        """Now; infinite before simulated time begins, so that any stamp is believed."""
        return int(self._node.get_clock().now().nanoseconds) or math.inf

    def _dropped(self, reason: str, text: str) -> None:
        """A message or a pair that gives no frame."""
        self.record.dropped(reason, text)
        self._warn(f"{reason}: {text}")

    def _warn(self, text: str) -> None:
        self._node.get_logger().warning(text, throttle_duration_sec=WARN_SECONDS)

    def _refused(self, reason: str, text: str) -> None:
        """A message that is dropped by itself for its stamp."""
        if reason == TWO_CLOCKS:
            topic, _, why = text.partition(": ")
            self.warnings.add(topic, why)
        else:
            self._dropped(reason, text)
