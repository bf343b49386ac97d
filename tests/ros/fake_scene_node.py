# SPDX-License-Identifier: Apache-2.0
"""A node with the interfaces of the scene node whose answers are a script: for what a real one does not do on demand.

The first word of the question says what happens: `say` answers with the rest, `hang` never answers, `die` ends the
process, `endless` (stream only) writes until it is cancelled, `refuse` (stream only) is not accepted. With the argument
`lossy`, its first two replies about its state get lost, as those do whose reader has not been found yet; with
`loading` it says that it is loading a model.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import rclpy
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus, KeyValue
from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import ExternalShutdownException, MultiThreadedExecutor
from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.node import Node
from std_srvs.srv import Trigger

from adatoken3d_ros.settings import DEFAULTS


class FakeSceneNode(LifecycleNode):
    """Refuses to clear the scene, and to be activated twice in its life."""

    def __init__(self) -> None:
        super().__init__("adatoken3d")
        group = ReentrantCallbackGroup()
        self._activations = 0
        self._transition = self._service_change_state.callback
        self._service_change_state.callback = self._change_state
        if "loading" in sys.argv:
            for name, setting in DEFAULTS.items():
                self.declare_parameter(name, setting)
        if "lossy" in sys.argv:
            self._losses, self._reply = 2, self._service_get_state.send_response
            self._service_get_state.send_response = self._lose
        self._diagnostics = Node.create_publisher(self, DiagnosticArray, "/diagnostics", 10)
        self.create_timer(0.1, self._diagnose)
        self.create_service(AskScene, "~/ask", self._ask, callback_group=group)
        self.create_service(Trigger, "~/clear_scene", self._clear, callback_group=group)
        self._streams = ActionServer(
            self,
            AskSceneStream,
            "~/ask_stream",
            self._stream,
            callback_group=group,
            goal_callback=self._accept,
            cancel_callback=lambda _: CancelResponse.ACCEPT,
        )

    def _change_state(self, request: Any, response: Any) -> Any:
        """Refuses what is no transition; on Jazzy the base class would end the node."""
        try:
            return self._transition(request, response)
        except rclpy_implementation.RCLError:
            response.success = False
            return response

    def _lose(self, response: Any, header: Any) -> None:
        self._losses -= 1
        if self._losses < 0:
            self._reply(response, header)

    def _diagnose(self) -> None:
        values = [KeyValue(key="key_frames", value="3")]
        status = [DiagnosticStatus(name="adatoken3d: scene", values=values)]
        if "loading" in sys.argv:
            values = [KeyValue(key="load_progress", value="0.25")]
            text = "loading for 3.0 s"
            status.append(
                DiagnosticStatus(name="adatoken3d: model", level=DiagnosticStatus.WARN, message=text, values=values)
            )
        self._diagnostics.publish(DiagnosticArray(status=status))

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._activations += 1
        if self._activations > 1:
            return TransitionCallbackReturn.FAILURE
        return super().on_activate(state)

    def _ask(self, request: Any, response: Any) -> Any:
        response.answer = self._answer(request)
        return response

    def _clear(self, request: Any, response: Any) -> Any:
        response.success, response.message = False, "not today"
        return response

    def _accept(self, goal: Any) -> GoalResponse:
        return GoalResponse.REJECT if goal.question.startswith("refuse") else GoalResponse.ACCEPT

    def _stream(self, goal: Any) -> Any:
        result = AskSceneStream.Result()
        if goal.request.question.startswith("endless"):
            count = 0
            while not goal.is_cancel_requested:
                count += 1
                goal.publish_feedback(AskSceneStream.Feedback(text_so_far="x" * count, stage="decode"))
                threading.Event().wait(0.01)
            goal.canceled()
            result.answer = Answer(status=Answer.CANCELLED, text="x" * count)
            return result
        result.answer = self._answer(goal.request)
        text = result.answer.text
        for stage in ("queue", "prefill"):
            goal.publish_feedback(AskSceneStream.Feedback(stage=stage))
        for end in range(1, len(text)):
            goal.publish_feedback(AskSceneStream.Feedback(text_so_far=text[:end], stage="decode", new_tokens=end))
        goal.succeed()
        return result

    def _answer(self, request: Any) -> Answer:
        verb, _, rest = request.question.partition(" ")
        if verb == "hang":
            threading.Event().wait()
        if verb == "die":
            os._exit(3)
        clicks = [f"{p.x:g},{p.y:g},{p.z:g}" for p in request.clicks]
        answer = Answer(question=request.question, text=rest, status_message=" ".join(clicks))
        answer.latency_budget_ms, answer.retained_tokens = request.latency_budget_ms, request.max_new_tokens
        return answer


def main() -> None:
    rclpy.init()
    node = FakeSceneNode()
    executor = MultiThreadedExecutor(4)
    executor.add_node(node)
    try:
        executor.spin()
    except (KeyboardInterrupt, ExternalShutdownException):
        # Threads that hang on purpose would keep the process.
        os._exit(0)


if __name__ == "__main__":
    main()
