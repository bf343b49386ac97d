# SPDX-License-Identifier: Apache-2.0
"""The node `adatoken3d`: wiring between topics, services and the worker's thread that owns the model.

One SingleThreadedExecutor in the main thread, one worker thread. No callback waits: a question is a coroutine that
awaits its ticket. Loading and freeing the model also happen beside the executor, while the lifecycle request that asked
for it is pending; the node then still counts as being in the state that it leaves.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, in which a signal may come
    from adatoken3d_ros.ros.signals import leave_at_once

    leave_at_once()

import importlib
import logging
import sys
import time
from concurrent.futures import Future as ThreadFuture
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidParameterTypeException, InvalidParameterValueException
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.signals import SignalHandlerOptions
from rclpy.task import Future

from adatoken3d_ros.engine.loading import ModelSettings, load_engine, make_strategy, open_scene
from adatoken3d_ros.engine.out_of_memory import free_cached, trim_heap
from adatoken3d_ros.requirements import advice, missing
from adatoken3d_ros.ros.awaiting import beside, completed
from adatoken3d_ros.ros.inputs.topics import Inputs, Offer
from adatoken3d_ros.ros.logs import WARN_SECONDS, ForwardedLog, NodeLog
from adatoken3d_ros.ros.outputs import diagnostics
from adatoken3d_ros.ros.outputs.publishers import Publishers, SceneView
from adatoken3d_ros.ros.parameters import Parameters, at_start
from adatoken3d_ros.ros.questions import Questions
from adatoken3d_ros.ros.scene_services import DIRECTORY, FILE, SceneServices, inside
from adatoken3d_ros.ros.signals import StopSignals, leave
from adatoken3d_ros.ros.spinning import spin
from adatoken3d_ros.ros.transitions import CLEANING_UP, CONFIGURING, SHUTTING_DOWN, requested
from adatoken3d_ros.text import described, shown, trace

if TYPE_CHECKING:
    from adatoken3d_ros.engine.budget.latency import LatencyModel
    from adatoken3d_ros.engine.scene_memory import SceneMemory
    from adatoken3d_ros.engine.scene_queue import SceneQueue
    from adatoken3d_ros.engine.worker import Worker
    from adatoken3d_ros.pruning.strategy import Strategy

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
LATE_JOINER_PERIOD = 0.25  # seconds between two looks for subscribers that came late
STOP_SECONDS = 1.0  # how long the worker may take to end at shutdown
_SWITCH_SECONDS = 5e-4  # between threads in Python


class SceneNode(LifecycleNodeMixin, Node):
    """configure loads the model, activate starts the inputs, deactivate stops them, cleanup frees the memory."""

    def __init__(self) -> None:
        Node.__init__(self, "adatoken3d")
        self._logger = NodeLog(self.get_logger().name)
        # Reentrant: a pending coroutine holds its group, and neither questions nor a load may hold up the others.
        self._group = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=self._group)
        self._transition = self._service_change_state.callback
        self._service_change_state.callback = self._on_change_state
        self._changing = False
        self.lifecycle_state = "unconfigured"
        self._thread: Worker | None = None
        self.worker: SceneQueue | None = None
        self._model_id = ""
        self.layers = 0
        self.model_hash = ""
        self.fitted: dict[str, Strategy] = {}
        self._on_gpu = False
        self._loading: diagnostics.Loading | None = None
        self._loading_since = 0.0
        self._namesakes = 0
        self._speed: LatencyModel | None = None
        self._memory: SceneMemory | None = None
        self.load_problem = ""
        self.strategy = ""
        self.failures = 0  # callbacks that raised
        self.last_failure = ""

        checks = {"strategy": self._check_strategy, FILE: self._check_file}
        self.parameters = Parameters(self, lambda: self.lifecycle_state, checks)
        self.outputs = Publishers(self)
        self.inputs = Inputs(self, self.parameters, self._take_frame, self._group, self._clear_scene)
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", 10)
        self._questions = Questions(self, self._group)
        SceneServices(self, self._group)
        # Steady clocks: simulated time may stand still, these must not.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(LATE_JOINER_PERIOD, self.outputs.serve, clock=steady, callback_group=self._group)
        self._diagnostics_timer = self.create_timer(
            self.parameters["diagnostics.period"], self._diagnose, clock=steady, callback_group=self._group
        )
        if not self.parameters["autostart"]:
            name = self.get_fully_qualified_name()
            self.get_logger().info(
                f"unconfigured, waiting for a launch file, or for 'ros2 lifecycle set {name} configure' and 'activate' "
                "(with '-p autostart:=true' it does both by itself)"
            )
        self._forwarded_log = ForwardedLog(self.get_logger())
        logging.getLogger("adatoken3d_ros").addHandler(self._forwarded_log)

    # --- lifecycle ----------------------------------------------------------------------------------------------------

    async def autostart(self) -> None:
        """Configures and activates, as a launch file would; a failure is logged and leaves the node where it is."""
        self._changing = True
        try:
            await self._load()
            if self.trigger_configure() == SUCCESS:
                self.trigger_activate()
        finally:
            self._changing = False

    async def _on_change_state(self, request: Any, response: Any) -> Any:
        """Does the slow part of a transition beside the executor, then lets the state machine make it."""
        if self._changing:
            self.get_logger().error(
                "another lifecycle transition is still under way", throttle_duration_sec=WARN_SECONDS
            )
            response.success = False
            return response
        # Nothing is loaded or ended for what the state machine would refuse.
        try:
            wanted = requested(request.transition, self._state_machine.available_transitions)
        except ValueError as error:
            text = f"the node is {self.lifecycle_state}: {error}"
            self.get_logger().error(text, throttle_duration_sec=WARN_SECONDS)
            response.success = False
            return response
        self._changing = True
        try:
            if wanted.goal == CONFIGURING:
                await self._load()
            elif wanted.goal in (CLEANING_UP, SHUTTING_DOWN):
                await self._unload()
            return self._transition(request, response)
        except Exception as error:
            self.callback_failed(error)
            response.success = False
            return response
        finally:
            self._changing = False

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS with a model that is loaded; FAILURE (back to unconfigured) with the reason in the log."""
        try:
            self.inputs.check()
            self._start_loading().ready.result()
        except Exception as error:
            self.load_problem = advice(missing()) or shown(error)
            self.get_logger().error(f"configure failed: {self.load_problem}")
            self._drop_worker()
            return FAILURE
        self.lifecycle_state = "inactive"
        self.get_logger().info(f"configured: model {self._model_id}, strategy {self.strategy}")
        return super().on_configure(state)

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS once inputs are subscribed to; FAILURE (back to inactive) with the reason in the log."""
        try:
            self.inputs.start()
        except ValueError as error:
            self.get_logger().error(f"activate failed: {error}")
            return FAILURE
        self.lifecycle_state = "active"
        return super().on_activate(state)

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS; questions that run are answered."""
        self.inputs.stop()
        self.lifecycle_state = "inactive"
        return super().on_deactivate(state)

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS; the scene and the model are gone afterwards."""
        self._drop_worker()
        self.lifecycle_state = "unconfigured"
        return super().on_cleanup(state)

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS."""
        self.inputs.stop()
        self._drop_worker()
        self.lifecycle_state = "finalized"
        return super().on_shutdown(state)

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS (back to unconfigured) with everything released."""
        self.inputs.stop()
        self._drop_worker()
        self.lifecycle_state = "unconfigured"
        return SUCCESS

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded."""
        return self._loading is not None

    def _start_loading(self) -> SceneQueue:
        if self.worker is None:
            from adatoken3d_ros.engine.worker import Worker

            settings = ModelSettings.from_parameters(self.parameters)
            path = self.parameters["model.path"] or "in the package"
            self.get_logger().info(f"loading the model {path}: seconds to minutes, the progress is on /diagnostics")
            self.load_problem = ""
            self._loading_since = time.monotonic()
            self._loading = diagnostics.Loading(0.0)
            self._thread = Worker(partial(self._load_engine, settings), ahead=self.parameters["budget.background"])
            self.worker = self._thread.open(
                partial(self._open_scene, settings),
                on_frame=self._frame_done,
                refuse_late=self.parameters["budget.infeasible"] == "refuse",
            )
            self._thread.start()
        return self.worker

    def _load_engine(self, settings: ModelSettings) -> Any:
        """Runs in the worker's thread; a model of gigabytes takes a while."""
        try:
            return load_engine(settings, self._load_progress)
        finally:
            self._loading = None

    def _open_scene(self, settings: ModelSettings, engine: Any) -> Any:
        """Runs in the worker's thread."""
        scene = open_scene(engine, settings)
        self._model_id, self.strategy = engine.model_id, settings.strategy
        self.layers, self.model_hash, self.fitted = engine.n_layers, engine.model.identity, engine.fitted
        self._on_gpu = engine.model.device.type == "cuda"
        self._speed, self._memory = scene.controller.latency, scene.memory
        return scene

    def _load_progress(self, share: float, step: str) -> None:
        """Runs in the worker's thread."""
        self._loading = diagnostics.Loading(time.monotonic() - self._loading_since, share, step)

    async def _load(self) -> None:
        try:
            self.inputs.check()
        except ValueError:
            return  # on_configure says why, and nobody has waited for a model
        # The engine brings torch with it, seconds of importing: neither at the start nor in the executor's thread.
        try:
            await beside(self, partial(importlib.import_module, "adatoken3d_ros.engine.worker"))
        except ImportError:  # configure tells of it
            return
        worker = self._start_loading()
        done: ThreadFuture[None] = ThreadFuture()
        worker.ready.add_done_callback(lambda _: done.set_result(None))
        await completed(self, done)

    async def _unload(self) -> None:
        """Ends the worker without keeping the executor waiting for the decode step that it is in."""
        if self._thread is not None:
            await beside(self, self._thread.stop)

    def _drop_worker(self) -> None:
        thread, self._thread, self.worker = self._thread, None, None
        if thread is not None:
            thread.stop()
        self._model_id, self._speed, self._memory = "", None, None
        self.outputs.forget_answer(self.parameters["scene.frame_id"])
        self.outputs.publish_scene(SceneView(), self.parameters["scene.frame_id"])
        free_cached(gpu=self._on_gpu)
        self._on_gpu = False

    def _check_strategy(self, name: str) -> None:
        """Raises ValueError for a strategy that the loaded model cannot use; without a model all may be set."""
        if self._model_id:
            make_strategy(name, self.layers, self.model_hash, self.fitted)

    def _check_file(self, path: str) -> None:
        """Raises ValueError for a scene file that is not in scene.directory, which is declared before it."""
        if path:
            inside(self.get_parameter(DIRECTORY).value, path)

    # --- frames and the scene -----------------------------------------------------------------------------------------

    def _take_frame(self, offer: Offer) -> None:
        if self.worker is None:
            self.inputs.frame_done("stopped")
        else:
            self.worker.submit_frame(offer.draw, offer.view)

    def _clear_scene(self) -> None:
        """The inputs' time has jumped back; runs in the executor's thread."""
        if self.worker is not None:
            self.worker.call(self.clear)

    def _frame_done(self, fate: str) -> None:
        """Runs in the worker's thread."""
        self.inputs.frame_done(fate)
        worker = self.worker
        if fate == "key_frame" and worker is not None:
            worker.call(self.show_scene, chore=True)

    def show_scene(self, scene: Any) -> None:
        """Runs in the worker's thread: copies what the others may see."""
        tokens = scene.tokens()
        if tokens is None:
            view = SceneView()
        else:
            xyz, rgb, count = (tensor.cpu().numpy() for tensor in (tokens.xyz.float(), tokens.rgb, tokens.count))
            view = SceneView(xyz, rgb, count, dict(scene.poses), scene.stamp_ns)
        self.outputs.publish_scene(view, self.parameters["scene.frame_id"])

    def clear(self, scene: Any) -> None:
        scene.clear()
        trim_heap()
        self.outputs.forget_answer(self.parameters["scene.frame_id"])
        self.show_scene(scene)

    # --- diagnostics --------------------------------------------------------------------------------------------------

    def _diagnose(self) -> None:
        self._diagnostics_timer.timer_period_ns = round(self.parameters["diagnostics.period"] * 1e9)
        now_ns = self.get_clock().now().nanoseconds
        scene, worker, loading = self.outputs.scene, self.worker, self._loading
        if loading is not None:
            loading = replace(loading, seconds=time.monotonic() - self._loading_since)
        stale_after, min_rate = self.parameters["diagnostics.stale_after"], self.parameters["diagnostics.min_rate"]
        reports = [
            diagnostics.inputs(self.inputs.state(), stale_after, min_rate),
            diagnostics.scene(
                self.lifecycle_state == "active",
                len(scene.poses),
                len(scene.xyz),
                (now_ns - scene.stamp_ns) / 1e9 if scene.stamp_ns and now_ns else None,
                self.inputs.fates,
                0 if self._memory is None else self._memory.given_up,
            ),
            diagnostics.model(
                self.lifecycle_state,
                self._model_id,
                self.parameters["strategy"],
                loading,
                self.load_problem or self._questions.problem,
                0 if worker is None else worker.waiting,
                self._count_namesakes(),
                self.failures,
                self.last_failure,
            ),
            self._questions.latency.report(
                {} if self._speed is None else self._speed.drift, self._questions.taken, self.outputs.waiting
            ),
            diagnostics.memory(diagnostics.read_memory(self._on_gpu)),
        ]
        name = self.get_fully_qualified_name().lstrip("/")
        self._diagnostics.publish(diagnostics.array(reports, name, self._model_id or "none", now_ns))

    def _count_namesakes(self) -> int:
        """Other nodes of this name; a new one is logged."""
        before = self._namesakes
        own = self.get_name(), self.get_namespace()
        self._namesakes = self.get_node_names_and_namespaces().count(own) - 1
        if self._namesakes > before:
            self.get_logger().warning(
                f"{self._namesakes + 1} nodes are named {self.get_fully_qualified_name()}, and each may answer in the "
                "others' place: give one another name or namespace (one that was killed is seen for a while)"
            )
        return max(0, self._namesakes)

    def callback_failed(self, error: Exception) -> None:
        """An exception came out of a callback; the node goes on without what that one would have done."""
        self.failures += 1
        self.last_failure = described(error)
        self.get_logger().error(
            trace(error, heading=f"a callback failed, the node goes on (failure {self.failures})"),
            throttle_duration_sec=WARN_SECONDS,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Ends inputs and worker and sends the answers still owed. A load that is under way is left behind."""
        self.inputs.stop()
        if self._thread is not None:
            self._thread.stop(STOP_SECONDS)
        self._questions.close()
        logging.getLogger("adatoken3d_ros").removeHandler(self._forwarded_log)
        self.destroy_node()


def main() -> int:
    """Runs the node until SIGINT or SIGTERM; 0 then, 1 if a parameter given at the start cannot be used."""
    # Two threads share Python's lock, and the executor's has little to do but must not wait: by default it would for
    # 5 ms each time that the worker is in Python.
    sys.setswitchinterval(_SWITCH_SECONDS)
    stopped: Future = Future()
    with StopSignals(stopped.set_result):
        rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
        try:
            return _run(stopped)
        finally:
            rclpy.try_shutdown()


def _run(stopped: Future) -> int:
    executor = SingleThreadedExecutor()
    try:
        node = SceneNode()
    except (InvalidParameterValueException, InvalidParameterTypeException) as error:
        print(f"adatoken3d: {at_start(error)}", file=sys.stderr)
        return 1
    executor.add_node(node)
    if node.parameters["autostart"]:
        executor.create_task(node.autostart)
    try:
        spin(executor, stopped, node.callback_failed)
    except ExternalShutdownException:
        node.get_logger().info("the ROS context was shut down")
    if stopped.done():
        node.get_logger().info(f"{stopped.result()}: ending")
    node.close()
    executor.shutdown()
    return 0


if __name__ == "__main__":
    leave(main())  # a worker that cannot break off a load is not waited for
