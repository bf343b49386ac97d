# SPDX-License-Identifier: Apache-2.0
"""Lifecycle transitions in every order, over the node's own services; the model is loaded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

pytest.importorskip("rclpy")

import rclpy
from adatoken3d.srv import AskScene
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from ros_graph import claim_domain

from adatoken3d_ros.engine.answer import Status
from adatoken3d_ros.engine.session import SceneSession, SessionConfig
from adatoken3d_ros.ros.node import SceneNode

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

    def __init__(self) -> None:
        self.node = SceneNode()
        self._client = Node("talker")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self.node)
        self._executor.add_node(self._client)
        self._clients = {
            kind: self._client.create_client(kind, f"/adatoken3d/{name}")
            for kind, name in ((ChangeState, "change_state"), (GetState, "get_state"), (AskScene, "ask"))
        }
        for client in self._clients.values():
            assert client.wait_for_service(60.0)

    def call(self, request: Any, kind: Any) -> Any:
        future = self._clients[kind].call_async(request)
        self._executor.spin_until_future_complete(future, timeout_sec=60.0)
        return future.result()

    def change(self, label: str) -> bool:
        request = ChangeState.Request()
        request.transition.label = label
        return bool(self.call(request, ChangeState).success)

    def check(self, state: str) -> None:
        assert self.call(GetState.Request(), GetState).current_state.label == state == self.node.lifecycle_state
        answer = self.call(AskScene.Request(question="What?"), AskScene).answer
        status, text = ANSWERS[state]
        assert answer.status == status and text in answer.status_message, (state, answer.status_message)

    def close(self) -> None:
        self.node.close()
        self._client.destroy_node()
        self._executor.shutdown()


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
def talk(context: Context, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Talk]:
    def load(settings: Any, progress: Any) -> SceneSession:
        progress(1.0, "nothing to read")
        return SceneSession(*loaded, SessionConfig(max_new_tokens=2))

    monkeypatch.setattr("adatoken3d_ros.ros.node.load_session", load)
    made = Talk()
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
