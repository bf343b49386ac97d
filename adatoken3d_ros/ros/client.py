# SPDX-License-Identifier: Apache-2.0
"""Ask the node from plain Python, without futures, executors or spinning.

    with SceneClient() as scene:
        answer = scene.ask("How many chairs are there?")
        print(answer.text or answer.status_message)  # without a text the message says why: no scene yet, busy, ...
        for piece in scene.stream("What is on the table?"):
            print(piece, end="", flush=True)

A client may live in any process, also in one that already uses rclpy: it has its own context, executor and thread.
Its methods may be called from any thread, but not from the callbacks of the executor of the context given to it.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from action_msgs.msg import GoalStatus
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import Point
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.srv import GetParameters
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.parameter import parameter_value_to_python
from rclpy.qos import QoSProfile
from std_srvs.srv import Trigger

from adatoken3d_ros.ros.connection import POLL_SECONDS, Connection, deadline_of

Clicks = Iterable[Sequence[float]]
T = TypeVar("T")

# Questions that one client may have open at once, and pieces of answers that may come before they are read.
DEEP = QoSProfile(depth=1000)


class LifecycleError(RuntimeError):
    """The node refused a lifecycle transition; the message names the transition and the state the node is in."""


class SceneClient:
    """A connection to one node. Close it, or use it as a context manager.

    Args:
        node_name: name of the node.
        namespace: namespace of the node, with or without a leading slash.
        context: an initialised rclpy context to use and to leave open; None for a context of its own, which installs
            no signal handlers and ignores ROS arguments of the process.

    Attributes:
        node: the rclpy node behind the client, for subscriptions of your own; callbacks run in the client's thread.
        name: of the node that is asked, with its namespace.
    """

    def __init__(self, node_name: str = "adatoken3d", namespace: str = "", context: Context | None = None) -> None:
        self.name = f"{('/' + namespace.strip('/')).rstrip('/')}/{node_name}"
        self._connection = Connection(self.name, context)
        self.node = self._connection.node
        self._ask: Any = self.node.create_client(AskScene, f"{self.name}/ask", qos_profile=DEEP)
        self._clear: Any = self.node.create_client(Trigger, f"{self.name}/clear_scene")
        self._change_state: Any = self.node.create_client(ChangeState, f"{self.name}/change_state")
        self._get_parameters: Any = self.node.create_client(GetParameters, f"{self.name}/get_parameters")
        self._streaming: Any = ActionClient(
            self.node,
            AskSceneStream,
            f"{self.name}/ask_stream",
            goal_service_qos_profile=DEEP,
            result_service_qos_profile=DEEP,
            cancel_service_qos_profile=DEEP,
            feedback_sub_qos_profile=DEEP,
        )
        self._streams: set[AnswerStream] = set()
        self._diagnostics: dict[str, dict[str, str]] = {}
        self._listening = False
        self._closed = False
        # The connection's thread is a daemon, which does not keep a process alive that forgot to close; atexit joins it
        # in time, because a spinning thread that is cut off by the end of the interpreter aborts the process.
        self._connection.start()
        atexit.register(self.close)

    def __enter__(self) -> SceneClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the client's thread and node; cancels streams that are still open. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        if self._connection.alive():
            self.cancel()
        atexit.unregister(self.close)
        self._connection.close(self._streaming)

    # --- questions -------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        clicks: Clicks = (),
        latency_budget_ms: float = 0,
        max_new_tokens: int = 0,
        strategy: str = "",
        without: Clicks = (),
        only: Clicks = (),
        candidates: Sequence[str] = (),
        timeout: float | None = 30.0,
    ) -> Answer:
        """Asks and waits for the answer. Look at `answer.status` first: a question that the node could not answer
        (no scene yet, busy, invalid, ...) comes back as an Answer too.

        Args:
            question: plain words.
            clicks: points (x, y, z) that the question is about, scene frame, metres.
            latency_budget_ms: time from arrival to answer, milliseconds; 0 for the node's default.
            max_new_tokens: longest answer in tokens; 0 for the node's default.
            strategy: of pruning, by its name, for this question alone; empty for the node's.
            without: places that the question does not see: the spatial tokens in a voxel with one of them.
            only: places besides which it sees nothing; none for the whole scene.
            candidates: texts whose probability as the answer comes with the answer (`candidate_probabilities`).
            timeout: seconds to wait in all; None to wait without a limit.

        Raises:
            TimeoutError: no answer in time; says whether the node is missing, not active or still answering.
            ConnectionError: the node or ROS went away while the question was open.
            ValueError: a click that is not three numbers, or a negative number of tokens.
        """
        request = _fill(AskScene.Request(), question, clicks, latency_budget_ms, max_new_tokens)
        _narrow(request, strategy, without, only, candidates)
        return self._connection.call(self._ask, request, timeout, "answer").answer

    def stream(
        self,
        question: str,
        *,
        clicks: Clicks = (),
        latency_budget_ms: float = 0,
        max_new_tokens: int = 0,
        strategy: str = "",
        without: Clicks = (),
        only: Clicks = (),
        candidates: Sequence[str] = (),
        timeout: float | None = 30.0,
    ) -> AnswerStream:
        """Asks and returns an iterator over the pieces of the answer while it is written; see AnswerStream.

        The arguments and errors are those of `ask`; the timeout covers everything up to the last piece, and a stream
        that runs out of time is cancelled.
        """
        goal = _fill(AskSceneStream.Goal(), question, clicks, latency_budget_ms, max_new_tokens)
        _narrow(goal, strategy, without, only, candidates)
        deadline = deadline_of(timeout)
        self._connection.meet(self._streaming.server_is_ready, deadline, f"no answer within {timeout} s")
        stream = AnswerStream(
            self._connection, self._streaming, self._streams.discard, deadline, f"no answer within {timeout} s"
        )
        self._streams.add(stream)
        self._connection.send(
            lambda: self._streaming.send_goal_async(goal, feedback_callback=stream._on_feedback), stream._on_goal
        )
        return stream

    def cancel(self) -> int:
        """Cancels every stream of this client that is still open; returns how many that were."""
        streams = list(self._streams)
        for stream in streams:
            stream.cancel()
        return len(streams)

    def clear(self, *, timeout: float | None = 10.0) -> None:
        """Forgets the scene. Raises RuntimeError with the node's reason if it does not, TimeoutError as `ask`."""
        response = self._connection.call(self._clear, Trigger.Request(), timeout, "reply")
        if not response.success:
            raise RuntimeError(f"{self.name} did not clear the scene: {response.message}")

    def parameters(self, *names: str, timeout: float | None = 10.0) -> dict[str, Any]:
        """Values of the node's parameters of these names; nothing if it does not have all of them. Raises as `ask`."""
        request = GetParameters.Request(names=list(names))
        reply = self._connection.call(self._get_parameters, request, timeout, "parameters")
        return dict(zip(names, map(parameter_value_to_python, reply.values), strict=False))

    def diagnostics(self, task: str) -> dict[str, str]:
        """Newest values that the node published on /diagnostics for a task (inputs, scene, model, latency, memory).

        Empty until there are any: the first call only begins to listen.
        """
        if not self._listening:
            self._listening = True
            self.node.create_subscription(DiagnosticArray, "/diagnostics", self._on_diagnostics, 10)
        return self._diagnostics.get(f"{self.name.lstrip('/')}: {task}", {})

    def _on_diagnostics(self, message: DiagnosticArray) -> None:
        for status in message.status:
            self._diagnostics[status.name] = {value.key: value.value for value in status.values}

    # --- life cycle ------------------------------------------------------------------------------------------------

    def state(self, *, timeout: float | None = 10.0) -> str:
        """The node's lifecycle state: unconfigured, inactive, active or finalized (or a transition's name)."""
        return self._connection.state(timeout)

    def configure(self, *, timeout: float | None = 600.0) -> None:
        """Loads the model. Raises LifecycleError when the node refuses (its log says why), TimeoutError as `ask`."""
        self._transition(Transition.TRANSITION_CONFIGURE, "configure", timeout)

    def activate(self, *, timeout: float | None = 30.0) -> None:
        """Starts the inputs. Raises as `configure`."""
        self._transition(Transition.TRANSITION_ACTIVATE, "activate", timeout)

    def deactivate(self, *, timeout: float | None = 30.0) -> None:
        """Stops the inputs. Raises as `configure`."""
        self._transition(Transition.TRANSITION_DEACTIVATE, "deactivate", timeout)

    def cleanup(self, *, timeout: float | None = 30.0) -> None:
        """Frees the model's memory. Raises as `configure`."""
        self._transition(Transition.TRANSITION_CLEANUP, "cleanup", timeout)

    def _transition(self, transition: int, label: str, timeout: float | None) -> None:
        request = ChangeState.Request()
        request.transition.id = transition
        if not self._connection.call(self._change_state, request, timeout, "reply").success:
            raise LifecycleError(f"{self.name} could not {label}: it is {self.state()!r}; its log says why")


@dataclass(eq=False)
class AnswerStream(Iterator[str]):
    """An answer while it is written: iterate over pieces of text, then look at `answer`.

    Attributes:
        text: the answer's text up to now.
        stage: what the node is doing: queue, encode, tokens, prefill or decode; empty before the first feedback.
        answer: the final Answer message; None until the node has sent it. Its text is the one that counts: a piece
            may have been corrected after it was yielded, and cancelling cuts the text.
        on_stage: if set, told each new stage by the thread that iterates: most of them come before there is text.
    """

    _connection: Connection
    _server: Any
    _forget: Callable[[AnswerStream], object]
    _deadline: float
    _failure: str
    text: str = ""
    stage: str = ""
    answer: Answer | None = None
    on_stage: Callable[[str], object] | None = None
    _events: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)
    _goal: Any = None
    _cancelled: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.answer is None:
            self.cancel()

    def __next__(self) -> str:
        """The next piece of text. Raises as `SceneClient.ask`; RuntimeError when the node refused or failed."""
        while self.answer is None:
            event = self._next_event()
            if isinstance(event, Answer):
                self.answer = event
                self._forget(self)
                piece = self._advance(event.text)
            elif isinstance(event, Exception):
                self._forget(self)
                raise event
            else:
                if event.stage != self.stage:
                    self.stage = event.stage
                    if self.on_stage is not None:
                        self.on_stage(self.stage)
                piece = self._advance(event.text_so_far)
            if piece:
                return piece
        raise StopIteration

    def result(self) -> Answer:
        """Reads the stream to its end and returns the final answer. Raises as iterating does."""
        for _ in self:
            continue
        assert self.answer is not None
        return self.answer

    def cancel(self) -> None:
        """Asks the node to stop writing. The stream still ends with an answer, whose status is then CANCELLED."""
        with self._lock:
            self._cancelled = True
            goal = self._goal
        if goal is not None and self._connection.alive():
            self._connection.send(goal.cancel_goal_async, lambda _: None)

    def _advance(self, text: str) -> str:
        kept = len(os.path.commonprefix([self.text, text]))
        self.text = text
        return text[kept:]

    def _next_event(self) -> Any:
        while True:
            remaining = self._deadline - time.monotonic()
            try:
                return self._events.get(timeout=max(0.0, min(remaining, POLL_SECONDS)))
            except queue.Empty:
                if not self._connection.looked(self._server.server_is_ready):
                    raise ConnectionError(f"{self._connection.name} went away before it replied") from None
                if remaining <= 0:
                    self.cancel()
                    self._forget(self)
                    raise TimeoutError(f"{self._failure}: {self._connection.diagnose(True)}") from None

    # In the client's thread:

    def _on_feedback(self, message: Any) -> None:
        self._events.put(message.feedback)

    def _on_goal(self, future: Any) -> None:
        goal = future.result()
        if not goal.accepted:
            self._events.put(RuntimeError(f"{self._connection.name} refused the question"))
            return
        with self._lock:
            self._goal = goal
            cancelled = self._cancelled
        goal.get_result_async().add_done_callback(self._on_result)
        if cancelled:
            goal.cancel_goal_async()

    def _on_result(self, future: Any) -> None:
        response = future.result()
        if response.status == GoalStatus.STATUS_UNKNOWN:
            self._events.put(RuntimeError(f"{self._connection.name} no longer knows the question"))
        else:
            self._events.put(response.result.answer)


def _fill(request: T, question: str, clicks: Clicks, latency_budget_ms: float, max_new_tokens: int) -> T:
    """Sets the fields that the service's request and the action's goal share."""
    if not isinstance(question, str):
        raise ValueError(f"the question must be text, got {question!r}")
    if not 0 <= max_new_tokens < 2**32:
        raise ValueError(f"max_new_tokens must be 0 (the node's default) or more, got {max_new_tokens}")
    message: Any = request
    message.question = question
    message.clicks = _points("a click", clicks)
    message.latency_budget_ms = float(latency_budget_ms)
    message.max_new_tokens = int(max_new_tokens)
    return request


def _narrow(request: Any, strategy: str, without: Clicks, only: Clicks, candidates: Sequence[str]) -> None:
    """Sets the other fields that they share."""
    request.strategy, request.candidates = strategy, list(candidates)
    request.without, request.only = _points("a place", without), _points("a place", only)


def _points(what: str, places: Clicks) -> list[Point]:
    points = []
    for place in places:
        if len(place) != 3:
            raise ValueError(f"{what} must be three numbers x, y, z in metres, got {place!r}")
        x, y, z = (float(value) for value in place)
        points.append(Point(x=x, y=y, z=z))
    return points
