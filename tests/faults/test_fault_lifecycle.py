# SPDX-License-Identifier: Apache-2.0
"""Lifecycle transitions in every order, over the node's own services; the model is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from adatoken3d.srv import AskScene
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from rclpy.task import Future
from ros_graph import claim_domain
from rosgraph_msgs.msg import Clock
from safetensors import SafetensorError
from std_srvs.srv import Trigger

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.engine.events import Answered
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.ros.node import SceneNode
from adatoken3d_ros.ros.scene_services import scene_directory
from adatoken3d_ros.ros.spinning import spin

LABELS = ("configure", "activate", "deactivate", "cleanup")
NEXT = {
    ("unconfigured", "configure"): "inactive",
    ("inactive", "activate"): "active",
    ("active", "deactivate"): "inactive",
    ("inactive", "cleanup"): "unconfigured",
}
ANSWERS = {
    "unconfigured": (Status.ERROR, "unconfigured, not active"),
    "inactive": (Status.ERROR, "inactive, not active"),
    "active": (Status.NO_SCENE, "nothing has come on /rgb/image"),
    "finalized": (Status.ERROR, "finalized, not active"),
}


def every_order(n: int) -> list[str]:
    """The shortest walk in which each sequence of n labels occurs (a de Bruijn sequence, by greedy extension)."""
    walk, left = [LABELS[-1]] * (n - 1), set(product(LABELS, repeat=n))
    while left:
        step = next((label for label in LABELS if (*walk[len(walk) - n + 1 :], label) in left), None)
        assert step is not None
        walk.append(step)
        left.discard(tuple(walk[-n:]))
    return walk


class Talk:
    """A node under test and one that talks to it, in one executor."""

    def __init__(self, load: Callable[..., Engine], open: Callable[..., Scene]) -> None:
        self.node = SceneNode(load, open)
        self.talker = Node("talker")
        self.executor = SingleThreadedExecutor()
        self.executor.add_node(self.node)
        self.executor.add_node(self.talker)
        self._clients = {
            kind: self.talker.create_client(kind, f"/adatoken3d/{name}")
            for kind, name in (
                (ChangeState, "change_state"),
                (GetState, "get_state"),
                (AskScene, "ask"),
                (Trigger, "save_scene"),
            )
        }
        for client in self._clients.values():
            assert client.wait_for_service(60.0)

    def call(self, request: Any, kind: Any) -> Any:
        future = self._clients[kind].call_async(request)
        self.executor.spin_until_future_complete(future, timeout_sec=60.0)
        return future.result()

    def change(self, label: str = "", number: int = 0) -> bool:
        request = ChangeState.Request()
        request.transition.label, request.transition.id = label, number
        return bool(self.call(request, ChangeState).success)

    def check(self, state: str) -> None:
        assert self.call(GetState.Request(), GetState).current_state.label == state == self.node.lifecycle_state
        answer = self.call(AskScene.Request(question="What?"), AskScene).answer
        status, text = ANSWERS[state]
        assert answer.status == status and text in answer.status_message, (state, answer.status_message)

    def close(self) -> None:
        self.node.close()
        self.talker.destroy_node()
        self.executor.shutdown()


@pytest.fixture(scope="module")
def context() -> Iterator[Context]:
    domain, lock = claim_domain()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
        rclpy.init(args=["--ros-args", "-p", "pose.source:=pose_topic"], domain_id=domain)
    yield rclpy.get_default_context()
    rclpy.shutdown()
    lock.close()


@pytest.fixture
def talk(context: Context, loaded: tuple[Any, Any]) -> Iterator[Talk]:
    def load(settings: Any, progress: Any) -> Engine:
        progress(1.0, "nothing to read")
        return Engine(*loaded)

    def open_scene(engine: Engine, settings: Any) -> Scene:
        return engine.open(SessionConfig(max_new_tokens=2))

    made = Talk(load, open_scene)
    yield made
    made.close()


def test_the_walk_has_every_order_of_three() -> None:
    walk = every_order(3)
    assert {tuple(walk[i : i + 3]) for i in range(len(walk) - 2)} == set(product(LABELS, repeat=3))
    assert len(walk) == 4**3 + 2


def test_transitions_in_every_order(talk: Talk) -> None:
    """What is no transition of a state is refused and changes nothing; the node says what it is and answers so."""
    state = "unconfigured"
    visited = set()
    for label in every_order(3):
        expected = NEXT.get((state, label))
        visited.add((state, label))
        assert talk.change(label) == (expected is not None), (state, label)
        state = expected or state
        talk.check(state)
    assert visited == set(product(("unconfigured", "inactive", "active"), LABELS))


@pytest.mark.parametrize("way", [(), ("configure",), ("configure", "activate")], ids=len)
def test_shutdown_from_every_state_is_the_end(talk: Talk, way: tuple[str, ...]) -> None:
    for label in way:
        assert talk.change(label)
    assert talk.change("shutdown")
    for label in ("", *LABELS, "shutdown"):
        if label:
            assert not talk.change(label)
        talk.check("finalized")


# What leads out of each state, by id; every other id and label is refused.
OUT = {
    "unconfigured": {Transition.TRANSITION_CONFIGURE, Transition.TRANSITION_UNCONFIGURED_SHUTDOWN},
    "inactive": {
        Transition.TRANSITION_CLEANUP, Transition.TRANSITION_ACTIVATE, Transition.TRANSITION_INACTIVE_SHUTDOWN
    },
    "active": {Transition.TRANSITION_DEACTIVATE, Transition.TRANSITION_ACTIVE_SHUTDOWN},
    "finalized": set(),
}  # fmt: skip
IDS = (*range(12), *range(20, 70, 10), 61, 62, 97, 98, 99, 100, 127, 200, 255)
NO_LABELS = ("shutdown now", "Shutdown", "unconfigured_shutdown", "active_shutdown", "inactive_shutdown", "shutdown\n",
             "transition_success", "configured", "x" * 100_000)  # fmt: skip


@pytest.mark.parametrize(
    ("state", "way"),
    [
        ("unconfigured", ()),
        ("inactive", ("configure",)),
        ("active", ("configure", "activate")),
        ("finalized", ("shutdown",)),
    ],
)
def test_a_refused_transition_changes_nothing(talk: Talk, state: str, way: tuple[str, ...]) -> None:
    """By id and by label, of each state; and where both are given, the label counts, as in rcl."""
    for label in way:
        assert talk.change(label)
    worker = talk.node.engine.queue

    def unharmed() -> bool:
        """The worker is the one before, and does what it is called for."""
        return talk.node.engine.queue is worker and (worker is None or worker.call(lambda _: True).result(60.0))

    for number in set(IDS) - OUT[state]:
        assert not talk.change(number=number), (state, number)
        assert unharmed(), (state, number)
    allowed = {label for (start, label) in NEXT if start == state} | ({"shutdown"} if OUT[state] else set())
    for label in (set(LABELS) | {*NO_LABELS, "shutdown"}) - allowed:
        assert not talk.change(label, min(OUT[state], default=0)), (state, label[:20])
        assert unharmed(), (state, label[:20])
    talk.check(state)
    for label in sorted(allowed - {"shutdown"})[:1]:
        assert talk.change(label, 255)
        talk.check(NEXT[state, label])


def test_a_load_that_breaks_is_a_refused_transition(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an exception in the executor, where it would end the node and leave the caller without a response."""

    def broken() -> None:
        raise RuntimeError("no engine here")

    with monkeypatch.context() as patch:
        patch.setattr(talk.node.engine, "prepare", broken)
        assert not talk.change("configure")
    assert (talk.node.failures.count, talk.node.failures.last) == (1, "RuntimeError: no engine here")
    talk.check("unconfigured")
    assert talk.change("configure")


def test_an_exception_in_a_callback_costs_that_callback(talk: Talk) -> None:
    """No memory for diagnostics, and a clock that is negative: the node goes on, and says what happened."""
    for label in ("configure", "activate"):
        assert talk.change(label)
    for name, value in (("use_sim_time", True), ("diagnostics.period", 0.05)):
        assert talk.node.set_parameters([Parameter(name, value=value)])[0].successful
    publisher = talk.talker.create_publisher(Clock, "/clock", QoSProfile(depth=1))

    def no_memory(on_gpu: bool) -> Any:
        raise MemoryError("no memory left")

    def spin_until(condition: Any) -> None:
        stopped: Future = Future()
        timer = talk.talker.create_timer(0.01, lambda: condition() and not stopped.done() and stopped.set_result(None))
        spin(talk.executor, stopped, talk.node.failures.note)
        talk.talker.destroy_timer(timer)

    read_memory, talk.node.health.read_memory = talk.node.health.read_memory, no_memory
    spin_until(lambda: talk.node.failures.count >= 2)
    talk.node.health.read_memory = read_memory
    assert talk.node.failures.last == "MemoryError: no memory left"

    def negative() -> bool:
        message = Clock()
        message.clock.sec = -1
        publisher.publish(message)
        return "must not be negative" in talk.node.failures.last

    spin_until(negative)
    # What is still under way of that clock would come out of the executor that `check` spins.
    assert talk.node.set_parameters([Parameter("use_sim_time", value=False)])[0].successful
    talk.check("active")


def test_an_error_of_a_library_is_the_response_of_the_service(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full: safetensors has an exception of its own."""
    for label in ("configure", "activate"):
        assert talk.change(label)
    path = str(scene_directory("") / "full.scene")
    assert talk.node.set_parameters([Parameter("scene.file", value=path)])[0].successful

    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)\n[FATAL] forged")

    with monkeypatch.context() as patch:
        patch.setattr(Scene, "save", full)
        patch.setattr("pathlib.Path.mkdir", lambda *_, **__: None)
        response = talk.call(Trigger.Request(), Trigger)
    said = "SafetensorError: I/O error: No space left on device (os error 28)\\n[FATAL] forged"
    assert (response.success, response.message) == (False, said)
    talk.check("active")


def test_an_answer_that_cannot_be_published_is_still_the_response(talk: Talk) -> None:
    def broken(event: Answered) -> None:
        raise MemoryError("no memory left")

    talk.node.events.add(Answered, broken)
    talk.check("unconfigured")
    assert talk.node.failures.last == "MemoryError: no memory left"
