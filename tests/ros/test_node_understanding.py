# SPDX-License-Identifier: Apache-2.0
"""The model in the package, in a node of its own: what it does not understand is said over DDS."""

from __future__ import annotations

import math

from action_msgs.msg import GoalStatus
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from geometry_msgs.msg import Point, PointStamped
from rclpy.action import ActionClient
from ros_graph import Graph
from seeing_node import NAME, SeeingNode

from adatoken3d_ros.weights import embedded_path


def test_what_is_not_understood_is_said(graph: Graph) -> None:
    live = SeeingNode(graph, embedded_path())
    for question, said in (
        ("Describe the room.", "does not know the word Describe"),
        ("Is it safe to drive forward?", "does not know the words safe, drive, forward"),
        ("Is there a dragon in the room?", "does not know the word dragon"),
        ("Wo ist der Tisch?", "does not know the words Wo, ist, der, Tisch"),
    ):
        answer = live.ask(question)
        assert (answer.status, answer.confidence) == (Answer.UNSURE, 0.0) and said in answer.status_message
    answer = live.ask("Is there a table in the room?")
    assert (answer.status, answer.status_message) == (Answer.OK, "") and 0.0 < answer.confidence < 1.0
    nothing = live.ask("what is <image>")
    assert nothing.status == Answer.INVALID_REQUEST and math.isnan(nothing.confidence)

    assert live.set("click_question", "What is the object at {p}?").successful
    clicks = graph.node.create_publisher(PointStamped, "/clicked_point", 10)
    graph.wait(clicks.get_subscription_count, "a subscriber of clicked_point")
    clicks.publish(PointStamped(point=Point(x=2.0, y=0.25, z=1.0)))
    written = "What is the object at [2.000, 0.250, 1.000]?"
    clicked = graph.wait(lambda: [one for one in live.answers if one.question == written], "an answer")[0]
    assert clicked.status == Answer.OK and clicked.confidence > 0

    client = ActionClient(graph.node, AskSceneStream, f"{NAME}/ask_stream")
    graph.wait(client.server_is_ready, "the action")
    goal = graph.result(client.send_goal_async(AskSceneStream.Goal(question="Describe the room.")), "a goal")
    ended = graph.result(goal.get_result_async(), "its result")
    assert ended.status == GoalStatus.STATUS_SUCCEEDED and ended.result.answer.status == Answer.UNSURE
    client.destroy()
