# SPDX-License-Identifier: Apache-2.0
"""The node's real inputs, worker and session without a ROS graph: messages go in, statuses and the log come out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from rclpy.qos import QoSProfile
from ros_graph import synthetic_frame
from ros_messages import cloud_message, image, info, pose_message

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.events import FrameTaken, Listeners
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.outputs import diagnostics
from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from adatoken3d_ros.settings import DEFAULTS
from tests.engine.scenes import new_scene, working

LIMIT = 30.0  # seconds until a test that hangs fails
START_NS = 1_700_000_000_000_000_000
STEP_NS = 100_000_000
STALE_AFTER = 5.0
SECOND = 1_000_000_000
TOPICS = {"rgb_info": "rgb/camera_info", "depth_info": "depth/camera_info", "pose": "pose", "rgb": "rgb/image",
          "depth": "depth/image", "points": "points",
          "odom": "odom", "tf": "/tf", "tf_static": "/tf_static"}  # fmt: skip


class FakeNode:
    """What `Inputs` uses of a node: subscriptions that the test fills, a clock that it sets, a log that it reads."""

    def __init__(self) -> None:
        self.subscriptions: dict[str, Any] = {}
        self.log: list[str] = []
        self.timers: list[Callable[[], None]] = []
        self.publishers: list[str] = []  # names of the nodes that the graph tells for every topic
        self.kinds: dict[str, Any] = {}
        self.now_ns = START_NS + 60_000_000_000

    def create_subscription(self, kind: Any, topic: str, callback: Any, *_: Any, **__: Any) -> str:
        self.subscriptions[topic], self.kinds[topic] = callback, kind
        return topic

    def count_publishers(self, topic: str) -> int:
        return 1

    def destroy_subscription(self, topic: str) -> None:
        del self.subscriptions[topic]

    def resolve_topic_name(self, topic: str) -> str:
        return topic if topic.startswith("/") else f"/{topic}"

    def get_publishers_info_by_topic(self, topic: str) -> list[Any]:
        """The test, and whoever it says."""
        kind = self.kinds.get(topic.lstrip("/"))
        kind_name = "" if kind is None else "/".join([*kind.__module__.split(".")[:2], kind.__name__])
        qos = QoSProfile(depth=1)
        return [
            SimpleNamespace(node_name=name, node_namespace="/", topic_type=kind_name, qos_profile=qos)
            for name in self.publishers
        ]

    def has_parameter(self, name: str) -> bool:
        return True

    def get_parameter(self, name: str) -> Any:
        """Nothing is overridden."""
        return SimpleNamespace(value=None)

    def create_timer(self, period: float, look: Callable[[], None], **_: Any) -> Callable[[], None]:
        self.timers.append(look)
        return look

    def destroy_timer(self, look: Callable[[], None]) -> None:
        self.timers.remove(look)

    def tick(self) -> None:
        """Nobody looks by himself, but when the test says so."""
        for look in self.timers:
            look()

    def get_clock(self) -> Any:
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=self.now_ns))

    def get_logger(self) -> Any:
        def note(text: str, **_: Any) -> None:
            self.log.append(text)

        return SimpleNamespace(info=note, warning=note, error=note)


class Rig:
    """Inputs, worker and a session with a tiny model; steps are waited for, so that tests see one thing at a time."""

    def __init__(self, loaded: tuple[Any, Any], **parameters: Any) -> None:
        given = {name.replace("__", "."): value for name, value in parameters.items()}
        self.parameters: dict[str, Any] = {
            **DEFAULTS, "pose.source": "pose_topic", "max_new_tokens": 4, **given
        }  # fmt: skip
        self.seconds = 1000.0
        self.node = FakeNode()
        self.fates: list[str] = []
        config = SessionConfig(
            max_new_tokens=4,
            max_depth=self.parameters["scene.max_depth"],
            key_frames=KeyFrameConfig(max_disagreement=self.parameters["scene.max_disagreement"]),
        )
        self.events = Listeners()
        self.thread, self.worker = working(new_scene(*loaded, config), events=self.events)
        self.thread.start()
        self.worker.ready.result(LIMIT)
        self.on_submit: Callable[[Any, Any], None] = self.worker.submit_frame
        self.inputs = Inputs(
            self.node,  # type: ignore[arg-type]
            self.parameters,  # type: ignore[arg-type]
            self.submit,
            None,  # type: ignore[arg-type]
            lambda: self.worker.call(lambda session: session.clear()),
            clock=lambda: self.seconds,
        )
        self.on_fate = self.done
        self.events.add(FrameTaken, lambda event: self.on_fate(event.fate))
        self.inputs.start()

    def close(self) -> None:
        self.inputs.stop()
        assert self.thread.stop(LIMIT)

    def submit(self, draw: Any, view: Any) -> None:
        """Where the inputs hand frames over; a test may put itself between, in `on_submit`."""
        self.on_submit(draw, view)

    def done(self, fate: str) -> None:
        """What follows from a frame's fate; as before, for `on_fate`."""
        self.fates.append(fate)
        self.inputs.frame_done(fate)

    # --- messages

    def messages(
        self, index: int, *, after_ns: int | None = None, size: tuple[int, int] | None = None
    ) -> dict[str, Any]:
        """Frame `index` of a camera that moves along a wall, as its messages; `after_ns` moves its stamp."""
        rgb, depth, K, T = synthetic_frame(index)
        if size is not None:
            rgb, depth = rgb[: size[1], : size[0]], depth[: size[1], : size[0]]
        height, width = depth.shape
        stamp = START_NS + (index * STEP_NS if after_ns is None else after_ns)
        found = {
            "rgb_info": info(width=width, height=height, k=K.reshape(-1).tolist()),
            "depth_info": info(width=width, height=height, k=K.reshape(-1).tolist()),
            "pose": pose_message(stamp, T),
            "rgb": image("rgb8", width, height, 3 * width, rgb.tobytes()),
            "depth": image("16UC1", width, height, 2 * width, depth.astype("<u2").tobytes()),
        }
        for name, message in found.items():
            set_header(message, stamp, "map" if name == "pose" else "camera")
        return found

    def cloud(self, index: int) -> dict[str, Any]:
        """The same frame as an organised cloud, with its pose."""
        rgb, depth, K, T = synthetic_frame(index)
        cloud = cloud_message(rgb, (depth / 1000).astype(np.float32), K)
        stamp = START_NS + index * STEP_NS
        return {"pose": pose_message(stamp, T), "points": set_header(cloud, stamp, "camera")}

    def send(self, messages: dict[str, Any]) -> None:
        """Delivers what is subscribed to and waits until all frames that came of it are done."""
        for name, message in messages.items():
            if TOPICS[name] in self.node.subscriptions:
                self.node.subscriptions[TOPICS[name]](message)
        while sum(self.inputs.fates.values()) < self.inputs.offered:
            self.worker.call(lambda session: None).result(LIMIT)

    # --- what came of it

    def report(self) -> diagnostics.Report:
        return diagnostics.inputs(self.inputs.state(), STALE_AFTER, self.parameters["diagnostics.min_rate"])

    def scene(self) -> tuple[list[int], Any]:
        """Stamps of the views, and the tokens' positions."""

        def look(session: Any) -> Any:
            session.encode_pending()
            tokens = session.tokens()
            return sorted(session.poses), np.zeros((0, 3)) if tokens is None else tokens.xyz.numpy().copy()

        return self.worker.call(look).result(LIMIT)

    def ask(self, question: Question | None = None) -> Answer:
        return self.worker.submit(question or Question("What is there?")).result.result(LIMIT)

    def counts(self) -> dict[str, int]:
        return {name: value for name, value in self.report().values.items() if isinstance(value, int)}


MakeRig = Callable[..., Rig]


def set_header(message: Any, stamp_ns: int, frame: str) -> Any:
    message.header = SimpleNamespace(stamp=ns_to_stamp(SimpleNamespace(), stamp_ns), frame_id=frame)
    return message


def check_that_all_is_well(rig: Rig, before: Any, send: Callable[[int], dict[str, Any]] | None = None) -> None:
    """What was seen before is there, the next good frame becomes a view, questions are answered, counts add up."""
    views, xyz = rig.scene()
    assert set(before[0]) <= set(views) and len(xyz) >= len(before[1])
    assert rig.ask().status == Status.TRUNCATED
    rig.send((send or rig.messages)(20))
    assert rig.fates[-1] == "key_frame" and len(rig.scene()[0]) == len(views) + 1
    assert rig.ask().stamp_ns == START_NS + 20 * STEP_NS
    assert rig.report().level == diagnostics.OK, rig.report().message
    counts = rig.counts()
    for name in [
        name.removeprefix("received.") for name in counts if f"paired.{name.removeprefix('received.')}" in counts
    ]:
        dropped = sum(count for key, count in counts.items() if key.startswith(f"dropped.{name}."))
        assert counts[f"received.{name}"] == counts[f"paired.{name}"] + counts[f"pending.{name}"] + dropped
    lost = sum(count for key, count in counts.items() if key.startswith("pairs.dropped."))
    assert counts["pairs.matched"] == counts["pairs.handed_over"] + counts["pairs.waiting"] + lost


def all_around(stamp_ns: int) -> Any:
    """A coloured cloud of a ball around the sensor: four pictures."""
    directions = np.random.default_rng(0).normal(size=(20_000, 3))
    ball = 2 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    points = np.zeros(len(ball), np.dtype([("xyz", "<f4", 3), ("pad", "<u4"), ("rgb", "<u4")]))
    points["xyz"], points["rgb"] = ball, 0xFF8040
    cloud = cloud_message(np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), np.float32), np.eye(3))
    cloud.height, cloud.width, cloud.row_step, cloud.data = 1, len(ball), 20 * len(ball), points.tobytes()
    return set_header(cloud, stamp_ns, "lidar")
