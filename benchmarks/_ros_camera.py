# SPDX-License-Identifier: Apache-2.0
"""A camera or a lidar with made-up contents, so that the time goes into the messages: a process of its own.

Publishes at a steady rate from the moment that everybody listens, waits until all is acknowledged, and writes what it
sent as JSON: `python -m benchmarks._ros_camera --kind images --rate 30 --seconds 60 --json F`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from geometry_msgs.msg import PoseStamped
from rclpy.duration import Duration
from rclpy.node import Node
from sensor_msgs.msg import CameraInfo, Image, PointCloud2, PointField

from adatoken3d_ros.ros.outputs.fill import fill_camera_info, fill_image, fill_pose, ns_to_stamp
from benchmarks._ros import write

KINDS = ("images", "cloud")
VARIANTS = 4  # different contents, in turn
ATTEMPTS = 50  # at publishing one message
ACKNOWLEDGED = 20.0  # seconds that the last messages may take


class Camera:
    """Publishes pictures of a wall 2 m ahead, or clouds of what is all around, from a sensor that moves along y.

    Args:
        kind: `images` (rgb8, 16UC1, both CameraInfo) or `cloud` (float x y z rgb, not organised).
        width, height: of the images. points: of a cloud.
        speed: metres a second.
    """

    def __init__(self, node: Node, kind: str, *, width: int, height: int, points: int, speed: float) -> None:
        self._speed = speed
        self._pose = node.create_publisher(PoseStamped, "/pose", 100)
        self.counts: dict[str, int] = {}
        self.repeated = 0
        rng = np.random.default_rng(0)
        focal = 0.8 * width
        K = np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])
        info = fill_camera_info(CameraInfo(), K, width, height)
        made: dict[str, tuple[Any, list[Any]]] = {}  # in the order of publishing
        if kind == "images":
            smooth = rng.integers(0, 255, (VARIANTS, height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            rgb = smooth.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width]
            depth = rng.integers(1980, 2020, (VARIANTS, height, width)).astype(np.uint16)
            made["rgb/camera_info"] = CameraInfo, [info]
            made["depth/camera_info"] = CameraInfo, [info]
            made["rgb/image"] = Image, [fill_image(Image(), pixels, "rgb8") for pixels in rgb]
            made["depth/image"] = Image, [fill_image(Image(), pixels, "16UC1") for pixels in depth]
        else:
            made["points"] = PointCloud2, [cloud(rng, points) for _ in range(VARIANTS)]
        self._messages = {name: messages for name, (_, messages) in made.items()}
        self._publishers = {name: node.create_publisher(of, f"/{name}", 10) for name, (of, _) in made.items()}

    def matched(self) -> bool:
        """Whether everybody listens."""
        return all(publisher.get_subscription_count() for publisher in (self._pose, *self._publishers.values()))

    def send(self, index: int, seconds: float, spoilt: Mapping[str, Any] | None = None) -> None:
        """One view under one stamp, the pose first; `seconds` since the sensor began to move.

        Args:
            spoilt: {field: value} of the image or cloud, for one that is malformed.
        """
        stamp_ns = time.time_ns()
        pose = PoseStamped()
        pose.header.frame_id = "map"
        T = np.eye(4)
        T[:3, :3] = np.array([[0.0, 0.0, 1.0], [-1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
        T[:3, 3] = (0.0, self._speed * seconds, 1.0)
        fill_pose(pose.pose, T)
        ns_to_stamp(pose.header.stamp, stamp_ns)
        self._publish(self._pose, pose)
        self.counts["pose"] = self.counts.get("pose", 0) + 1
        for name, messages in self._messages.items():
            message = messages[index % len(messages)]
            kept = {field: getattr(message, field) for field in spoilt or {} if hasattr(message, field)}
            for field in kept:
                setattr(message, field, (spoilt or {})[field])
            message.header.frame_id = "camera"
            ns_to_stamp(message.header.stamp, stamp_ns)
            self._publish(self._publishers[name], message)
            self.counts[name] = self.counts.get(name, 0) + 1
            for field, value in kept.items():
                setattr(message, field, value)

    def _publish(self, publisher: Any, message: Any) -> Any:
        """Again where the middleware gives up: a reliable publisher does after 0.1 s if nobody takes its messages."""
        for _ in range(ATTEMPTS - 1):
            try:
                return publisher.publish(message)
            except RuntimeError:
                self.repeated += 1
        return publisher.publish(message)

    def acknowledged(self) -> bool:
        """Waits until everything has arrived."""
        return all(p.wait_for_all_acked(Duration(seconds=ACKNOWLEDGED)) for p in self._publishers.values())


def cloud(rng: np.random.Generator, n: int) -> Any:
    """A coloured PointCloud2 of n points on a ball of 2 m around the sensor, in no order."""
    directions = rng.normal(size=(n, 3))
    points = np.zeros(n, np.dtype([("xyz", "<f4", 3), ("rgb", "<u4")]))
    points["xyz"] = 2.0 * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    points["rgb"] = rng.integers(0, 2**24, n)
    message = PointCloud2(height=1, width=n, point_step=16, row_step=16 * n, is_dense=True)
    kind = PointField.FLOAT32
    fields = enumerate(("x", "y", "z", "rgb"))
    message.fields = [PointField(name=name, offset=4 * i, datatype=kind, count=1) for i, name in fields]
    message.data.frombytes(points.tobytes())
    return message


def publish(camera: Camera, rate: float, seconds: float, spin: Callable[[float], object]) -> dict[str, Any]:
    """Sends for some seconds at a steady rate; what is late is sent at once. Returns what was sent and how steadily."""
    began, index, latest = time.monotonic(), 0, 0.0
    while (due := index / rate) < seconds:
        while (ahead := due - (time.monotonic() - began)) > 0:
            spin(ahead)
        latest = max(latest, -ahead)
        camera.send(index, due)
        index += 1
    return {
        "sent": camera.counts,
        "seconds": time.monotonic() - began,
        "latest_ms": 1e3 * latest,
        "repeated": camera.repeated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Publishes for some seconds what a camera or a lidar would.")
    parser.add_argument("--kind", choices=KINDS, default="images")
    parser.add_argument("--rate", type=float, default=30.0, help="hertz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--points", type=int, default=300_000)
    parser.add_argument("--speed", type=float, default=0.25, help="of the sensor, metres a second")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rclpy.init(args=[])
    try:
        node = rclpy.create_node("benchmark_camera")
        size = {name: getattr(args, name) for name in ("width", "height", "points", "speed")}
        camera = Camera(node, args.kind, **size)
        while not camera.matched():
            rclpy.spin_once(node, timeout_sec=0.05)
        figures = publish(camera, args.rate, args.seconds, time.sleep)
        figures["acknowledged"] = camera.acknowledged()
    finally:
        rclpy.try_shutdown()
    write(args.json, figures)


if __name__ == "__main__":
    main()
