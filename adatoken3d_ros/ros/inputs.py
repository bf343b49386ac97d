# SPDX-License-Identifier: Apache-2.0
"""Topics in, frames out. Callbacks only stamp and store; converting is left to the thread that takes the frame."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import numpy as np
from geometry_msgs.msg import PoseStamped
from nav_msgs.msg import Odometry
from numpy.typing import NDArray
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import CameraInfo, CompressedImage, Image, PointCloud2

from adatoken3d_ros.ros.conversions import ConversionError, stamp_to_ns
from adatoken3d_ros.ros.diagnostics import NOT_YET, Arrivals, InputState
from adatoken3d_ros.ros.pairing import (
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
    Assembler,
    LazyFrame,
    Picture,
    bad_stamp,
)
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.poses import (
    BufferedPose,
    PoseError,
    PoseSource,
    StaticPose,
    TfPose,
    pose_from_numbers,
    require_tf2,
)
from adatoken3d_ros.ros.qos import override
from adatoken3d_ros.scene.frames import PosedFrame

POLL_PERIOD = 0.05  # seconds between two looks for the poses of images that wait
AGES = 2000  # frames whose age at acceptance is remembered; a minute at 30 Hz
QUEUE_DEPTH = 10  # messages that the middleware keeps for us while a callback runs
BASE_TO_CAMERA = "pose.base_to_camera"
OLD_TIME = "stamps have jumped back since"  # how the error begins of a frame that came before a jump
QUIET = ("duplicate_stamp", "out_of_order", "time_jump")  # dropped for a reason that need not alarm anybody
POSE_TOPICS = {"odometry": ("odom", Odometry), "pose_topic": ("pose", PoseStamped)}
# What frames are made of -> the topics that must carry something; the others help where they do.
NEEDED = {
    RGBD: (RGB, RGB_INFO, DEPTH),
    ORGANISED_POINTS: (POINTS,),
    POINTS_WITH_CAMERA: (RGB, RGB_INFO, POINTS),
    COLOURED_POINTS: (POINTS,),
}
INFOS = {RGBD: (RGB_INFO, DEPTH_INFO), ORGANISED_POINTS: (RGB_INFO,), POINTS_WITH_CAMERA: (RGB_INFO,)}


class Offer:
    """A frame for the thread that takes it: first when and where it was taken, then, if that is wanted, the frame.

    Args:
        pick: what is to be converted.
        on_good: called when the frame passed its checks (with False), and again when it was converted (with True).
    """

    def __init__(self, pick: Callable[[], Picture], on_good: Callable[[bool], object]) -> None:
        self._pick = pick
        self._on_good = on_good

    @cached_property
    def _picture(self) -> Picture:
        return self._pick()

    def view(self) -> tuple[int, NDArray[np.float64]]:
        """Stamp (nanoseconds) and T_world_camera (4, 4); raises ConversionError, which names the value."""
        view = self._picture.view()
        self._on_good(False)
        return view

    def draw(self) -> PosedFrame:
        """The frame; raises ConversionError or FrameError, which name the value that is wrong."""
        frame = self._picture.draw()
        self._on_good(True)
        return frame


class Inputs:
    """The node's subscriptions, from `start` to `stop`.

    Args:
        node: carries the subscriptions.
        parameters: the node's.
        submit: takes each complete frame (see Offer); called from any thread.
        group: callback group of the subscriptions.
        on_time_jump: called when the inputs' time has jumped back and the scene is to be cleared for it.
    """

    def __init__(
        self,
        node: Node,
        parameters: Parameters,
        submit: Callable[[Offer], object],
        group: CallbackGroup,
        on_time_jump: Callable[[], object] | None = None,
    ) -> None:
        self._node = node
        self._parameters = parameters
        self._submit = submit
        self._group = group
        self._on_time_jump = on_time_jump
        self._jumps = 0
        self._newest = 0  # number of the newest frame that was handed over
        self._more: deque[Picture] = deque()  # further pictures of the cloud that was offered last
        self._more_of = (0, 0)  # that cloud's number, and the time's
        self._pictures = 0
        self._lock = threading.Lock()
        self._assembler: Assembler | None = None
        self._entities: list[tuple[Callable[[Any], object], Any]] = []
        self._arrivals: dict[str, Arrivals] = {}
        self._counts: Counter[str] = Counter()
        self._before: Counter[str] = Counter()  # what became of messages that came before the inputs' last start
        self._ages: deque[float] = deque(maxlen=AGES)
        self._bad_poses = 0
        self._needed: tuple[str, ...] = ()
        self._started = 0.0
        self._paired_at: float | None = None
        self._fates: Counter[str] = Counter()
        self.problem = ""
        self._hidden = False  # the problem is one that only a conversion finds
        self._checked = False  # the frame that is being taken has passed its checks

    @property
    def fates(self) -> Counter[str]:
        """What became of the frames until now; a copy, because the thread that takes them counts on."""
        with self._lock:
            return self._fates.copy()

    @property
    def poses(self) -> PoseSource | None:
        """The pose source while the inputs run."""
        return self._assembler.poses if self._assembler is not None else None

    def check(self) -> None:
        """Raises PoseError if the chosen pose source cannot work on this machine, or not with the other parameters."""
        settings = self._parameters
        if settings["pose.source"] == "tf":
            require_tf2()
            if settings["input.source"] in (POINTS_WITH_CAMERA, COLOURED_POINTS) and any(settings[BASE_TO_CAMERA]):
                raise PoseError(
                    f"{BASE_TO_CAMERA} is {list(settings[BASE_TO_CAMERA])}, but with pose.source 'tf' and input.source "
                    f"{settings['input.source']!r} the frames' own names say where things are: leave it at zeros"
                )

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
        source, made_of = settings["pose.source"], settings["input.source"]
        poses = self._make_poses(source)
        depth_to_rgb = settings["pose.depth_to_rgb"]
        self._assembler = Assembler(
            poses,
            source=made_of,
            T_camera_depth=pose_from_numbers(depth_to_rgb) if any(depth_to_rgb) else None,
            on_time_jump=self._time_jumped,
            slop_ns=round(settings["sync.slop"] * 1e9),
            timeout_ns=round(settings["pose.timeout"] * 1e9),
            rectified=settings["input.rectified"],
            on_drop=self._dropped,
            on_refuse=self._dropped,
            clock_ns=self._clock_ns,
        )
        self._arrivals.clear()
        self._ages.clear()
        self.problem = ""
        self._paired_at = None
        self._started = time.monotonic()
        image = CompressedImage if settings["input.transport"] == "compressed" else Image
        self._needed = NEEDED[made_of]
        # The executor looks at subscriptions in this order: what images need comes first.
        for topic in INFOS.get(made_of, ()):
            self._subscribe(CameraInfo, topic, self._on_info)
        if source in POSE_TOPICS:
            topic, kind = POSE_TOPICS[source]
            self._needed += (topic,)
            self._subscribe(kind, topic, self._on_pose)
        for topic in STREAMS[made_of]:
            self._subscribe(PointCloud2 if topic == POINTS else image, topic, self._on_image)
        # Steady, so that waiting images are looked at even while simulated time stands still.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        timer = self._node.create_timer(POLL_PERIOD, self._poll, callback_group=self._group, clock=clock)
        self._entities.append((self._node.destroy_timer, timer))

    def stop(self) -> None:
        """Unsubscribes; images that still wait are counted as `stopped`. Does nothing when stopped."""
        for destroy, entity in self._entities:
            destroy(entity)
        self._entities.clear()
        if self._assembler is not None:
            self._assembler.stop()
            self._before.update(self._assembler.counters())
            if isinstance(self._assembler.poses, TfPose):
                self._assembler.poses.close()
            self._assembler = None
        with self._lock:
            self._more.clear()

    def frame_done(self, fate: str) -> None:
        """Counts what became of an offer: a verdict, `superseded`, `stopped` or `error: ...`. Any thread.

        What came before a jump in time is no error, but counted as `time_jump`.
        """
        kind, _, text = fate.partition(": ")
        kind = "time_jump" if text.startswith(OLD_TIME) else kind
        with self._lock:
            self._fates[kind] += 1
            if kind in ("superseded", "stopped"):
                return
            problem = {"error": text, "no_depth": self._no_depth()}.get(kind, "")
            if problem:
                self.problem, self._hidden = problem, self._checked
            self._checked = False
            # A cloud that has come since goes before what is left of an older one, and so does a new time.
            jumps = self._jumps
            more = self._more.popleft() if self._more and self._more_of == (self._newest, jumps) else None
            self._pictures += more is not None
        if more is not None:
            self._submit(Offer(partial(self._further, more, jumps), self._is_well))
        if problem:
            self._node.get_logger().warning(f"frame not used: {problem}", throttle_duration_sec=5.0)

    def _no_depth(self) -> str:
        return f"the last frame had no valid depth: none between 0 and {self._parameters['scene.max_depth']:g} m"

    def state(self) -> InputState:
        """What diagnostics should know."""
        now = time.monotonic()
        assembler = self._assembler
        if assembler is None:
            return InputState(active=False, values=self._values())
        newest = assembler.pairer.newest
        return InputState(
            active=True,
            silent={name: self._arrived(name).silent(now) for name in self._needed},
            rate={name: self._arrived(name).rate(now) for name in assembler.pairer.streams},
            gap={name: self._arrived(name).gap(now) for name in assembler.pairer.streams},
            since_start=now - self._started,
            since_pair=None if self._paired_at is None else now - self._paired_at,
            apart=(max(newest.values()) - min(newest.values())) / 1e9 if all(newest.values()) else None,
            waiting=assembler.why_waiting(),
            problem=self.problem,
            values=self._values(),
        )

    def explain(self) -> str:
        """Why there is no scene yet, in words."""
        state = self.state()
        if not state.active:
            return "the inputs are not active"
        missing = [name for name, silent in state.silent.items() if silent is None]
        if missing:
            return f"nothing has come on {', '.join(missing)}" + (f"; {state.problem}" if state.problem else "")
        return state.problem or state.waiting or "no frame has been matched, or none was encoded yet"

    def _make_poses(self, source: str) -> PoseSource:
        settings = self._parameters
        T_base_camera = pose_from_numbers(settings[BASE_TO_CAMERA])
        if source == "static":
            return StaticPose(pose_from_numbers(settings["pose.static"]) @ T_base_camera, settings["scene.frame_id"])
        if source == "tf":
            return TfPose(self._node, settings["scene.frame_id"], T_base_camera)
        return BufferedPose(
            settings["scene.frame_id"], T_base_camera, tolerance_ns=round(settings["pose.tolerance"] * 1e9)
        )

    def _subscribe(self, kind: Any, topic: str, callback: Callable[[str, Any], None]) -> None:
        reliable = self._parameters["qos.reliability"] == "reliable"
        profile = QoSProfile(
            depth=QUEUE_DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
        )
        override(self._node, topic, profile)

        def received(message: Any) -> None:
            self._arrived(topic).add(time.monotonic())
            self._counts[topic] += 1
            callback(topic, message)

        subscription = self._node.create_subscription(kind, topic, received, profile, callback_group=self._group)
        self._entities.append((self._node.destroy_subscription, subscription))

    def _on_image(self, topic: str, message: Any) -> None:
        if self._assembler is None:
            # The executor had taken it when the inputs were stopped.
            self._before[f"dropped.{topic}.stopped"] += 1
        else:
            before = self._assembler.matched
            frames = self._assembler.add(topic, stamp_to_ns(message.header.stamp), message)
            if self._assembler.matched > before:
                self._paired_at = time.monotonic()
            self._hand_over(frames)

    def _on_info(self, topic: str, message: Any) -> None:
        if self._assembler is not None:
            self._assembler.add_info(topic, message)
            self._poll()

    def _on_pose(self, topic: str, message: Any) -> None:
        if self._assembler is None or not isinstance(self._assembler.poses, BufferedPose):
            return
        # One wild pose would stay the newest, and no image would wait for its own any more.
        bad = bad_stamp(stamp_to_ns(message.header.stamp), self._clock_ns())
        try:
            if bad is not None:
                raise PoseError(bad[1])
            self._assembler.poses.add(message)
        except ValueError as error:
            self._bad_poses += 1
            self._dropped("bad_pose", f"{topic}: {error}")
        self._poll()

    def _poll(self) -> None:
        if self._assembler is not None and self._assembler.waiting:
            self._hand_over(self._assembler.poll())

    def _hand_over(self, frames: list[LazyFrame]) -> None:
        now_ns = self._node.get_clock().now().nanoseconds if frames else 0
        for frame in frames:
            self._newest += 1
            if now_ns:  # simulated time has begun, or it is real time
                self._ages.append((now_ns - frame.stamp_ns) / 1e6)
            self._submit(Offer(partial(self._first, frame, self._newest, self._jumps), self._is_well))

    def _first(self, frame: LazyFrame, number: int, jumps: int) -> Picture:
        """Runs in the thread that takes the frame. A cloud's further pictures follow one by one, in `frame_done`."""
        self._check_time(frame.stamp_ns, jumps)
        first, *more = frame.pictures()
        with self._lock:
            self._more, self._more_of = deque(more), (number, jumps)
        return first

    def _further(self, picture: Picture, jumps: int) -> Picture:
        """As `_first`, of a cloud's further pictures."""
        self._check_time(picture.stamp_ns, jumps)
        return picture

    def _check_time(self, stamp_ns: int, jumps: int) -> None:
        """Raises ConversionError for what was taken before time jumped back: it has no place in the new scene."""
        if jumps != self._jumps:
            raise ConversionError(f"{OLD_TIME} the frame at {stamp_ns / 1e9:.6f} s")

    def _is_well(self, converted: bool) -> None:
        """A frame is good as far as it was looked at; nobody needed to convert it if the camera stands still."""
        with self._lock:
            self._checked = True
            if converted or not self._hidden:
                self.problem = ""

    def _time_jumped(self) -> None:
        with self._lock:
            self._jumps += 1
            self._more.clear()
        clear = self._parameters["scene.on_time_jump"] == "clear"
        self._node.get_logger().warning(
            f"stamps have jumped back (time {self._jumps}); the scene is {'cleared' if clear else 'kept'}"
        )
        if clear and self._on_time_jump is not None:
            self._on_time_jump()

    def _arrived(self, topic: str) -> Arrivals:
        return self._arrivals.setdefault(topic, Arrivals())

    def _clock_ns(self) -> float:
        """Now; infinite before simulated time begins, so that any stamp is believed."""
        return int(self._node.get_clock().now().nanoseconds) or math.inf

    def _dropped(self, reason: str, text: str) -> None:
        """A message or a pair that gives no frame."""
        if reason not in QUIET:
            with self._lock:
                self.problem, self._hidden = text, False
        self._node.get_logger().warning(f"{reason}: {text}", throttle_duration_sec=5.0)

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {f"received.{name}": count for name, count in sorted(self._counts.items())}
        counters, assembler = self._before.copy(), self._assembler
        if assembler is not None:
            counters.update(assembler.counters())
            for name in assembler.pairer.streams:
                values[f"pending.{name}"] = assembler.pairer.pending(name)
            values["pairs.waiting"] = assembler.waiting
        values.update(sorted(counters.items()))
        for percent in (50, 95):
            age = f"{np.percentile(self._ages, percent):.2f}" if self._ages else NOT_YET
            values[f"accepted.age_ms.p{percent}"] = age
        values["poses.refused"] = self._bad_poses
        values["time_jumps"] = self._jumps
        values["pictures.further"] = self._pictures
        return values
