# SPDX-License-Identifier: Apache-2.0
"""Storms on the node's topics: spoilt messages of every kind, wild stamps and names, two cameras on one topic."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from geometry_msgs.msg import PoseStamped
from sensor_msgs.msg import CameraInfo, Image
from std_msgs.msg import String

from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from benchmarks._hostile import ACCEPTED, Outcome
from benchmarks._hostile_messages import ENCODINGS, MODELS, SHAPES, SIZES, number
from benchmarks._ros_hostile_node import Target

NAMES = ["", "camera", "other", "map", "a\n[FATAL] b", "\x1b[31m", "x" * 100_000]
TOPICS: dict[str, Any] = {
    "rgb/image": Image, "depth/image": Image, "rgb/camera_info": CameraInfo, "depth/camera_info": CameraInfo,
    "pose": PoseStamped,
}  # fmt: skip


def storm(target: Target, rng: random.Random) -> Iterator[Outcome]:
    """Spoilt messages between good ones of a second camera, whose clock is off, and questions all the while."""
    publishers = {topic: target.node.create_publisher(kind, f"/{topic}", 10) for topic, kind in TOPICS.items()}
    second = target.second if rng.random() < 0.5 else None
    target.spin(lambda: all(p.get_subscription_count() for p in publishers.values()), 10.0)
    off, gap = rng.choice([0.0, 1.5, -1.5, 5.0]), rng.choice([0.0, 0.0, 0.02])
    try:
        for index in range(rng.choice([20, 100])):
            topic = rng.choice([*TOPICS])
            message = spoilt(TOPICS[topic], rng, time.time_ns() + round(1e9 * off))
            _publish(publishers[topic], message)
            if second is not None:
                second.send(index, 0.1 * index)
            if rng.random() < 0.1:
                target.question.publish(String(data="What is there?"))
            target.spin(lambda: False, gap) if gap else None
            yield Outcome(0, ACCEPTED)
        target.spin(lambda: False, 0.3)
    finally:
        for publisher in publishers.values():
            target.node.destroy_publisher(publisher)


def spoilt(kind: Any, rng: random.Random, stamp_ns: int) -> Any:
    message = kind()
    message.header.frame_id = rng.choice(NAMES)
    if rng.random() < 0.2:
        stamp_ns = rng.choice([0, 1, 2**31 * 10**9 - 1, stamp_ns - 10**12, stamp_ns + 10**10, stamp_ns + 10**9])
    ns_to_stamp(message.header.stamp, max(0, min(stamp_ns, 2**31 * 10**9 - 1)))
    if kind is PoseStamped:
        for part, axes in ((message.pose.position, "xyz"), (message.pose.orientation, "xyzw")):
            for axis in axes:
                setattr(part, axis, number(rng) if rng.random() < 0.3 else 0.5)
        return message
    width, height = rng.choice([*SHAPES, (64, 48), (64, 48)])
    message.width, message.height = width, height
    if kind is Image:
        depth = rng.random() < 0.5
        message.encoding = (
            ("16UC1" if depth else "rgb8") if rng.random() < 0.7 else rng.choice(ENCODINGS).replace("\0", "")
        )
        message.step = width * (2 if depth else 3) if rng.random() < 0.8 else rng.choice(SIZES)
        message.data = rng.randbytes(min(message.step * height, 10**6) if rng.random() < 0.8 else rng.randrange(100))
    else:
        message.distortion_model = rng.choice([*MODELS, "a\n[FATAL] b"])
        message.d = [number(rng)] * rng.choice([0, 4, 5, 8, 12, 14, 3, 300_000])
        message.k = [number(rng) if rng.random() < 0.3 else float(i % 4 == 0) * 50 for i in range(9)]
        message.p = [number(rng) if rng.random() < 0.3 else float(i % 5 == 0) * 50 for i in range(12)]
        message.binning_x = rng.choice(SIZES)
    return message


def _publish(publisher: Any, message: Any) -> None:
    try:
        publisher.publish(message)
    except RuntimeError:
        """The middleware gives up after 0.1 s where a reader is slow: that message is not sent."""
