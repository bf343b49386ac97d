# SPDX-License-Identifier: Apache-2.0
"""What a node publishes of its scene and its answers, as arrays, for who has no ROS of their own."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from adatoken3d.msg import TokenReport as TokenReportMsg
from numpy.typing import NDArray
from rclpy.qos import QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import Image, PointCloud2
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.engine.answer import TokenReport
from adatoken3d_ros.ros.client import SceneClient
from adatoken3d_ros.ros.inputs.conversions import ConversionError, image_to_rgb, stamp_to_ns
from adatoken3d_ros.ros.outputs.publishers import LATCHED

IMAGES = 48  # of each topic that are kept until it is known which is a key frame
POSES = 16  # points of a frustum's lines
_CAMERA = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)


@dataclass(frozen=True, eq=False)
class Seen:
    """The scene as the node published it last.

    Attributes:
        xyz: (M, 3) float32 scene frame, metres. rgb: (M, 3) uint8. count: (M,) float32 patches.
        stamp_ns: of the newest view. poses: (V, 4, 4) camera to scene.
        pictures: {stamp: (pose, (h, w, 3) uint8)} of the key frames whose images came by.
    """

    xyz: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    rgb: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    count: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    stamp_ns: int = 0
    poses: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4, 4)))
    pictures: dict[int, tuple[NDArray[np.float64], NDArray[np.uint8]]] = field(default_factory=dict)


class SceneWatcher:
    """Listens to a node by a client, whose thread runs what is here.

    Key frames are found by their stamps: the scene's newest is in the header of its tokens, and its pose is the last of
    the markers' frusta. What came before this began to listen has no picture.

    Args:
        client: of the node.
        shrink: makes a picture small.

    Attributes:
        seen: the newest scene; another object where it has changed.
    """

    def __init__(self, client: SceneClient, shrink: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]) -> None:
        self.seen = Seen()
        self._client, self._shrink = client, shrink
        self._images: dict[str, deque[Image]] = {}
        self._poses_ns = 0  # newest view when the poses were published
        self._retained: PointCloud2 | None = None
        self._report: TokenReportMsg | None = None
        self._changed = threading.Condition()
        subscribe: Any = client.node.create_subscription
        subscribe(PointCloud2, f"{client.name}/scene_tokens", self._on_scene, LATCHED)
        subscribe(MarkerArray, f"{client.name}/markers", self._on_markers, LATCHED)
        subscribe(PointCloud2, f"{client.name}/retained_tokens", self._on_retained, LATCHED)
        subscribe(TokenReportMsg, f"{client.name}/token_report", self._on_report, LATCHED)
        self._timer = client.node.create_timer(1.0, self._find_images)

    def report_of(self, answer: Any, timeout: float = 3.0) -> TokenReport | None:
        """What became of the tokens of an adatoken3d/msg/Answer, once it is there; None if it does not come."""

        def there() -> bool:
            cloud, report = self._retained, self._report
            if cloud is None or report is None:
                return False
            same = cloud.header.stamp == report.header.stamp == answer.header.stamp
            counts = (cloud.width, report.spatial_tokens, report.retained_tokens)
            asked = (answer.spatial_tokens, answer.spatial_tokens, answer.retained_tokens)
            names = (report.question, report.strategy) == (answer.question, answer.strategy)
            return same and counts == asked and names

        if not answer.spatial_tokens or not answer.prefill_flops:
            return None
        with self._changed:
            if not self._changed.wait_for(there, timeout):
                return None
            cloud, report = self._retained, self._report
        assert cloud is not None and report is not None
        columns = _columns(cloud)
        return TokenReport(
            _xyz(columns),
            _rgb(columns),
            columns["contribution"],
            columns["last_layer"].astype(np.int64),
            columns["retained"] > 0.5,
            tuple(layer.spatial_tokens for layer in report.layers),
            tuple(layer.flops for layer in report.layers),
            report.lorenz_share_60,
        )

    def forget_report(self) -> None:
        """What comes from now on is of the next answer: another question may have had the same text and counts."""
        with self._changed:
            self._report = self._retained = None

    # In the client's thread:

    def _on_scene(self, message: PointCloud2) -> None:
        columns, stamp = _columns(message), stamp_to_ns(message.header.stamp)
        old = self.seen
        pictures = old.pictures if len(columns["x"]) else {}
        self.seen = Seen(_xyz(columns), _rgb(columns), columns["count"], stamp, old.poses, dict(pictures))
        self._match()

    def _on_markers(self, message: MarkerArray) -> None:
        views = next((marker for marker in message.markers if marker.ns == "views"), None)
        points = np.array([(p.x, p.y, p.z) for p in views.points] if views else [], dtype=np.float64).reshape(-1, 3)
        old = self.seen
        poses = poses_of(points)
        self._poses_ns = 0 if views is None else stamp_to_ns(views.header.stamp)
        kept = {stamp: one for stamp, one in old.pictures.items() if _is_among(one[0], poses)}
        self.seen = Seen(old.xyz, old.rgb, old.count, old.stamp_ns, poses, kept)
        self._match()

    def _match(self) -> None:
        """Finds the image of the newest key frame."""
        seen = self.seen
        if not len(seen.poses) or self._poses_ns != seen.stamp_ns or seen.stamp_ns in seen.pictures:
            return
        for images in self._images.values():
            found = next((image for image in images if stamp_to_ns(image.header.stamp) == seen.stamp_ns), None)
            if found is None:
                continue
            try:
                rgb = self._shrink(np.ascontiguousarray(image_to_rgb(found)))
            except ConversionError:
                continue  # depth
            pictures = {**seen.pictures, seen.stamp_ns: (seen.poses[-1], rgb)}
            self.seen = Seen(seen.xyz, seen.rgb, seen.count, seen.stamp_ns, seen.poses, pictures)
            return

    def _find_images(self) -> None:
        """Listens to the image topics that the node listens to; its launch may have given them any name."""
        namespace, _, name = self._client.name.rpartition("/")
        try:
            topics = self._client.node.get_subscriber_names_and_types_by_node(name, namespace or "/")
        except Exception:  # no such node yet
            return
        for topic, kinds in topics:
            if "sensor_msgs/msg/Image" in kinds and topic not in self._images:
                images: deque[Image] = deque(maxlen=IMAGES)
                self._images[topic] = images
                keep = partial(_keep, images)
                self._client.node.create_subscription(Image, topic, keep, _CAMERA)

    def _on_retained(self, message: PointCloud2) -> None:
        with self._changed:
            self._retained = message
            self._changed.notify_all()

    def _on_report(self, message: TokenReportMsg) -> None:
        with self._changed:
            self._report = message
            self._changed.notify_all()


def _keep(images: deque[Image], message: Image) -> None:
    images.append(message)


def poses_of(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """(V, 4, 4) poses of cameras whose frusta are drawn by these line ends (16 V, 3), see `outputs.markers`."""
    ends = points.reshape(-1, POSES, 3)
    apex, first, second, third = ends[:, 0], ends[:, 1], ends[:, 3], ends[:, 7]
    poses = np.tile(np.eye(4), (len(ends), 1, 1))
    poses[:, :3, 3] = apex
    poses[:, :3, 0] = _unit(second - first)
    poses[:, :3, 1] = _unit(third - second)
    poses[:, :3, 2] = np.cross(poses[:, :3, 0], poses[:, :3, 1])
    return poses


def _unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    unit: NDArray[np.float64] = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit


def _is_among(pose: NDArray[np.float64], poses: NDArray[np.float64]) -> bool:
    return bool(len(poses)) and bool((np.abs(poses - pose).max(axis=(1, 2)) < 1e-6).any())


def _columns(cloud: PointCloud2) -> dict[str, NDArray[np.float32]]:
    """The fields of a cloud that `outputs.messages.cloud` made, by their names."""
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.width, cloud.point_step)
    return {one.name: raw[:, one.offset : one.offset + 4].copy().view("<f4")[:, 0] for one in cloud.fields}


def _xyz(columns: dict[str, NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.stack([columns[axis] for axis in "xyz"], axis=1)


def _rgb(columns: dict[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
    packed = columns["rgb"].view(np.uint32)
    return np.stack([packed >> 16, packed >> 8, packed], axis=1).astype(np.uint8)
