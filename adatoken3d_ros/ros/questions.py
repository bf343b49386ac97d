# SPDX-License-Identifier: Apache-2.0
"""Every way to ask (service, action, topic, click), and one way from a question to its published answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.srv import AskScene
from geometry_msgs.msg import PointStamped
from numpy.typing import NDArray
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import CallbackGroup
from rclpy.qos import QoSProfile
from std_msgs.msg import String

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.loading import make_strategy
from adatoken3d_ros.engine.requests import InvalidRequest, check_question
from adatoken3d_ros.ros.awaiting import completed
from adatoken3d_ros.ros.inputs.poses import TfPose
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.outputs.diagnostics import LatencyWindow
from adatoken3d_ros.ros.outputs.publishers import answer_message
from adatoken3d_ros.text import described, quoted, trace

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.engine.tickets import Ticket
    from adatoken3d_ros.ros.node import SceneNode

LAST_SECONDS = 0.3  # how long the last answers may take at shutdown
FAREWELL_SECONDS = 0.2  # how long the process stays after them


# Questions that may come at once, from all clients, while the executor does something else: as many as may ever wait
# (`queue_limit`). All of them are taken, and those beyond the limit are answered BUSY; the middleware drops what comes
# beyond, and nobody is told. ROS's own depth of 10 loses 190 of 200.
AT_ONCE = QoSProfile(depth=1000)
RESULT_SECONDS = 10  # for which an action's result is kept after its end


def question_of(request: Any, defaults: Mapping[str, Any] | Any) -> Question:
    """The question of an AskScene request or an AskSceneStream goal; the engine checks whether it makes sense.

    Args:
        request: the message.
        defaults: `latency_budget_ms` and `max_new_tokens` for what the request leaves at 0.
    """
    clicks = np.array([(point.x, point.y, point.z) for point in request.clicks], dtype=np.float64).reshape(-1, 3)
    return make_question(request.question, defaults, clicks, request.latency_budget_ms, request.max_new_tokens)


def make_question(
    text: str,
    defaults: Mapping[str, Any] | Any,
    clicks: NDArray[np.float64] | None = None,
    budget_ms: float = 0.0,
    max_new_tokens: int = 0,
) -> Question:
    """A question with the defaults (see `question_of`) where it says nothing; clicks are (n, 3), metres."""
    return Question(
        text,
        np.zeros((0, 3)) if clicks is None else clicks,
        budget_ms or defaults["latency_budget_ms"] or None,
        max_new_tokens or defaults["max_new_tokens"],
    )


class Questions:
    """Takes questions for a node; each is answered and published exactly once, whatever happens to it.

    Args:
        node: whose worker answers.
        group: reentrant, since a question is a coroutine that awaits its ticket.

    Attributes:
        open: questions that are not answered yet.
        taken: how many came, by way.
        latency: how long the last answers took.
        problem: why the last question that the model had was an error; empty if it was none.
    """

    def __init__(self, node: SceneNode, group: CallbackGroup) -> None:
        self._node = node
        self._tickets: dict[bytes, Ticket] = {}
        self.open = 0
        self.taken: Counter[str] = Counter(service=0, action=0, topic=0, click=0)
        self.latency = LatencyWindow()
        self.problem = ""
        node.create_service(AskScene, "~/ask", self._on_ask, qos_profile=AT_ONCE, callback_group=group)
        self._stream_server = ActionServer(
            node,
            AskSceneStream,
            "~/ask_stream",
            self._on_stream,
            cancel_callback=self._on_cancel,
            callback_group=group,
            goal_service_qos_profile=AT_ONCE,
            result_service_qos_profile=AT_ONCE,
            cancel_service_qos_profile=AT_ONCE,
            feedback_pub_qos_profile=AT_ONCE,
            result_timeout=RESULT_SECONDS,
        )
        subscribe: Any = partial(node.create_subscription, qos_profile=AT_ONCE, callback_group=group)
        subscribe(String, "question", self._on_question)
        subscribe(PointStamped, "clicked_point", self._on_click)

    def close(self) -> None:
        """Sends the answers still owed and takes no more goals; to be called before the node is destroyed."""
        owed, executor, deadline = self.open, self._node.executor, time.monotonic() + LAST_SECONDS
        while self.open and executor is not None and time.monotonic() < deadline:
            try:
                executor.spin_once(timeout_sec=0.01)
            except Exception as error:
                self._node.callback_failed(error)
        self._node.outputs.flush()
        if owed:  # what was sent last would leave with this process before a busy client has taken it up
            time.sleep(FAREWELL_SECONDS)
        self._stream_server.destroy()

    async def _on_ask(self, request: AskScene.Request, response: AskScene.Response) -> AskScene.Response:
        self.taken["service"] += 1
        response.answer = await self._answer(question_of(request, self._node.parameters))
        return response

    async def _on_question(self, message: String) -> None:
        self.taken["topic"] += 1
        await self._answer(make_question(message.data, self._node.parameters))

    async def _on_click(self, message: PointStamped) -> None:
        self.taken["click"] += 1
        question = make_question(self._node.parameters["click_question"], self._node.parameters)
        point = np.array([message.point.x, message.point.y, message.point.z])
        scene_frame, frame = self._node.parameters["scene.frame_id"], message.header.frame_id
        if frame not in ("", scene_frame) and self._node.inputs.poses is not None:
            try:
                if not isinstance(self._node.inputs.poses, TfPose):
                    source = self._node.parameters["pose.source"]
                    raise ValueError(f"pose.source is {quoted(source)}, only 'tf' knows other frames")
                T = self._node.inputs.poses.transform(0, frame)
            except ValueError as error:
                text = f"clicked_point is in frame {quoted(frame)}, the scene in {quoted(scene_frame)}: {error}"
                self._publish(Answer(question, Status.INVALID_REQUEST, status_message=text))
                return
            point = T[:3, :3] @ point + T[:3, 3]
        await self._answer(replace(question, clicks=point[None]))

    async def _on_stream(self, goal: Any) -> AskSceneStream.Result:
        self.taken["action"] += 1
        key = bytes(goal.goal_id.uuid)
        feedback = AskSceneStream.Feedback(stage="queue")

        def on_stage(stage: str) -> None:
            feedback.stage = stage
            goal.publish_feedback(feedback)

        def on_text(text: str, tokens: int) -> None:
            feedback.text_so_far, feedback.new_tokens = text, tokens
            goal.publish_feedback(feedback)

        def on_ticket(ticket: Ticket) -> None:
            self._tickets[key] = ticket
            if goal.is_cancel_requested:
                ticket.cancel("cancelled by the client")

        goal.publish_feedback(feedback)
        answer = await self._answer(question_of(goal.request, self._node.parameters), on_text, on_stage, on_ticket)
        self._tickets.pop(key, None)
        if answer.status in (Status.OK, Status.TRUNCATED):
            goal.succeed()
        elif answer.status == Status.CANCELLED and goal.is_cancel_requested:
            goal.canceled()
        else:
            goal.abort()
        return AskSceneStream.Result(answer=answer)

    def _on_cancel(self, goal: Any) -> CancelResponse:
        ticket = self._tickets.get(bytes(goal.goal_id.uuid))
        if ticket is not None:
            ticket.cancel("cancelled by the client")
        return CancelResponse.ACCEPT

    async def _answer(
        self,
        question: Question,
        on_text: Callable[[str, int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        on_ticket: Callable[[Ticket], None] | None = None,
    ) -> AnswerMsg:
        """One question to one published answer, whatever happens."""
        self.open += 1
        try:
            answer = await self._ask_worker(question, on_text, on_stage, on_ticket)
        except Exception as error:
            text = trace(error, heading="a question failed")
            self._node.get_logger().error(text, throttle_duration_sec=WARN_SECONDS)
            answer = Answer(question, Status.ERROR, status_message=described(error))
        finally:
            self.open -= 1
        more = [self._node.inputs.explain()] if answer.status == Status.NO_SCENE else []
        if answer.status in (Status.OK, Status.TRUNCATED, Status.NO_SCENE):
            more += self._node.inputs.warnings.texts()
        if more:
            answer = replace(answer, status_message="; ".join(filter(None, [answer.status_message, *more])))
        if answer.status in (Status.OK, Status.TRUNCATED) and self._node.inputs.record.first("answer"):
            self._node.get_logger().info(f"the first answer is given, after {answer.times.total:.0f} ms")
        return self._publish(answer)

    async def _ask_worker(
        self,
        question: Question,
        on_text: Callable[[str, int], None] | None,
        on_stage: Callable[[str], None] | None,
        on_ticket: Callable[[Ticket], None] | None,
    ) -> Answer:
        if self._node.worker is None or self._node.lifecycle_state != "active":
            advice = "it is loading the model" if self._node.loading else "configure and activate it first"
            why = f"the node is {self._node.lifecycle_state}, not active: {advice}"
            if self._node.load_problem:
                why += f"; {self._node.load_problem}"
            return Answer(question, Status.ERROR, status_message=why)
        try:
            # Before it waits: what can never be answered takes nobody's place, and no megabytes of the queue.
            check_question(question)
        except InvalidRequest as error:
            return Answer(question, Status.INVALID_REQUEST, status_message=str(error))
        strategy = self._node.parameters["strategy"]

        def use_strategy(scene: Scene) -> None:
            # Travels with the question, whose time runs and whose policy holds from now on, also behind others.
            if strategy != self._node.strategy:
                chosen = make_strategy(strategy, self._node.layers, self._node.model_hash, self._node.fitted)
                scene.set_strategy(chosen)
                self._node.strategy = strategy

        self._node.worker.policy = type(self._node.worker.policy)(self._node.parameters["question_policy"])
        self._node.worker.queue_limit = self._node.parameters["queue_limit"]
        ticket = self._node.worker.submit(question, before=use_strategy, on_text=on_text, on_stage=on_stage)
        if on_ticket is not None:
            on_ticket(ticket)
        answer = await completed(self._node, ticket.result)
        self.problem = answer.status_message if answer.status == Status.ERROR else ""
        if answer.report is not None and self._node.worker is not None:
            # A question encodes what has come in; the scene that it saw is then new to the others, too.
            self._node.worker.call(self._node.show_scene, chore=True)
        return answer

    def _publish(self, answer: Answer) -> AnswerMsg:
        self.latency.add(answer)
        now_ns = self._node.get_clock().now().nanoseconds
        frame_id = self._node.parameters["scene.frame_id"]
        try:
            return self._node.outputs.publish_answer(answer, frame_id, now_ns)
        except Exception as error:  # who asked by service or action has his answer all the same
            self._node.callback_failed(error)
            return answer_message(answer, frame_id, now_ns)
