# SPDX-License-Identifier: Apache-2.0
"""Many questions at once over the real middleware: each is answered, with a status, on its way and on `~/answer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rclpy")

from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from rclpy.action import ActionClient
from rclpy.qos import DurabilityPolicy, QoSProfile
from ros_graph import Camera, Graph, synthetic_frame
from std_msgs.msg import String

MANY = 200
DEEP = QoSProfile(depth=1000)
NAME = "/adatoken3d"
ALLOWED = {Answer.BUSY, Answer.TRUNCATED}


class Live:
    """A node that has seen something, and all that it says on `~/answer`."""

    def __init__(self, graph: Graph, model: Path) -> None:
        self.graph = graph
        self.process = graph.start_node(model, autostart="true", budget__warm_up="false", max_new_tokens=2)
        self.heard: list[Any] = graph.collect(Answer, f"{NAME}/answer", DEEP)
        self.ask = graph.node.create_client(AskScene, f"{NAME}/ask", qos_profile=DEEP)
        self.question = graph.node.create_publisher(String, "/question", DEEP)
        self.stream = ActionClient(
            graph.node, AskSceneStream, f"{NAME}/ask_stream", goal_service_qos_profile=DEEP,
            result_service_qos_profile=DEEP, feedback_sub_qos_profile=DEEP,
        )  # fmt: skip
        camera = Camera(graph)
        graph.wait(camera.matched, "the node's inputs")
        graph.wait(self.question.get_subscription_count, "the node's questions")
        graph.wait(lambda: self.ask.service_is_ready() and self.stream.server_is_ready(), "the node's services")
        stamp = 1_700_000_000_000_000_000
        while not self.heard or self.heard[-1].status == Answer.NO_SCENE:
            stamp += 1_000_000_000
            camera.send(camera.messages(stamp, *synthetic_frame(0)))
            graph.result(self.ask.call_async(AskScene.Request(question="Anything?")), "an answer")

    def until_heard(self, questions: set[str]) -> Counter[int]:
        """Waits until each question's answer was heard on the topic; how many had which status."""
        self.graph.wait(lambda: questions <= {answer.question for answer in self.heard}, "an answer to each question")
        told = [answer for answer in self.heard if answer.question in questions]
        assert len(told) == len(questions)
        return Counter(answer.status for answer in told)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Live]:
    graph = Graph(tmp_path_factory.mktemp("graph"))
    try:
        yield Live(graph, tiny_model)
    finally:
        graph.close()


def test_requests_of_one_client(live: Live) -> None:
    texts = [f"Request {i}?" for i in range(MANY)]
    futures = [live.ask.call_async(AskScene.Request(question=text)) for text in texts]
    live.graph.wait(lambda: all(future.done() for future in futures), "a response to each request")
    answers = [future.result().answer for future in futures]
    assert [answer.question for answer in answers] == texts
    assert {answer.status for answer in answers} <= ALLOWED
    refused = [answer for answer in answers if answer.status == Answer.BUSY]
    assert refused and all("questions are waiting already" in answer.status_message for answer in refused)
    assert live.until_heard(set(texts)) == Counter(answer.status for answer in answers)


def test_questions_on_the_topic(live: Live) -> None:
    texts = [f"Message {i}?" for i in range(MANY)]
    for text in texts:
        live.question.publish(String(data=text))
    assert set(live.until_heard(set(texts))) <= ALLOWED


def test_goals_of_one_client(live: Live) -> None:
    texts = [f"Goal {i}?" for i in range(MANY)]
    goals = [live.stream.send_goal_async(AskSceneStream.Goal(question=text)) for text in texts]
    live.graph.wait(lambda: all(goal.done() for goal in goals), "a reply to each goal")
    results = [goal.result().get_result_async() for goal in goals]
    live.graph.wait(lambda: all(result.done() for result in results), "a result of each goal")
    assert [result.result().result.answer.question for result in results] == texts
    assert set(live.until_heard(set(texts))) <= ALLOWED


def test_who_comes_late_gets_the_latest_answer_only(live: Live) -> None:
    question = "The last one?"
    live.graph.result(live.ask.call_async(AskScene.Request(question=question)), "an answer")
    live.until_heard({question})
    late = live.graph.collect(
        Answer, f"{NAME}/answer", QoSProfile(depth=100, durability=DurabilityPolicy.TRANSIENT_LOCAL)
    )
    live.graph.wait(lambda: late, "the latest answer")
    live.graph.result(live.ask.call_async(AskScene.Request(question="And now?")), "an answer")
    live.graph.wait(lambda: late[-1].question == "And now?", "the next answer")
    assert [answer.question for answer in late] == [question, "And now?"]
