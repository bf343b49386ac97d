# SPDX-License-Identifier: Apache-2.0
"""The scene node in the test's own process, where a test can look into it and put faults into it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adatoken3d.srv import AskScene
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.node import Node
from rclpy.parameter import Parameter
from ros_graph import DEADLINE

from adatoken3d_ros.ros.node import SceneNode

CAMERA = {  # what the demo's camera is given, other than its defaults
    "rate": 20.0,
    "width": 64,
    "height": 48,
    "field_of_view": 90.0,
    "seed": 3,
    "depth_encoding": "32FC1",
    "reliability": "best_effort",
    "world_frame": "world",
    "camera_frame": "eye",
}
OVERRIDE = "qos_overrides./rgb/image.subscription."


@dataclass
class Live:
    """The scene node, the demo's camera (where a test needs it), a node that talks to them, and what spins them."""

    node: SceneNode
    tester: Node
    executor: SingleThreadedExecutor
    model: Path
    started: dict[str, Any] = field(default_factory=dict)
    camera: Any = None

    def wait(self, condition: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + DEADLINE
        while not (value := condition()):
            self.executor.spin_once(timeout_sec=0.02)
            assert time.monotonic() < deadline, what
        return value

    def set(self, name: str, value: Any) -> Any:
        return self.node.set_parameters([Parameter(name, value=value)])[0]

    def put(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            result = self.set(name, value)
            assert result.successful, result.reason

    def configure(self) -> bool:
        task = self.executor.create_task(self.node.load)
        self.wait(task.done, "the model to be loaded")
        return bool(self.node.trigger_configure() == TransitionCallbackReturn.SUCCESS)

    def call(self, kind: Any, name: str, request: Any = None) -> Any:
        client = self.tester.create_client(kind, f"/adatoken3d/{name}")
        self.wait(client.service_is_ready, name)
        future = client.call_async(request or kind.Request())
        self.wait(future.done, f"a reply of {name}")
        self.tester.destroy_client(client)
        return future.result()

    def ask(self, **fields: Any) -> Any:
        return self.call(AskScene, "ask", AskScene.Request(question="What is there?", **fields)).answer
