# SPDX-License-Identifier: Apache-2.0
"""Arrays and answers to messages, and the topics that they leave on. Big messages are built only for subscribers."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.msg import Box3D, LayerTokens
from adatoken3d.msg import TokenReport as TokenReportMsg
from geometry_msgs.msg import Point
from numpy.typing import NDArray
from rclpy.clock import Clock, ClockType
from rclpy.duration import Duration
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import PointCloud2, PointField
from std_msgs.msg import Header
from visualization_msgs.msg import Marker, MarkerArray

from adatoken3d_ros.engine.answer import Answer, Status, TokenReport
from adatoken3d_ros.engine.requests import LONGEST_TEXT
from adatoken3d_ros.ros.inputs.conversions import ns_to_stamp
from adatoken3d_ros.text import shown

# Latest value stays for those who come later (RViz started after the answer).
LATCHED = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)

NAME = 200  # characters of a strategy or model: both come from files and directories
FRUSTUM_DEPTH = 0.15  # metres; the frusta show where key frames were, not the lens
FRUSTUM_TAN = (0.62, 0.46)  # half width and half height over depth: a common 4:3 camera
TEXT_HEIGHT = 0.12  # metres

ACK_SECONDS = 0.005  # between two looks at whether an answer was acknowledged
# Seconds until a reader that does not acknowledge is waited for no more. Fast DDS notices by its heartbeat, every 3 s,
# that a message was lost which nothing follows.
PATIENCE = 4.0


@dataclass(frozen=True, eq=False)
class SceneView:
    """What the worker's thread tells the others about the scene, as plain arrays.

    Attributes:
        xyz: (M, 3) float32 token centroids, scene frame, metres. rgb: (M, 3) uint8. count: (M,) patches in each voxel.
        poses: {stamp_ns: (4, 4) camera-to-scene} of the key frames.
        stamp_ns: newest acquisition time, 0 for an empty scene.
    """

    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    count: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    poses: Mapping[int, NDArray[np.float64]] = field(default_factory=dict)
    stamp_ns: int = 0


def header(stamp_ns: int, frame_id: str) -> Header:
    """A header with a sensor's stamp."""
    message = Header(frame_id=frame_id)
    ns_to_stamp(message.stamp, stamp_ns)
    return message


def pack_rgb(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, 3) uint8 to the (N,) float32 that carries 0x00RRGGBB in its bits, as PCL and RViz read it."""
    wide = rgb.astype(np.uint32)
    return ((wide[:, 0] << 16) | (wide[:, 1] << 8) | wide[:, 2]).view(np.float32)


def cloud(head: Header, columns: Mapping[str, NDArray[Any]]) -> PointCloud2:
    """An unorganised cloud whose fields are all FLOAT32, little endian, in the order of `columns` (each (N,))."""
    names = list(columns)
    points = np.stack([np.asarray(columns[name], dtype="<f4") for name in names], axis=1)
    message = PointCloud2(header=head, height=1, width=len(points), is_bigendian=False, is_dense=True)
    message.fields = [
        PointField(name=name, offset=4 * i, datatype=PointField.FLOAT32, count=1) for i, name in enumerate(names)
    ]
    message.point_step = 4 * len(names)
    message.row_step = message.point_step * len(points)
    message.data.frombytes(points.tobytes())
    return message


def scene_cloud(scene: SceneView, frame_id: str) -> PointCloud2:
    """The token map: x y z rgb count."""
    x, y, z = scene.xyz.T
    columns = {"x": x, "y": y, "z": z, "rgb": pack_rgb(scene.rgb), "count": scene.count}
    return cloud(header(scene.stamp_ns, frame_id), columns)


RETAINED_FIELDS = ("x", "y", "z", "rgb", "contribution", "last_layer", "retained")


def retained_cloud(report: TokenReport, stamp_ns: int, frame_id: str) -> PointCloud2:
    """One point for each spatial token of a question: x y z rgb contribution last_layer retained."""
    columns = (*report.xyz.T, pack_rgb(report.rgb), report.contribution, report.last_layer, report.retained)
    return cloud(header(stamp_ns, frame_id), dict(zip(RETAINED_FIELDS, columns, strict=True)))


def answer_message(answer: Answer, frame_id: str, now_ns: int) -> AnswerMsg:
    """An Answer as its message.

    Args:
        answer: the answer.
        frame_id: scene frame.
        now_ns: the node's time, for the age of the data; 0 if simulated time has not begun.
    """
    times = answer.times
    message = AnswerMsg(
        header=header(answer.stamp_ns, frame_id),
        # Longer ones were refused, and need not be carried to everybody.
        question=answer.question.text[:LONGEST_TEXT],
        text=answer.text,
        status=int(answer.status),
        status_message=shown(answer.status_message),
        data_age=(now_ns - answer.stamp_ns) / 1e9 if answer.stamp_ns and now_ns else math.nan,
        queue_ms=times.queue,
        encode_ms=times.encode,
        tokens_ms=times.tokens,
        prefill_ms=times.prefill,
        decode_ms=times.decode,
        total_ms=times.total,
        latency_budget_ms=float(answer.question.latency_budget_ms or 0.0),
        budget_met=answer.budget_met,
        spatial_tokens=answer.spatial_tokens,
        retained_tokens=answer.retained_tokens,
        prefill_flops=float(answer.prefill_flops),
        prefill_flops_unpruned=float(answer.prefill_flops_unpruned),
        strategy=shown(answer.strategy, NAME),
        model_id=shown(answer.model_id, NAME),
        seed=answer.seed,
        plan=answer.plan,
        predicted_ms=math.nan if answer.predicted is None else answer.predicted.total,
    )
    for box in answer.boxes:
        item = Box3D()
        item.center.position.x, item.center.position.y, item.center.position.z = box.centre
        item.size.x, item.size.y, item.size.z = box.size
        message.boxes.append(item)
    return message


def report_message(answer: Answer, report: TokenReport, frame_id: str) -> TokenReportMsg:
    """Where the tokens of an answer went, layer by layer."""
    return TokenReportMsg(
        header=header(answer.stamp_ns, frame_id),
        question=answer.question.text,
        strategy=shown(answer.strategy, NAME),
        model_id=shown(answer.model_id, NAME),
        spatial_tokens=answer.spatial_tokens,
        retained_tokens=answer.retained_tokens,
        layers=[
            LayerTokens(layer=layer, spatial_tokens=int(tokens), flops=float(flops))
            for layer, (tokens, flops) in enumerate(zip(report.spatial_per_layer, report.flops_per_layer, strict=True))
        ],
        prefill_flops=float(answer.prefill_flops),
        prefill_flops_unpruned=float(answer.prefill_flops_unpruned),
        lorenz_share_60=float(report.lorenz_share_60),
    )


def markers(answer: AnswerMsg | None, scene: SceneView, frame_id: str) -> MarkerArray:
    """Everything that RViz should show: the answer's text over the scene, its boxes, and where the key frames were."""
    head = header(scene.stamp_ns, frame_id)
    array = MarkerArray(markers=[Marker(header=head, action=Marker.DELETEALL)])
    if scene.poses:
        views = _marker(head, "views", 0, Marker.LINE_LIST, (0.2, 0.6, 1.0, 0.8))
        views.scale.x = 0.005
        corners = np.concatenate([_frustum(T) for T in scene.poses.values()])
        views.points = [Point(x=x, y=y, z=z) for x, y, z in corners.tolist()]
        array.markers.append(views)
    if answer is None or answer.status not in (Status.OK, Status.TRUNCATED):
        return array
    for i, box in enumerate(answer.boxes):
        cube = _marker(answer.header, "boxes", i, Marker.CUBE, (1.0, 0.6, 0.1, 0.35))
        cube.pose, cube.scale = box.center, box.size
        array.markers.append(cube)
    if len(scene.xyz):
        text = _marker(answer.header, "answer", 0, Marker.TEXT_VIEW_FACING, (1.0, 1.0, 1.0, 1.0))
        middle = (scene.xyz.min(axis=0) + scene.xyz.max(axis=0)) / 2.0
        text.pose.position.x, text.pose.position.y = float(middle[0]), float(middle[1])
        text.pose.position.z = float(scene.xyz[:, 2].max()) + 2 * TEXT_HEIGHT
        text.scale.z = TEXT_HEIGHT
        text.text = answer.text
        array.markers.append(text)
    return array


def _marker(head: Header, namespace: str, number: int, kind: int, rgba: tuple[float, float, float, float]) -> Marker:
    marker = Marker(header=head, ns=namespace, id=number, type=kind, action=Marker.ADD)
    marker.pose.orientation.w = 1.0
    marker.color.r, marker.color.g, marker.color.b, marker.color.a = rgba
    return marker


def _frustum(T: NDArray[np.float64]) -> NDArray[np.float64]:
    """The 8 edges of a camera's pyramid as (16, 3) line ends in the scene frame."""
    x, y = FRUSTUM_TAN
    apex = np.zeros(3)
    corners = FRUSTUM_DEPTH * np.array([[-x, -y, 1.0], [x, -y, 1.0], [x, y, 1.0], [-x, y, 1.0]])
    ends = [end for i in range(4) for end in (apex, corners[i], corners[i], corners[(i + 1) % 4])]
    return np.stack(ends) @ T[:3, :3].T + T[:3, 3]


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
    """The node's output topics. Methods may be called from any thread."""

    def __init__(self, node: Node) -> None:
        self._answer = EachHeard(node, AnswerMsg, "~/answer")
        self._scene_tokens = Latched(node, PointCloud2, "~/scene_tokens")
        self._retained_tokens = Latched(node, PointCloud2, "~/retained_tokens")
        self._token_report = Latched(node, TokenReportMsg, "~/token_report")
        self._markers = Latched(node, MarkerArray, "~/markers")
        self._last: AnswerMsg | None = None
        self.scene = SceneView()

    def publish_answer(self, answer: Answer, frame_id: str, now_ns: int) -> AnswerMsg:
        """Sends an answer and all that belongs to it; returns the message."""
        message = answer_message(answer, frame_id, now_ns)
        self._last = message
        report = answer.report
        # First what belongs to the answer, so that it is there when somebody reacts to the answer.
        if report is not None:
            self._retained_tokens.offer(lambda: retained_cloud(report, answer.stamp_ns, frame_id))
            self._token_report.offer(lambda: report_message(answer, report, frame_id))
        self._offer_markers(frame_id)
        self._answer.publish(message)
        return message

    @property
    def waiting(self) -> int:
        """Answers that wait until those before are heard."""
        return self._answer.waiting

    def flush(self) -> None:
        """Sends the answers that wait."""
        self._answer.flush()

    def publish_scene(self, scene: SceneView, frame_id: str) -> None:
        """Offers the token map and the key frames."""
        self.scene = scene
        self._scene_tokens.offer(lambda: scene_cloud(scene, frame_id))
        self._offer_markers(frame_id)

    def _offer_markers(self, frame_id: str) -> None:
        """Of the answer and the scene as they are when somebody looks: both may be replaced by different threads."""
        self._markers.offer(lambda: markers(self._last, self.scene, frame_id))

    def forget_answer(self, frame_id: str) -> None:
        """Takes the last answer out of the markers and its tokens out of sight, after the scene was cleared."""
        if self._last is not None:
            self._last = None
            nothing = np.zeros(0)
            self._retained_tokens.offer(lambda: cloud(header(0, frame_id), dict.fromkeys(RETAINED_FIELDS, nothing)))

    def serve(self) -> None:
        """Looks for those who came late; call it now and then."""
        self._answer.serve()
        for topic in (self._scene_tokens, self._retained_tokens, self._token_report, self._markers):
            topic.serve()
