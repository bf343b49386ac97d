# SPDX-License-Identifier: Apache-2.0
"""Plays a bag with its times on /clock, once, when somebody listens: `python -m examples.robot.play BAG`.

What `ros2 bag play --clock 100` does, for machines without it. Images leave as drivers send them, best effort; static
transforms are latched.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path
from typing import Any

import rclpy
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_typestore
from rosgraph_msgs.msg import Clock

from adatoken3d_ros.ros.outputs.fill import ns_to_stamp
from examples.robot.robot_bag import DEPTH, KINDS, RGB

CLOCK_PERIOD_NS = 10_000_000
AT_REST_S = 0.5  # a node that listens finds its topics one after the other


def profile(topic: str) -> QoSProfile:
    """As the topic's usual publisher offers it."""
    if topic == "/tf_static":
        return QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    reliable = not topic.startswith("/camera/")
    return QoSProfile(
        depth=100 if reliable else 5,
        reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
    )


def message_class(kind: str) -> Any:
    package, _, name = kind.split("/")
    return getattr(importlib.import_module(f"{package}.msg"), name)


def wait_for_listeners(node: Any, needed: list[Any], every: list[Any]) -> None:
    """Until the `needed` publishers have a subscriber, and for AT_REST_S nobody new has come to any."""
    counts: list[int] = []
    since = time.monotonic()
    while not all(one.get_subscription_count() for one in needed) or time.monotonic() < since + AT_REST_S:
        rclpy.spin_once(node, timeout_sec=0.05)
        found = [one.get_subscription_count() for one in every]
        if found != counts:
            counts, since = found, time.monotonic()


def play(path: Path, rate: float) -> None:
    """Waits until whoever wants the images has found all topics, then plays."""
    node = rclpy.create_node("player")
    publishers = {
        topic: node.create_publisher(message_class(kind), topic, profile(topic)) for topic, kind in KINDS.items()
    }
    clock = node.create_publisher(Clock, "/clock", 10)
    wait_for_listeners(node, [publishers[RGB], publishers[DEPTH]], [*publishers.values(), clock])
    with AnyReader([path], default_typestore=get_typestore(Stores.ROS2_KILTED)) as reader:
        begin = now = reader.start_time
        real = time.monotonic_ns()
        for connection, came, raw in reader.messages():
            while now < came:
                now = min(came, now + CLOCK_PERIOD_NS)
                time.sleep(max(0, real + (now - begin) / rate - time.monotonic_ns()) / 1e9)
                message = Clock()
                ns_to_stamp(message.clock, now)
                clock.publish(message)
            publishers[connection.topic].publish(bytes(raw))
    print("played", flush=True)
    # What is reliable is sent again from here until it has arrived; simulated time stands still.
    while rclpy.ok() and publishers[RGB].get_subscription_count():
        rclpy.spin_once(node, timeout_sec=0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("bag", type=Path)
    parser.add_argument("--rate", type=float, default=1.0, help="of the bag's time (%(default)s)")
    args = parser.parse_args(rclpy.utilities.remove_ros_args()[1:])
    rclpy.init()
    try:
        play(args.bag, args.rate)
    except (KeyboardInterrupt, rclpy.executors.ExternalShutdownException):
        pass
    finally:
        rclpy.try_shutdown()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
