# SPDX-License-Identifier: Apache-2.0
"""The topics that answers and scenes leave on: nothing is lost, nothing stale is shown, nobody is waited for long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ros_answers import ANSWER, SCENE

from adatoken3d_ros.engine.events import Answered, Listeners, SceneReplaced, SceneView
from adatoken3d_ros.ros.outputs import publishers as p


class Outputs:
    """The node's output topics, each with a reader; `meanwhile` is called once, while `topic` is served."""

    def __init__(self) -> None:
        self.sent: dict[str, list[Any]] = {}
        self.meanwhile: dict[str, Any] = {}
        self.events = Listeners()
        node: Any = SimpleNamespace(create_publisher=self.create_publisher, create_timer=Topic().create_timer)
        self.publishers = p.Publishers(node, None, self.events)

    def create_publisher(self, kind: Any, topic: str, qos: Any) -> Any:
        def readers() -> int:
            self.meanwhile.pop(topic, lambda: None)()
            return 1

        publish = self.sent.setdefault(topic, []).append
        return SimpleNamespace(publish=publish, get_subscription_count=readers, wait_for_all_acked=lambda timeout: True)

    def shown(self) -> set[str]:
        """Namespaces of the newest markers."""
        return {marker.ns for marker in self.sent["~/markers"][-1].markers if marker.ns}


def test_markers_keep_an_answer_that_comes_while_the_scene_is_published() -> None:
    outputs = Outputs()
    outputs.meanwhile["~/scene_tokens"] = lambda: outputs.events.tell(Answered(1, ANSWER, "map", 0))
    outputs.events.tell(SCENE)
    assert outputs.shown() == {"views", "answer", "boxes", "evidence", "goal"}


def test_an_answer_brings_what_belongs_to_it_first() -> None:
    outputs, order = Outputs(), list[str]()
    for topic in ("~/retained_tokens", "~/token_report", "~/markers"):
        outputs.meanwhile[topic] = lambda topic=topic: order.append(f"{topic} {len(outputs.sent['~/answer'])}")
    outputs.events.tell(Answered(1, ANSWER, "map", 0))
    assert order == ["~/retained_tokens 0", "~/token_report 0", "~/markers 0"]
    assert [message.text for message in outputs.sent["~/answer"]] == ["there"]


def test_nothing_is_shown_of_a_scene_that_was_replaced() -> None:
    outputs = Outputs()
    outputs.events.tell(SCENE)
    outputs.events.tell(Answered(1, ANSWER, "map", 0))
    assert outputs.sent["~/retained_tokens"][-1].width == 2 and outputs.publishers.scene is SCENE
    outputs.events.tell(SceneReplaced("map"))
    outputs.events.tell(SceneView("map"))
    assert outputs.shown() == set() and outputs.sent["~/retained_tokens"][-1].width == 0
    assert outputs.sent["~/scene_tokens"][-1].width == 0


class Topic:
    """A node with one publisher whose reader acknowledges when the test says so."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.heard = True
        self.now = 0.0
        self.ticking = False

    def create_publisher(self, *_: Any) -> Any:
        return SimpleNamespace(publish=self.publish, wait_for_all_acked=lambda timeout: self.heard)

    def publish(self, message: int) -> None:
        self.sent.append(message)
        self.heard = False

    def create_timer(self, *_: Any, **__: Any) -> Any:
        def set_to(ticking: bool) -> Any:
            return lambda: setattr(self, "ticking", ticking)

        return SimpleNamespace(cancel=set_to(False), reset=set_to(True))


def test_no_answer_overtakes_the_one_before() -> None:
    topic = Topic()
    queue = p.EachHeard(topic, int, "~/answer", most=3, clock=lambda: topic.now)  # type: ignore[arg-type]
    queue.publish(1)
    assert (topic.sent, topic.ticking) == ([1], False)
    queue.publish(2)
    queue.publish(3)
    queue.serve()
    assert (topic.sent, topic.ticking, queue.waiting) == ([1], True, 2)
    topic.heard = True
    queue.serve()
    assert (topic.sent, topic.ticking) == ([1, 2], True)
    topic.heard = True
    queue.serve()
    assert (topic.sent, topic.ticking, queue.waiting) == ([1, 2, 3], False, 0)


def test_a_reader_that_does_not_hear_is_not_waited_for_and_nothing_grows() -> None:
    topic = Topic()
    queue = p.EachHeard(topic, int, "~/answer", most=3, clock=lambda: topic.now)  # type: ignore[arg-type]
    for i in range(5):
        queue.publish(i)
    assert (topic.sent, queue.waiting) == ([0, 1], 3)  # the fourth that waits has the oldest sent
    topic.now += p.PATIENCE
    queue.serve()
    assert topic.sent == [0, 1, 2]
    topic.now += 2 * p.ACK_SECONDS  # from now on it is not waited for
    queue.serve()
    assert topic.sent == [0, 1, 2, 3]
    topic.heard = True  # until it has caught up
    queue.serve()
    queue.publish(5)
    topic.now += 2 * p.ACK_SECONDS
    queue.serve()
    assert (topic.sent, queue.waiting) == ([0, 1, 2, 3, 4], 1)
    queue.flush()
    assert topic.sent == [0, 1, 2, 3, 4, 5]
