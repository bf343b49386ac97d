# SPDX-License-Identifier: Apache-2.0
"""The node `adatoken3d`: its lifecycle, and which part is told of what.

One SingleThreadedExecutor in the main thread, one worker thread. No callback waits: a question is a coroutine that
awaits its ticket. Loading and freeing the model also happen beside the executor, while the lifecycle request that asked
for it is pending; the node then still counts as being in the state that it leaves.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports, in which a signal may come
    from adatoken3d_ros.ros.signals import leave_at_once

    leave_at_once()

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.lifecycle import LifecycleNodeMixin, TransitionCallbackReturn
from rclpy.node import Node
from rclpy.task import Future

from adatoken3d_ros.engine.events import Answered, FrameTaken, Listeners
from adatoken3d_ros.engine.loading import open_scene
from adatoken3d_ros.fleet.loading import load_engine
from adatoken3d_ros.ros.autosaving import Autosave
from adatoken3d_ros.ros.awaiting import beside, finished
from adatoken3d_ros.ros.engine_owner import EngineOwner
from adatoken3d_ros.ros.inputs.topics import Inputs
from adatoken3d_ros.ros.logs import ForwardedLog, NodeLog
from adatoken3d_ros.ros.map_services import MapServices
from adatoken3d_ros.ros.outputs.health import Health
from adatoken3d_ros.ros.outputs.publishers import Publishers
from adatoken3d_ros.ros.parameters import Parameters
from adatoken3d_ros.ros.questions import Questions
from adatoken3d_ros.ros.scene_services import DIRECTORY, FILE, SceneServices, check_file
from adatoken3d_ros.ros.signals import leave
from adatoken3d_ros.ros.spinning import Failures, run, spin
from adatoken3d_ros.ros.transitions import CLEANING_UP, CONFIGURING, SHUTTING_DOWN, Transitions

SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE
STOP_SECONDS = 1.0  # how long the worker may take to end at shutdown
_SWITCH_SECONDS = 5e-4  # between threads in Python


class SceneNode(LifecycleNodeMixin, Node):
    """configure loads the model, activate starts the inputs, deactivate stops them, cleanup frees the memory.

    Args:
        load, open: see EngineOwner.
    """

    def __init__(self, load: Callable[..., Any] = load_engine, open: Callable[..., Any] = open_scene) -> None:
        Node.__init__(self, "adatoken3d")
        self._logger = NodeLog(self.get_logger().name)
        # Reentrant: a pending coroutine holds its group, and neither questions nor a load may hold up the others.
        group = ReentrantCallbackGroup()
        LifecycleNodeMixin.__init__(self, callback_group=group)
        self.lifecycle_state = "unconfigured"
        state = partial(getattr, self, "lifecycle_state")
        self.failures = failures = Failures(self.get_logger())
        change_state = self._service_change_state
        self._transitions = Transitions(change_state.callback, self._state_machine, self._slow_part, failures)
        change_state.callback = self._transitions.on_request

        self.events = events = Listeners(failures.note)
        self.engine = engine = EngineOwner(events, load, open)
        checks = {"strategy": engine.check_strategy, FILE: self._check_file}
        self.parameters = parameters = Parameters(self, state, checks)
        self.outputs = outputs = Publishers(self, group, events)
        inputs = Inputs(self, parameters, engine.take_frame, group, engine.forget, on_map_jump=engine.follow)
        self.inputs = inputs
        events.add(FrameTaken, lambda event: inputs.frame_done(event.fate))
        self.questions = questions = Questions(self, group, parameters, engine, inputs, events, state)
        SceneServices(self, group, parameters, engine)
        MapServices(self, group, parameters, engine, inputs)
        self.autosave = Autosave(self, group, parameters, engine)
        self.health = Health(self, group, parameters, engine, inputs, questions, outputs, failures, state)
        events.add(Answered, lambda event: self.health.latency.add(event.answer))
        if not self.parameters["autostart"]:
            name = self.get_fully_qualified_name()
            self.get_logger().info(
                f"unconfigured, waiting for a launch file, or for 'ros2 lifecycle set {name} configure' and 'activate' "
                "(with '-p autostart:=true' it does both by itself)"
            )
        self._forwarded_log = ForwardedLog(self.get_logger())
        logging.getLogger("adatoken3d_ros").addHandler(self._forwarded_log)

    def _check_file(self, path: str) -> None:
        """Of a directory that is declared before the file."""
        check_file(path, self.get_parameter(DIRECTORY).value)

    async def autostart(self) -> None:
        """Configures and activates, as a launch file would; a failure is logged and leaves the node where it is."""
        await self._transitions.alone(self.load())
        if self.trigger_configure() == SUCCESS:
            self.trigger_activate()

    async def _slow_part(self, goal: int) -> None:
        """What a transition would keep the executor waiting for: a load, or the end of a decode step."""
        if goal == CONFIGURING:
            await self.load()
        elif goal in (CLEANING_UP, SHUTTING_DOWN):
            await beside(self, self.autosave.finish)
            await beside(self, self.engine.stop)

    async def load(self) -> None:
        """The slow part of configure, which says what is wrong: awaits the model, or that it cannot be loaded."""
        try:
            self.inputs.check()
        except ValueError:
            return  # nobody waits for a model that could not be used
        try:
            await beside(self, self.engine.prepare)
        except ImportError:
            return
        if self.engine.queue is None:
            path = self.parameters["engine.url"] or self.parameters["model.path"] or "in the package"
            self.get_logger().info(f"loading the model {path}: seconds to minutes, the progress is on /diagnostics")
        await finished(self, self.engine.start(self.parameters.settings()))

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS with a model that is loaded; FAILURE (back to unconfigured) with the reason in the log."""
        try:
            self.inputs.check()
            self.engine.start(self.parameters.settings()).result()
        except Exception as error:
            self.engine.failed(error)
            self.get_logger().error(f"configure failed: {self.engine.problem}")
            return FAILURE
        self.lifecycle_state = "inactive"
        self.get_logger().info(
            f"configured: model {self.engine.model_id or 'not known yet'}, strategy {self.engine.strategy}"
        )
        if self.engine.restored:
            self.get_logger().info(self.engine.restored)
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
        self._release("unconfigured")
        return super().on_cleanup(state)

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        """Always SUCCESS."""
        self._release("finalized")
        return super().on_shutdown(state)

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        """SUCCESS (back to unconfigured) with everything released."""
        self._release("unconfigured")
        return SUCCESS

    def _release(self, state: str) -> None:
        self.inputs.stop()
        self.autosave.finish()
        self.engine.drop()
        self.lifecycle_state = state

    def close(self) -> None:
        """Ends inputs and worker and sends the answers still owed. A load that is under way is left behind."""
        self.inputs.stop()
        self.autosave.finish()
        self.engine.stop(STOP_SECONDS)
        self.questions.close(self.outputs.flush, self.failures.note)
        logging.getLogger("adatoken3d_ros").removeHandler(self._forwarded_log)
        self.destroy_node()


def _serve(node: SceneNode, executor: SingleThreadedExecutor, stopped: Future) -> None:
    if node.parameters["autostart"]:
        executor.create_task(node.autostart)
    try:
        spin(executor, stopped, node.failures.note)
    except ExternalShutdownException:
        node.get_logger().info("the ROS context was shut down")
    if stopped.done():
        node.get_logger().info(f"{stopped.result()}: ending")
    node.close()


def main() -> int:
    """Runs the node until SIGINT or SIGTERM; 0 then, 1 if a parameter given at the start cannot be used."""
    # Two threads share Python's lock, and the executor's has little to do but must not wait: by default it would for
    # 5 ms each time that the worker is in Python.
    sys.setswitchinterval(_SWITCH_SECONDS)
    return run("adatoken3d", SceneNode, _serve, refused=1)


if __name__ == "__main__":
    leave(main())  # a worker that cannot break off a load is not waited for
