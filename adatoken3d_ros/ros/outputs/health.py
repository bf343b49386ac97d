# SPDX-License-Identifier: Apache-2.0
"""Gathers what /diagnostics tells, and publishes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import CallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.node import Node

from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.outputs import diagnostics
from adatoken3d_ros.ros.outputs.publishers import Publishers
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.questions import Questions
from adatoken3d_ros.ros.spinning import Failures


@dataclass(eq=False)
class Health:
    """Looks at the parts of a node in a timer.

    Args:
        node: publishes.
        group: of the timer.
        parameters: the node's.
        engine, inputs, questions, outputs, failures: what is looked at.
        state: the node's lifecycle state.

    Attributes:
        latency: to be given every answer.
        read_memory: see `diagnostics.read_memory`.
    """

    _node: Node
    _group: CallbackGroup
    _parameters: Parameters
    _engine: EngineOwner
    _inputs: Inputs
    _questions: Questions
    _outputs: Publishers
    _failures: Failures
    _state: Callable[[], str]

    def __post_init__(self) -> None:
        self._namesakes = 0
        self.latency = diagnostics.LatencyWindow()
        self.read_memory = diagnostics.read_memory
        self._publisher = self._node.create_publisher(DiagnosticArray, "/diagnostics", 10)
        # Steady: simulated time may stand still, this must not.
        clock = Clock(clock_type=ClockType.STEADY_TIME)
        period = self._parameters["diagnostics.period"]
        self._timer = self._node.create_timer(period, self._tick, clock=clock, callback_group=self._group)

    def _tick(self) -> None:
        self._timer.timer_period_ns = round(self._parameters["diagnostics.period"] * 1e9)
        self._publisher.publish(self.report())

    def report(self) -> DiagnosticArray:
        """How everything is now."""
        now_ns = self._node.get_clock().now().nanoseconds
        seen, worker, scene = self._outputs.scene, self._engine.queue, self._engine.scene

        def age(stamp_ns: int) -> float | None:
            return (now_ns - stamp_ns) / 1e9 if stamp_ns and now_ns else None

        contradiction = "" if scene is None else scene.memory.contradiction
        if contradiction:
            self._node.get_logger().error(contradiction, throttle_duration_sec=WARN_SECONDS)
        reports = [
            diagnostics.inputs(
                self._inputs.state(),
                self._parameters["diagnostics.stale_after"],
                self._parameters["diagnostics.min_rate"],
            ),
            diagnostics.scene(
                self._state() == "active",
                len(seen.poses),
                len(seen.xyz),
                age(seen.stamp_ns),
                self._inputs.fates,
                0 if scene is None else scene.memory.given_up,
                contradiction,
                None if scene is None else age(scene.confirmed_ns),
                (seen.nbytes, seen.limit_bytes),
                len(seen.gone),
            ),
            diagnostics.model(
                self._state(),
                self._engine.model_id,
                self._parameters["strategy"],
                self._engine.loading,
                self._engine.problem or self._questions.problem,
                0 if worker is None else worker.waiting,
                self._count_namesakes(),
                self._failures.count,
                self._failures.last,
            ),
            self.latency.report(self._engine.drift(), self._questions.taken, self._outputs.waiting),
            diagnostics.memory(self.read_memory(self._engine.on_gpu)),
        ]
        name = self._node.get_fully_qualified_name().lstrip("/")
        return diagnostics.array(reports, name, self._engine.model_id or "none", now_ns)

    def _count_namesakes(self) -> int:
        """Other nodes of this name; a new one is logged."""
        before = self._namesakes
        own = self._node.get_name(), self._node.get_namespace()
        self._namesakes = self._node.get_node_names_and_namespaces().count(own) - 1
        if self._namesakes > before:
            self._node.get_logger().warning(
                f"{self._namesakes + 1} nodes are named {self._node.get_fully_qualified_name()}, and each may answer "
                "in the others' place: give one another name or namespace (one that was killed is seen for a while)"
            )
        return max(0, self._namesakes)
