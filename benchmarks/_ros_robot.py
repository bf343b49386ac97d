# SPDX-License-Identifier: Apache-2.0
"""A robot's bag played to the node from another process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import rclpy
from adatoken3d.msg import Answer
from numpy.typing import NDArray
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import PointCloud2

from adatoken3d_ros.ros.outputs.publishers import LATCHED
from benchmarks._ros import NAME, WAIT, Bench
from examples.robot import robot_bag

REMAPS = {
    "rgb/image": robot_bag.RGB,
    "rgb/camera_info": robot_bag.RGB_INFO,
    "depth/image": robot_bag.DEPTH,
    "depth/camera_info": robot_bag.DEPTH_INFO,
    "pose": "/camera_pose",
}


def of_node(
    bag: Path, model: Path, source: str, question: str, *, rate: float, show: bool
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Tokens (M, 3) and figures of a bag played to the node, which answers as soon as it has seen something."""
    frame = "odom" if source == "odometry" else "map"
    parameters = {"pose__source": source, "scene__frame_id": frame, "use_sim_time": True, "max_new_tokens": 16}
    began = time.monotonic()
    with Bench(model, show=show, remaps=REMAPS, qos__reliability="best_effort", **parameters) as bench:
        bench.python("player", "examples.robot.play", str(bag), "--rate", str(rate))
        bench.wait(lambda: int(bench.counters().get("frames.key_frame", 0)), "a key frame")
        bench.client.ask(question)
        first = time.monotonic() - began
        values = bench.settled({"received.rgb/image": 1}, timeout=WAIT)
        xyz = tokens_of_node()
        answer = bench.client.ask(question)
    return xyz, {
        "answered": answer.status in (Answer.OK, Answer.TRUNCATED, Answer.UNSURE),
        "answer": answer.text,
        "first_answer_s": round(first, 2),
        "key_frames": int(values.get("frames.key_frame", 0)),
        "received": int(values.get("received.rgb/image", 0)),
        "no_pose": int(values.get("pairs.dropped.no_pose", 0)),
    }


def tokens_of_node() -> NDArray[np.float32]:
    """(M, 3) what the node publishes of its scene."""
    context = Context()
    found: list[Any] = []
    rclpy.init(args=[], context=context)
    node = Node("reader", context=context, use_global_arguments=False)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    node.create_subscription(PointCloud2, f"{NAME}/scene_tokens", found.append, LATCHED)
    deadline = time.monotonic() + WAIT
    while not (found and found[-1].width) and time.monotonic() < deadline:
        executor.spin_once(timeout_sec=0.1)
    executor.shutdown()
    node.destroy_node()
    context.try_shutdown()
    cloud = found[-1]
    values = np.frombuffer(cloud.data, np.float32).reshape(cloud.width, cloud.point_step // 4)
    return values[:, :3].copy()
