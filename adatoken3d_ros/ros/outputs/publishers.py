# SPDX-License-Identifier: Apache-2.0
"""The topics that answers and scenes leave on. Big messages are built only for subscribers."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.msg import KeyFrames
from adatoken3d.msg import TokenReport as TokenReportMsg
from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import PointCloud2
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.engine.events import Answered, KeyFramesShown, Listeners, SceneReplaced, SceneView
from adatoken3d_ros.ros.outputs.markers import markers
from adatoken3d_ros.ros.outputs.messages import (
    RETAINED_FIELDS,
    answer_message,
    cloud,
    header,
    key_frames_message,
    report_message,
    retained_cloud,
    scene_cloud,
)

# Latest value stays for those who come later (RViz started after the answer).
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
LATE_JOINER_PERIOD = 0.25  # seconds between two looks for subscribers that came late
ACK_SECONDS = 0.005  # between two looks at whether an answer was acknowledged
# Seconds until a reader that does not acknowledge is waited for no more. Fast DDS notices by its heartbeat, every 3 s,
# that a message was lost which nothing follows.
PATIENCE = 4.0


class Latched:
    """A latched topic whose message is built only once somebody listens."""

    def __init__(self, node: Node, kind: Any, topic: str) -> None:
        self._publisher = node.create_publisher(kind, topic, LATCHED)
        self._build: Callable[[], Any] | None = None
        self._lock = threading.Lock()

    def offer(self, build: Callable[[], Any]) -> None:
        """Replaces the latest value; `build` is called now if somebody listens, else when somebody does."""
        with self._lock:
            self._build = build
        self.serve()

    def serve(self) -> None:
        """Publishes the latest value if it is due and somebody listens."""
        with self._lock:
            if self._build is None or self._publisher.get_subscription_count() == 0:
                return
            build, self._build = self._build, None
            self._publisher.publish(build())


class EachHeard:
    """A latched topic, whose depth of 1 gives late joiners the latest message, on which none overtakes the one before.

    A message waits until every reliable reader has acknowledged the one before; who does not within PATIENCE is waited
    for no more until it has caught up. At most `most` messages wait: then the oldest is sent without waiting.

    Args:
        node: that publishes.
        kind: of the messages. topic: its name.
        most: messages that may wait.
        clock: seconds, monotonic.
    """

    def __init__(
        self, node: Node, kind: Any, topic: str, most: int = 1000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._publisher = node.create_publisher(kind, topic, LATCHED)
        self._due: deque[Any] = deque()
        self._most = most
        self._clock = clock
        self._sent_at = -math.inf
        self._lagging = False
        self._lock = threading.RLock()
        self._timer = node.create_timer(ACK_SECONDS, self.serve, clock=Clock(clock_type=ClockType.STEADY_TIME))
        self._timer.cancel()

    @property
    def waiting(self) -> int:
        """Messages that are not sent yet."""
        return len(self._due)

    def publish(self, message: Any) -> None:
        """Sends the message, or has it wait for its turn."""
        with self._lock:
            self._due.append(message)
            if len(self._due) > self._most:
                self._send()
            self.serve()
            if self._due:
                self._timer.reset()

    def serve(self) -> None:
        """Sends what may be sent."""
        with self._lock:
            while self._due and self._all_heard():
                self._send()
            # To those who lag one at a time: the others are given the time to hear it.
            if self._due and self._clock() - self._sent_at >= (ACK_SECONDS if self._lagging else PATIENCE):
                self._lagging = True
                self._send()
            if not self._due:
                self._timer.cancel()

    def flush(self) -> None:
        """Sends everything now; nobody will be there to wait."""
        with self._lock:
            while self._due:
                self._send()

    def _send(self) -> None:
        self._sent_at = self._clock()
        self._publisher.publish(self._due.popleft())

    def _all_heard(self) -> bool:
        try:
            heard = self._publisher.wait_for_all_acked(Duration())
        except Exception:  # a middleware that cannot tell
            return True
        self._lagging = self._lagging and not heard
        return bool(heard)


class Publishers:
    """The node's output topics: listens for answers and scenes, in whatever thread they come.

    Args:
        node: publishes. group: of the timer in which late subscribers are served.
        events: where answers and scenes are told.

    Attributes:
        scene: the newest.
    """

    def __init__(self, node: Node, group: CallbackGroup | None, events: Listeners) -> None:
        self._answer = EachHeard(node, AnswerMsg, "~/answer")
        self._scene_tokens = Latched(node, PointCloud2, "~/scene_tokens")
        self._retained_tokens = Latched(node, PointCloud2, "~/retained_tokens")
        self._token_report = Latched(node, TokenReportMsg, "~/token_report")
        self._markers = Latched(node, MarkerArray, "~/markers")
        self._key_frames = Latched(node, KeyFrames, "~/key_frames")
        # By itself it goes to no robot: who wants that remaps it to the goal topic of the robot's navigation.
        self._goal = node.create_publisher(PoseStamped, "~/goal", 1)
        self._last: AnswerMsg | None = None
        self.scene = SceneView()
        # Steady: simulated time may stand still, this must not.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        node.create_timer(LATE_JOINER_PERIOD, self._serve, clock=clock, callback_group=group)
        events.add(Answered, self._on_answer).add(SceneReplaced, self._on_replaced).add(SceneView, self._on_scene)
        events.add(KeyFramesShown, lambda event: self._key_frames.offer(lambda: key_frames_message(event)))

    @property
    def waiting(self) -> int:
        """Answers that wait until those before are heard."""
        return self._answer.waiting

    def flush(self) -> None:
        """Sends the answers that wait."""
        self._answer.flush()

    def _serve(self) -> None:
        """Looks for those who came late."""
        self._answer.serve()
        topics = (self._scene_tokens, self._retained_tokens, self._token_report, self._markers, self._key_frames)
        for topic in topics:
            topic.serve()

    def _on_answer(self, event: Answered) -> None:
        """An answer and all that belongs to it."""
        answer, report, frame_id = event.answer, event.answer.report, event.frame_id
        message = answer_message(answer, frame_id, event.now_ns)
        self._last = message
        # First what belongs to the answer, so that it is there when somebody reacts to the answer.
        if report is not None:
            self._retained_tokens.offer(lambda: retained_cloud(report, answer.stamp_ns, frame_id))
            self._token_report.offer(lambda: report_message(answer, report, frame_id))
        self._offer_markers()
        if message.goal_near.header.frame_id:
            self._goal.publish(message.goal_near)
        self._answer.publish(message)

    def _on_scene(self, scene: SceneView) -> None:
        """The token map and the key frames."""
        self.scene = scene
        self._scene_tokens.offer(lambda: scene_cloud(scene))
        self._offer_markers()

    def _on_replaced(self, event: SceneReplaced) -> None:
        """Takes the last answer out of the markers, with the scene that follows, and its tokens out of sight."""
        if self._last is not None:
            self._last = None
            nothing = dict.fromkeys(RETAINED_FIELDS, np.zeros(0))
            self._retained_tokens.offer(lambda: cloud(header(0, event.frame_id), nothing))

    def _offer_markers(self) -> None:
        """Of the answer and the scene as they are when somebody looks: both may be replaced by different threads."""
        self._markers.offer(lambda: markers(self._last, self.scene))
