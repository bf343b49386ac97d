# SPDX-License-Identifier: Apache-2.0
"""Publishes a folder of posed RGB-D photographs at 10 Hz, once, when everybody listens: `publish_folder.py DIR`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import rclpy
from ros_graph import Camera
from ros_photographs import distortion, read_photographs


class Publisher:
    """What Camera needs of a graph."""

    def __init__(self) -> None:
        self.node = rclpy.create_node("photographs")


def main() -> None:
    rclpy.init()
    publisher = Publisher()
    camera = Camera(publisher, qos=10)  # type: ignore[arg-type]
    while not camera.matched():
        rclpy.spin_once(publisher.node, timeout_sec=0.05)
    folder = Path(sys.argv[1])
    begin = time.monotonic()
    for i, photograph in enumerate(read_photographs(folder)):
        messages = camera.messages(*photograph)
        messages["rgb_info"].d = messages["depth_info"].d = distortion(folder)
        camera.send(messages)
        while time.monotonic() < begin + (i + 1) / 10:
            rclpy.spin_once(publisher.node, timeout_sec=0.01)
    print("published", flush=True)
    # Reliable messages are resent from here until they have arrived.
    while rclpy.ok() and camera.matched():
        rclpy.spin_once(publisher.node, timeout_sec=0.1)
    publisher.node.destroy_node()
    rclpy.try_shutdown()


if __name__ == "__main__":
    main()
