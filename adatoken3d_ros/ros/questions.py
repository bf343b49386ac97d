# SPDX-License-Identifier: Apache-2.0
"""Every way to ask (service, action, topic, click), and one way from a question to its published answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.srv import AskScene
from geometry_msgs.msg import PointStamped
from numpy.typing import NDArray
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_msgs.msg import String

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import Answered, Listeners, StageBegan, TextSoFar
from adatoken3d_ros.engine.requests import about_point, check_question
from adatoken3d_ros.engine.tickets import Ticket
from adatoken3d_ros.ros.awaiting import completed
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.logs import WARN_SECONDS
from adatoken3d_ros.ros.outputs.messages import answer_message
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.text import described, quoted, trace

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
    question = make_question(
        request.question, defaults, _points(request.clicks), request.latency_budget_ms, request.max_new_tokens
    )
    candidates = tuple(request.candidates)
    return replace(question, without=_points(request.without), only=_points(request.only), candidates=candidates)


def _points(message: Any) -> NDArray[np.float64]:
    return np.array([(point.x, point.y, point.z) for point in message], dtype=np.float64).reshape(-1, 3)


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


@dataclass(eq=False)
class Questions:
    """Takes questions for a node; each is answered exactly once, whatever happens to it, and the answer is told.

    Args:
        node: carries service, action and topics.
        group: reentrant, since a question is a coroutine that awaits its ticket.
        parameters: the node's.
        engine: answers.
        inputs: know what is wrong with what was seen.
        events: told every answer, in the executor's thread.
        state: the node's lifecycle state; only `active` answers.

    Attributes:
        open: questions that are not answered yet.
        taken: how many came, by way.
        problem: why the last question that the model had was an error; empty if it was none.
    """

    _node: Node
    _group: CallbackGroup
    _parameters: Parameters
    _engine: EngineOwner
    _inputs: Inputs
    _events: Listeners
    _state: Callable[[], str]

    def __post_init__(self) -> None:
        self._numbers = count(1)
        self._tickets: dict[bytes, Ticket] = {}
        self.open = 0
        self.taken: Counter[str] = Counter(service=0, action=0, topic=0, click=0)
        self.problem = ""
        self._node.create_service(AskScene, "~/ask", self._on_ask, qos_profile=AT_ONCE, callback_group=self._group)
        self._stream_server = ActionServer(
            self._node,
            AskSceneStream,
            "~/ask_stream",
            self._on_stream,
            cancel_callback=self._on_cancel,
            callback_group=self._group,
            goal_service_qos_profile=AT_ONCE,
            result_service_qos_profile=AT_ONCE,
            cancel_service_qos_profile=AT_ONCE,
            feedback_pub_qos_profile=AT_ONCE,
            result_timeout=RESULT_SECONDS,
        )
        subscribe: Any = partial(self._node.create_subscription, qos_profile=AT_ONCE, callback_group=self._group)
        subscribe(String, "question", self._on_question)
        subscribe(PointStamped, "clicked_point", self._on_click)

    def close(self, flush: Callable[[], object], on_error: Callable[[Exception], object]) -> None:
        """Sends the answers still owed and takes no more goals; to be called before the node is destroyed.

        Args:
            flush: sends what was told and waits to be sent.
            on_error: told what comes out of callbacks.
        """
        owed, executor, deadline = self.open, self._node.executor, time.monotonic() + LAST_SECONDS
        while self.open and executor is not None and time.monotonic() < deadline:
            try:
                executor.spin_once(timeout_sec=0.01)
            except Exception as error:
                on_error(error)
        flush()
        if owed:  # what was sent last would leave with this process before a busy client has taken it up
            time.sleep(FAREWELL_SECONDS)
        self._stream_server.destroy()

    async def _on_ask(self, request: AskScene.Request, response: AskScene.Response) -> AskScene.Response:
        self.taken["service"] += 1
        response.answer = await self._answer(question_of(request, self._parameters), strategy=request.strategy)
        return response

    async def _on_question(self, message: String) -> None:
        self.taken["topic"] += 1
        await self._answer(make_question(message.data, self._parameters))

    async def _on_click(self, message: PointStamped) -> None:
        self.taken["click"] += 1
        question = make_question(self._parameters["click_question"], self._parameters)
        point, frame = np.array([message.point.x, message.point.y, message.point.z]), message.header.frame_id
        try:
            point = self._inputs.in_scene(point, frame)
        except ValueError as error:
            scene_frame = quoted(self._parameters["scene.frame_id"])
            text = f"clicked_point is in frame {quoted(frame)}, the scene in {scene_frame}: {error}"
            self._tell(next(self._numbers), Answer(question, Status.INVALID_REQUEST, status_message=text))
            return
        await self._answer(about_point(question, point))

    async def _on_stream(self, goal: Any) -> AskSceneStream.Result:
        self.taken["action"] += 1
        key = bytes(goal.goal_id.uuid)
        feedback = AskSceneStream.Feedback(stage="queue")

        def on_event(event: StageBegan | TextSoFar) -> None:
            if isinstance(event, StageBegan):
                feedback.stage = event.stage
            else:
                feedback.text_so_far, feedback.new_tokens = event.text, event.tokens
            goal.publish_feedback(feedback)

        def on_ticket(ticket: Ticket) -> None:
            self._tickets[key] = ticket
            if goal.is_cancel_requested:
                ticket.cancel("cancelled by the client")

        goal.publish_feedback(feedback)
        question = question_of(goal.request, self._parameters)
        answer = await self._answer(question, on_event, on_ticket, goal.request.strategy)
        self._tickets.pop(key, None)
        if Status(answer.status).answered:
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
        listener: Callable[[StageBegan | TextSoFar], None] | None = None,
        on_ticket: Callable[[Ticket], None] | None = None,
        strategy: str = "",
    ) -> AnswerMsg:
        """One question to one answer that is told, whatever happens."""
        number = next(self._numbers)
        self.open += 1
        try:
            answer = await self._ask_engine(question, number, listener, on_ticket, strategy)
        except Exception as error:
            text = trace(error, heading="a question failed")
            self._node.get_logger().error(text, throttle_duration_sec=WARN_SECONDS)
            answer = Answer(question, Status.ERROR, status_message=described(error))
        finally:
            self.open -= 1
        more = [self._inputs.explain()] if answer.status == Status.NO_SCENE else []
        if answer.status.answered or answer.status == Status.NO_SCENE:
            more += self._inputs.warnings.texts()
        if more:
            answer = replace(answer, status_message="; ".join(filter(None, [answer.status_message, *more])))
        if answer.status.answered and self._inputs.record.first("answer"):
            self._node.get_logger().info(f"the first answer is given, after {answer.times.total:.0f} ms")
        return self._tell(number, answer)

    async def _ask_engine(
        self,
        question: Question,
        number: int,
        listener: Callable[[StageBegan | TextSoFar], None] | None,
        on_ticket: Callable[[Ticket], None] | None,
        strategy: str,
    ) -> Answer:
        if self._engine.queue is None or self._state() != "active":
            advice = "it is loading the model" if self._engine.loading else "configure and activate it first"
            why = f"the node is {self._state()}, not active: {advice}"
            if self._engine.problem:
                why += f"; {self._engine.problem}"
            return Answer(question, Status.ERROR, status_message=why)
        try:
            # Before it waits: what can never be answered takes nobody's place, and no megabytes of the queue.
            check_question(question)
            if strategy:
                self._engine.check_named(strategy)
        except ValueError as error:
            return Answer(question, Status.INVALID_REQUEST, status_message=str(error))
        ticket = self._engine.ask(question, self._parameters, number, listener, strategy)
        if on_ticket is not None:
            on_ticket(ticket)
        answer = await completed(self._node, ticket.result)
        self.problem = answer.status_message if answer.status == Status.ERROR else ""
        if answer.report is not None:
            # A question encodes what has come in; the scene that it saw is then new to the others, too.
            self._engine.look()
        return answer

    def _tell(self, number: int, answer: Answer) -> AnswerMsg:
        """Tells the answer to all who listen, and returns it for who asked by service or action."""
        now_ns = self._node.get_clock().now().nanoseconds
        frame_id = self._parameters["scene.frame_id"]
        self._events.tell(Answered(number, answer, frame_id, now_ns))
        return answer_message(answer, frame_id, now_ns)
