# SPDX-License-Identifier: Apache-2.0
"""Asks over the service and over the action, and then never looks at what comes back."""

from __future__ import annotations

import rclpy
from adatoken3d.action import AskSceneStream
from adatoken3d.srv import AskScene
from rclpy.action import ActionClient


def main() -> None:
    rclpy.init()
    node = rclpy.create_node("vanishing")
    service = node.create_client(AskScene, "/adatoken3d/ask")
    action = ActionClient(node, AskSceneStream, "/adatoken3d/ask_stream")
    service.wait_for_service()
    action.wait_for_server()
    service.call_async(AskScene.Request(question="Over the service?", max_new_tokens=200))
    goal = action.send_goal_async(AskSceneStream.Goal(question="Over the action?", max_new_tokens=200))
    rclpy.spin_until_future_complete(node, goal)
    print("asked", flush=True)
    while True:
        rclpy.spin_once(node, timeout_sec=1.0)


main()
