# SPDX-License-Identifier: Apache-2.0
"""The node `adatoken3d`: wiring between topics, services and the worker's thread that owns the model.

One SingleThreadedExecutor in the main thread, one worker thread. No callback waits: a question is a coroutine that
awaits its ticket. Loading and freeing the model also happen beside the executor, while the lifecycle request that asked
for it is pending; the node then still counts as being in the state that it leaves.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import rclpy
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer as AnswerMsg
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PointStamped
from lifecycle_msgs.msg import Transition
from rclpy.action import ActionServer, CancelResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future
from std_msgs.msg import String
from std_srvs.srv import Trigger

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.loading import ModelSettings, free_gpu_memory, load_session, make_strategy
from adatoken3d_ros.ros import diagnostics
from adatoken3d_ros.ros.inputs import Inputs
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.poses import TfPose
from adatoken3d_ros.ros.publishers import Publishers, SceneView
from adatoken3d_ros.ros.signals import StopSignals

if TYPE_CHECKING:
    from adatoken3d_ros.engine.worker import Ticket, Worker

T = TypeVar("T")
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
LATE_JOINER_PERIOD = 0.25  # seconds between two looks for subscribers that came late
STOP_SECONDS = 1.0  # how long the worker may take to end at shutdown


class SceneNode(LifecycleNodeMixin, Node):
    """configure loads the model, activate starts the inputs, deactivate stops them, cleanup frees the memory."""

    def __init__(self) -> None:
        Node.__init__(self, "adatoken3d")
        # Reentrant: a pending coroutine holds its group, and neither questions nor a load may hold up the others.
        self._group = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=self._group)
        self._transition = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state
        self._changing = False
        self.lifecycle_state = "unconfigured"
        self._worker: Worker | None = None
        self._model_id = ""
        self._layers = 0
        self._model_hash = ""
        self._on_gpu = False
        self._loading_since: float | None = None
        self._load_problem = ""
        self._strategy = ""
        self._tickets: dict[bytes, Ticket] = {}
        self._open_answers = 0
        self._latency = diagnostics.LatencyWindow()

        self.parameters = Parameters(self, lambda: self.lifecycle_state, {"strategy": self._check_strategy})
        self._outputs = Publishers(self)
        self._inputs = Inputs(self, self.parameters, self._take_frame, self._group)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self.create_service(AskScene, "~/ask", self._on_ask, callback_group=self._group)
        self.create_service(Trigger, "~/clear_scene", self._on_clear, callback_group=self._group)
        self._stream_server = ActionServer(
            self,
            AskSceneStream,
            "~/ask_stream",
            self._on_stream,
            cancel_callback=self._on_cancel,
            callback_group=self._group,
        )
        subscribe: Any = partial(self.create_subscription, qos_profile=10, callback_group=self._group)
        subscribe(String, "question", self._on_question)
        subscribe(PointStamped, "clicked_point", self._on_click)
        # Steady clocks: simulated time may stand still, these must not.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(LATE_JOINER_PERIOD, self._outputs.serve, clock=steady, callback_group=self._group)
        self._diagnostics_timer = self.create_timer(
            self.parameters["diagnostics.period"], self._diagnose, clock=steady, callback_group=self._group
        )
        self._forwarded_log = _RosLog(self)
        logging.getLogger("adatoken3d_ros").addHandler(self._forwarded_log)

    # --- lifecycle ----------------------------------------------------------------------------------------------------

    async def autostart(self) -> None:
        """Configures and activates, as a launch file would; a failure is logged and leaves the node where it is."""
        await self._load()
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    async def _on_change_state(self, request: Any, response: Any) -> Any:
        """Does the slow part of a transition beside the executor, then lets the state machine make it."""
        if self._changing:
            self.get_logger().error("another lifecycle transition is still under way")
            response.success = False
            return response
        wanted = request.transition.label or _TRANSITION_NAMES.get(request.transition.id, "")
        self._changing = True
        try:
            if wanted == "configure" and self.lifecycle_state == "unconfigured":
                await self._load()
            elif wanted == "cleanup" and self.lifecycle_state == "inactive" or "shutdown" in wanted:
                await self._unload()
            return self._transition(request, response)
        finally:
            self._changing = False

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS with a model that is loaded; FAILURE (back to unconfigured) with the reason in the log."""
        worker = self._start_loading()
        try:
            self._inputs.check()
            worker.ready.result()
        except Exception as error:
            self._load_problem = str(error)
            self.get_logger().error(f"configure failed: {error}")
            self._drop_worker()
            return FAILURE
        self.lifecycle_state = "inactive"
        self.get_logger().info(f"configured: model {self._model_id}, strategy {self._strategy}")
        return super().on_configure(state)

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS once inputs are subscribed to; FAILURE (back to inactive) with the reason in the log."""
        try:
            self._inputs.start()
        except ValueError as error:
            self.get_logger().error(f"activate failed: {error}")
            return FAILURE
        self.lifecycle_state = "active"
        return super().on_activate(state)

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS; questions that run are answered."""
        self._inputs.stop()
        self.lifecycle_state = "inactive"
        return super().on_deactivate(state)

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS; the scene and the model are gone afterwards."""
        self._drop_worker()
        self.lifecycle_state = "unconfigured"
        return super().on_cleanup(state)

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS."""
        self._inputs.stop()
        self._drop_worker()
        self.lifecycle_state = "finalized"
        return super().on_shutdown(state)

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS (back to unconfigured) with everything released."""
        self._inputs.stop()
        self._drop_worker()
        self.lifecycle_state = "unconfigured"
        return SUCCESS

    def _start_loading(self) -> Worker:
        if self._worker is None:
            from adatoken3d_ros.engine.worker import Worker

            settings = ModelSettings.from_parameters(self.parameters)
            self._load_problem = ""
            self._loading_since = time.monotonic()
            self._worker = Worker(partial(self._make_session, settings), on_frame=self._frame_done)
            self._worker.start()
        return self._worker

    def _make_session(self, settings: ModelSettings) -> Any:
        """Runs in the worker's thread; a model of gigabytes takes a while."""
        try:
            session = load_session(settings)
        finally:
            self._loading_since = None
        self._model_id, self._strategy = session.model_id, settings.strategy
        self._layers, self._model_hash = session.n_layers, session.model.config.hash()
        self._on_gpu = session.model.device.type == "cuda"
        return session

    async def _load(self) -> None:
        # The engine brings torch with it, seconds of importing: neither at the start nor in the executor's thread.
        await self._beside(partial(importlib.import_module, "adatoken3d_ros.engine.worker"))
        worker = self._start_loading()
        done: ThreadFuture[None] = ThreadFuture()
        worker.ready.add_done_callback(lambda _: done.set_result(None))
        await self._completed(done)

    async def _unload(self) -> None:
        """Ends the worker without keeping the executor waiting for the decode step that it is in."""
        if self._worker is not None:
            await self._beside(self._worker.stop)

    def _drop_worker(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.stop()
        self._model_id = ""
        self._outputs.forget_answer()
        self._outputs.publish_scene(SceneView(), self.parameters["scene.frame_id"])
        gc.collect()
        if self._on_gpu:
            free_gpu_memory()
            self._on_gpu = False

    # --- questions ----------------------------------------------------------------------------------------------------

    async def _on_ask(self, request: AskScene.Request, response: AskScene.Response) -> AskScene.Response:
        response.answer = await self._answer(self._question_of(request))
        return response

    async def _on_question(self, message: String) -> None:
        await self._answer(self._question(message.data))

    async def _on_click(self, message: PointStamped) -> None:
        question = self._question(self.parameters["click_question"])
        point = np.array([message.point.x, message.point.y, message.point.z])
        scene_frame, frame = self.parameters["scene.frame_id"], message.header.frame_id
        if frame not in ("", scene_frame):
            try:
                if not isinstance(self._inputs.poses, TfPose):
                    raise ValueError(f"pose.source is {self.parameters['pose.source']!r}, only 'tf' knows other frames")
                T = self._inputs.poses.transform(0, frame)
            except ValueError as error:
                text = f"clicked_point is in frame {frame!r}, the scene in {scene_frame!r}: {error}"
                self._publish(Answer(question, Status.INVALID_REQUEST, status_message=text))
                return
            point = T[:3, :3] @ point + T[:3, 3]
        await self._answer(self._question(question.text, clicks=point[None]))

    async def _on_stream(self, goal: Any) -> AskSceneStream.Result:
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
        answer = await self._answer(self._question_of(goal.request), on_text, on_stage, on_ticket)
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

    async def _on_clear(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self._worker is None:
            response.success, response.message = True, "there is no scene: the node is not configured"
            return response
        try:
            await self._completed(self._worker.call(self._clear))
        except RuntimeError as error:
            response.success, response.message = False, str(error)
        else:
            response.success, response.message = True, "the scene is empty"
        return response

    def _question_of(self, request: Any) -> Question:
        clicks = np.array([(point.x, point.y, point.z) for point in request.clicks]).reshape(-1, 3)
        return self._question(request.question, clicks, request.latency_budget_ms, request.max_new_tokens)

    def _question(self, text: str, clicks: Any = None, budget_ms: float = 0.0, max_new_tokens: int = 0) -> Question:
        """A question with the node's defaults where it says nothing; the session checks whether it makes sense."""
        return Question(
            text,
            np.zeros((0, 3)) if clicks is None else clicks,
            budget_ms or self.parameters["latency_budget_ms"] or None,
            max_new_tokens or self.parameters["max_new_tokens"],
        )

    async def _answer(
        self,
        question: Question,
        on_text: Callable[[str, int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        on_ticket: Callable[[Ticket], None] | None = None,
    ) -> AnswerMsg:
        """One question to one published answer, whatever happens."""
        self._open_answers += 1
        try:
            answer = await self._ask_worker(question, on_text, on_stage, on_ticket)
        except Exception as error:
            self.get_logger().error(traceback.format_exc())
            answer = Answer(question, Status.ERROR, status_message=f"{type(error).__name__}: {error}")
        finally:
            self._open_answers -= 1
        if answer.status == Status.NO_SCENE:
            answer = replace(answer, status_message=f"{answer.status_message}; {self._inputs.explain()}")
        return self._publish(answer)

    async def _ask_worker(
        self,
        question: Question,
        on_text: Callable[[str, int], None] | None,
        on_stage: Callable[[str], None] | None,
        on_ticket: Callable[[Ticket], None] | None,
    ) -> Answer:
        if self._worker is None or self.lifecycle_state != "active":
            why = f"the node is {self.lifecycle_state}, not active: configure and activate it first"
            if self._load_problem:
                why += f"; {self._load_problem}"
            return Answer(question, Status.ERROR, status_message=why)
        strategy = self.parameters["strategy"]
        if strategy != self._strategy:
            self._strategy = strategy
            chosen = make_strategy(strategy, self._layers, self._model_hash)
            await self._completed(self._worker.call(lambda session: session.set_strategy(chosen)))
        self._worker.policy = type(self._worker.policy)(self.parameters["question_policy"])
        self._worker.queue_limit = self.parameters["queue_limit"]
        ticket = self._worker.submit(question, on_text=on_text, on_stage=on_stage)
        if on_ticket is not None:
            on_ticket(ticket)
        answer = await self._completed(ticket.result)
        if answer.report is not None and self._worker is not None:
            # A question encodes what has come in; the scene that it saw is then new to the others, too.
            self._worker.call(self._show_scene)
        return answer

    def _publish(self, answer: Answer) -> AnswerMsg:
        self._latency.add(answer)
        now_ns = self.get_clock().now().nanoseconds
        return self._outputs.publish_answer(answer, self.parameters["scene.frame_id"], now_ns)

    def _check_strategy(self, name: str) -> None:
        """Raises ValueError for a strategy that the loaded model cannot use; without a model all may be set."""
        if self._model_id:
            make_strategy(name, self._layers, self._model_hash)

    async def _beside(self, function: Callable[[], Any]) -> None:
        """Awaits a call that takes long, in a thread of its own."""
        done: ThreadFuture[None] = ThreadFuture()

        def run() -> None:
            try:
                function()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        threading.Thread(target=run, name="adatoken3d-beside", daemon=True).start()
        await self._completed(done)

    async def _completed(self, source: ThreadFuture[T]) -> T:
        """Awaits a future that another thread completes."""
        mirror: Future = Future(executor=self.executor)

        def done(_: ThreadFuture[T]) -> None:
            mirror.set_result(None)
            # A coroutine that awaits is looked at only when the executor wakes up.
            if self.executor is not None:
                self.executor.wake()

        source.add_done_callback(done)
        await mirror
        return source.result()

    # --- frames and the scene -----------------------------------------------------------------------------------------

    def _take_frame(self, frame: Any) -> None:
        if self._worker is not None:
            self._worker.submit_frame(frame)

    def _frame_done(self, fate: str) -> None:
        """Runs in the worker's thread."""
        self._inputs.frame_done(fate)
        worker = self._worker
        if fate == "key_frame" and worker is not None:
            worker.call(self._show_scene)

    def _show_scene(self, session: Any) -> None:
        """Runs in the worker's thread: copies what the others may see."""
        tokens = session.scene()
        if tokens is None:
            view = SceneView()
        else:
            xyz, rgb, count = (tensor.cpu().numpy() for tensor in (tokens.xyz.float(), tokens.rgb, tokens.count))
            view = SceneView(xyz, rgb, count, dict(session.poses), session.stamp_ns)
        self._outputs.publish_scene(view, self.parameters["scene.frame_id"])

    def _clear(self, session: Any) -> None:
        session.clear()
        self._outputs.forget_answer()
        self._show_scene(session)

    # --- diagnostics --------------------------------------------------------------------------------------------------

    def _diagnose(self) -> None:
        self._diagnostics_timer.timer_period_ns = round(self.parameters["diagnostics.period"] * 1e9)
        now_ns = self.get_clock().now().nanoseconds
        scene, worker, since = self._outputs.scene, self._worker, self._loading_since
        reports = [
            diagnostics.inputs(self._inputs.state(), self.parameters["diagnostics.stale_after"]),
            diagnostics.scene(
                self.lifecycle_state == "active",
                len(scene.poses),
                len(scene.xyz),
                (now_ns - scene.stamp_ns) / 1e9 if scene.stamp_ns else None,
                self._inputs.fates,
            ),
            diagnostics.model(
                self.lifecycle_state,
                self._model_id,
                self.parameters["strategy"],
                None if since is None else time.monotonic() - since,
                self._load_problem,
                0 if worker is None else worker.waiting,
            ),
            self._latency.report(),
            diagnostics.memory(diagnostics.read_memory(self._on_gpu)),
        ]
        name = self.get_fully_qualified_name().lstrip("/")
        self._diagnostics.publish(diagnostics.array(reports, name, self._model_id or "none", now_ns))

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends inputs and worker and sends the answers still owed. A load that is under way is left behind."""
        self._inputs.stop()
        if self._worker is not None:
            self._worker.stop(STOP_SECONDS)
        deadline = time.monotonic() + 0.3
        while self._open_answers and self.executor is not None and time.monotonic() < deadline:
            self.executor.spin_once(timeout_sec=0.01)
        logging.getLogger("adatoken3d_ros").removeHandler(self._forwarded_log)
        self._stream_server.destroy()
        self.destroy_node()


_TRANSITION_NAMES = {
    Transition.TRANSITION_CONFIGURE: "configure",
    Transition.TRANSITION_CLEANUP: "cleanup",
    Transition.TRANSITION_UNCONFIGURED_SHUTDOWN: "unconfigured_shutdown",
    Transition.TRANSITION_INACTIVE_SHUTDOWN: "inactive_shutdown",
    Transition.TRANSITION_ACTIVE_SHUTDOWN: "active_shutdown",
}


class _RosLog(logging.Handler):
    """Forwards the library's log to the node's."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._log = node.get_logger()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if record.levelno >= logging.ERROR:
            self._log.error(text)
        elif record.levelno >= logging.WARNING:
            self._log.warning(text)
        else:
            self._log.info(text)


def main() -> int:
    """Runs the node until SIGINT or SIGTERM; 0 then, 1 if a parameter given at the start cannot be used."""
    stopped: Future = Future()
    with StopSignals(stopped.set_result), rclpy.init(signal_handler_options=SignalHandlerOptions.NO):
        executor = SingleThreadedExecutor()
        try:
            node = SceneNode()
        except (InvalidParameterValueException, InvalidParameterTypeException) as error:
            print(f"adatoken3d: {error}", file=sys.stderr)
            return 1
        executor.add_node(node)
        if node.parameters["autostart"]:
            executor.create_task(node.autostart)
        try:
            executor.spin_until_future_complete(stopped)
        except ExternalShutdownException:
            node.get_logger().info("the ROS context was shut down")
        if stopped.done():
            node.get_logger().info(f"{stopped.result()}: ending")
        node.close()
        executor.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything of ROS is closed. What the interpreter would still do, taking torch apart and waiting for a worker that
    # cannot break off a load, takes seconds and serves nobody.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
