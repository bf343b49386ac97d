# SPDX-License-Identifier: Apache-2.0
"""A node in a process of its own, with the tiny model, that has seen something."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import SetParameters
from ros_graph import Camera, Graph, synthetic_frame

from adatoken3d_ros.ros.wiring import Wiring

STAMP = 1_700_000_000_000_000_000
VIEWS = 3
NAME = "/adatoken3d"
# Nanoseconds after STAMP, for one more frame each: a camera at rest is looked at once in a second.
LATER = itertools.count(10_000_000_000, 2_000_000_000)


class SeeingNode:
    """A configured and active node that has seen a few views, unless it is blind; with `wiring` a launch's."""

    def __init__(
        self,
        graph: Graph,
        model: Path,
        wiring: Wiring | None = None,
        *,
        blind: bool = False,
        camera: Callable[[Graph], Any] = Camera,
        **parameters: Any,
    ) -> None:
        self.graph = graph
        fast = {"diagnostics__period": 0.1, **parameters}
        self.process = graph.start_node(model, **fast) if wiring is None else graph.start_launched(wiring, **fast)
        self.answers = graph.collect(Answer, f"{NAME}/answer")
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics", 10)
        if wiring is None:
            assert graph.transition("configure") and graph.transition("activate")
        else:  # by itself
            graph.wait(lambda: graph.state() == "active", "the node to be active")
        self.camera = camera(graph)
        graph.wait(self.camera.matched, "the node's inputs")
        if not blind:
            self.show_views()

    def show_views(self, first: int = 0) -> None:
        for i in range(first, first + VIEWS):
            self.camera.send(self.camera.messages(STAMP + i * 100_000_000, *synthetic_frame(i)))
            self.graph.wait(lambda count=i + 1: self.key_frames() >= count - first, f"key frame {i}")

    def key_frames(self) -> int:
        status = self.status("scene")
        return int(self.value(status, "key_frames")) if status is not None else 0

    def status(self, task: str) -> Any:
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name == f"adatoken3d: {task}":
                    return status
        return None

    def value(self, status: Any, key: str) -> str:
        return str(next(pair.value for pair in status.values if pair.key == key))

    def ask(self, question: str = "What is there?", **fields: Any) -> Answer:
        return self.graph.call(AskScene, f"{NAME}/ask", AskScene.Request(question=question, **fields)).answer

    def set(self, name: str, value: Any) -> Any:
        kinds = {bool: "bool", int: "integer", float: "double", str: "string"}
        kind = kinds[type(value)]
        message = ParameterValue(type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"), **{f"{kind}_value": value})
        request = SetParameters.Request(parameters=[Parameter(name=name, value=message)])
        return self.graph.call(SetParameters, f"{NAME}/set_parameters", request).results[0]
