# SPDX-License-Identifier: Apache-2.0
"""Subscribes to everything that the node sends, keeps all of it, and never reads: it stops itself once matched."""

from __future__ import annotations

import os
import signal

import rclpy
from adatoken3d.msg import Answer, KeyFrames, TokenReport
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.qos import DurabilityPolicy, HistoryPolicy, QoSProfile, ReliabilityPolicy
from sensor_msgs.msg import PointCloud2
from visualization_msgs.msg import MarkerArray

TOPICS = {
    "answer": Answer,
    "scene_tokens": PointCloud2,
    "retained_tokens": PointCloud2,
    "token_report": TokenReport,
    "markers": MarkerArray,
    "key_frames": KeyFrames,
}


def qos(durability: DurabilityPolicy) -> QoSProfile:
    return QoSProfile(history=HistoryPolicy.KEEP_ALL, reliability=ReliabilityPolicy.RELIABLE, durability=durability)


def main() -> None:
    rclpy.init()
    node = rclpy.create_node("silent")
    for name, kind in TOPICS.items():
        latched = qos(DurabilityPolicy.TRANSIENT_LOCAL)
        node.create_subscription(kind, f"/adatoken3d/{name}", lambda message: None, latched)
    seen: list[DiagnosticArray] = []
    node.create_subscription(DiagnosticArray, "/diagnostics", seen.append, qos(DurabilityPolicy.VOLATILE))
    while not seen:
        rclpy.spin_once(node)
    os.kill(os.getpid(), signal.SIGSTOP)


main()
