# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, with the tiny model: questions in every way they can be asked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from action_msgs.msg import GoalStatus
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer, TokenReport
from geometry_msgs.msg import Point, PointStamped
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters
from rclpy.action import ActionClient
from ros_graph import Graph
from seeing_node import NAME, STAMP, VIEWS, SeeingNode
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import String
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.pruning.strategy import default_strategy


@pytest.fixture(scope="module")
def live(shared_graph: Graph, tiny_model: Path) -> Iterator[SeeingNode]:
    yield SeeingNode(shared_graph, tiny_model)


def test_a_question_over_the_service(live: SeeingNode) -> None:
    before = len(live.answers)
    answer = live.ask()
    assert answer.status == Answer.TRUNCATED, answer.status_message
    assert "max_new_tokens = 8" in answer.status_message
    assert answer.question == "What is there?" and answer.text
    newest = STAMP + (VIEWS - 1) * 100_000_000
    assert (answer.header.stamp.sec, answer.header.stamp.nanosec) == divmod(newest, 10**9)
    assert answer.header.frame_id == "map"
    assert answer.data_age > 0
    assert 0 < answer.retained_tokens < answer.spatial_tokens
    assert 0 < answer.prefill_flops < answer.prefill_flops_unpruned
    assert answer.strategy and answer.model_id.startswith("tiny@")
    stages = [answer.queue_ms, answer.encode_ms, answer.tokens_ms, answer.prefill_ms, answer.decode_ms]
    assert sum(stages) == pytest.approx(answer.total_ms, rel=1e-3)
    live.graph.wait(lambda: len(live.answers) > before, "the answer on the topic")
    assert str(live.answers[-1]) == str(answer)  # its confidence is NaN, which equals nothing


def test_the_same_question_has_the_same_answer(live: SeeingNode) -> None:
    first, second = live.ask("And now?"), live.ask("And now?")
    assert (first.text, first.retained_tokens, first.prefill_flops) == (
        second.text,
        second.retained_tokens,
        second.prefill_flops,
    )


def test_clouds_report_and_markers_agree_with_the_answer(live: SeeingNode) -> None:
    """Also for those who subscribe after the answer."""
    answer = live.ask("Where is it?")
    topics = {"scene_tokens": PointCloud2, "retained_tokens": PointCloud2, "token_report": TokenReport}
    found = {name: live.graph.collect(kind, f"{NAME}/{name}") for name, kind in topics.items()}
    markers = live.graph.collect(MarkerArray, f"{NAME}/markers")
    live.graph.wait(lambda: all(found.values()) and markers, "the outputs")
    scene, retained, report = (messages[-1] for messages in found.values())
    assert scene.width >= answer.spatial_tokens == retained.width
    assert scene.header.stamp == retained.header.stamp == report.header.stamp == answer.header.stamp
    offset = {field.name: field.offset for field in retained.fields}
    raw = np.frombuffer(retained.data, np.uint8).reshape(retained.width, retained.point_step)
    flags = raw[:, offset["retained"] : offset["retained"] + 4].copy().view("<f4")
    assert int(flags.sum()) == answer.retained_tokens == report.retained_tokens
    assert [layer.layer for layer in report.layers] == list(range(len(report.layers)))
    assert report.layers[0].spatial_tokens == answer.spatial_tokens
    assert report.layers[-1].spatial_tokens == answer.retained_tokens
    # The rest of the prefill is the language head.
    assert 0.9 * answer.prefill_flops < sum(layer.flops for layer in report.layers) <= answer.prefill_flops
    assert {marker.ns for marker in markers[-1].markers} >= {"views", "answer"}


def test_a_question_on_the_topic(live: SeeingNode) -> None:
    publisher = live.graph.node.create_publisher(String, "/question", 10)
    live.graph.wait(publisher.get_subscription_count, "a subscriber of question")
    before = len(live.answers)
    publisher.publish(String(data="From the topic?"))
    live.graph.wait(lambda: len(live.answers) > before, "an answer")
    assert live.answers[-1].question == "From the topic?"
    assert live.answers[-1].status == Answer.TRUNCATED


@pytest.mark.parametrize(
    ("frame", "x", "status", "named"),
    [
        ("map", 2.0, Answer.TRUNCATED, ""),
        ("camera", 2.0, Answer.INVALID_REQUEST, "'camera'"),
        ("map", math.nan, Answer.INVALID_REQUEST, "nan"),
    ],
)
def test_a_clicked_point(live: SeeingNode, frame: str, x: float, status: int, named: str) -> None:
    publisher = live.graph.node.create_publisher(PointStamped, "/clicked_point", 10)
    live.graph.wait(publisher.get_subscription_count, "a subscriber of clicked_point")
    before = len(live.answers)
    message = PointStamped(point=Point(x=x, y=0.0, z=1.0))
    message.header.frame_id = frame
    publisher.publish(message)
    live.graph.wait(lambda: len(live.answers) > before, "an answer")
    assert live.answers[-1].status == status
    assert named in live.answers[-1].status_message
    assert live.answers[-1].question == "What is this?"
    live.graph.node.destroy_publisher(publisher)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"question": ""}, "empty"),
        ({"question": "  \n "}, "empty"),
        ({"question": "What is <image> ?"}, "<image>"),
        ({"latency_budget_ms": -5.0}, "-5"),
        ({"latency_budget_ms": math.nan}, "nan"),
        ({"clicks": [Point(x=math.nan, y=0.0, z=0.0)]}, "nan"),
        ({"max_new_tokens": 2**31}, "2147483648"),
    ],
)
def test_bad_requests_name_the_value(live: SeeingNode, fields: dict[str, Any], named: str) -> None:
    answer = live.ask(**{"question": "What?", **fields})
    assert answer.status == Answer.INVALID_REQUEST
    assert named in answer.status_message
    assert live.ask().status == Answer.TRUNCATED


class Stream:
    """A goal of the action, its feedback and its end."""

    def __init__(self, live: SeeingNode, max_new_tokens: int, question: str = "Tell me everything") -> None:
        self.live = live
        self.feedback: list[Any] = []
        self._client = ActionClient(live.graph.node, AskSceneStream, f"{NAME}/ask_stream")
        live.graph.wait(self._client.server_is_ready, "the action server")
        goal = AskSceneStream.Goal(question=question, max_new_tokens=max_new_tokens)
        sent = self._client.send_goal_async(goal, feedback_callback=lambda m: self.feedback.append(m.feedback))
        self.goal = live.graph.result(sent, "the goal's acceptance")
        assert self.goal.accepted

    @classmethod
    def heard(cls, live: SeeingNode, max_new_tokens: int) -> tuple[Stream, int, Answer]:
        """One whose text was heard, its status and answer: rclpy's client drops feedback that the end has overtaken."""

        def once() -> tuple[Stream, int, Answer] | None:
            stream = cls(live, max_new_tokens)
            status, answer = stream.end()
            return (stream, status, answer) if stream.feedback and stream.feedback[-1].new_tokens else None

        found: tuple[Stream, int, Answer] = live.graph.wait(once, "feedback with text")
        return found

    def end(self) -> tuple[int, Answer]:
        """Status and answer."""
        found = self.live.graph.result(self.goal.get_result_async(), "the goal's result")
        self._client.destroy()  # nothing arrives after this
        return found.status, found.result.answer


def test_an_answer_is_streamed(live: SeeingNode) -> None:
    stream, status, answer = Stream.heard(live, 6)  # of a burst of feedback some may be missing
    assert (status, answer.status) == (GoalStatus.STATUS_SUCCEEDED, Answer.TRUNCATED)
    stages = list(dict.fromkeys(feedback.stage for feedback in stream.feedback))
    assert stages == [stage for stage in ("queue", "encode", "tokens", "prefill", "decode") if stage in stages]
    counts = [feedback.new_tokens for feedback in stream.feedback]
    assert counts == sorted(counts)
    assert answer.text.startswith(stream.feedback[-1].text_so_far)


def test_a_stream_is_cancelled_within_one_step(live: SeeingNode) -> None:
    stream = Stream(live, 3000)
    live.graph.wait(lambda: stream.feedback and stream.feedback[-1].new_tokens >= 2, "the first tokens")
    cancelled = live.graph.result(stream.goal.cancel_goal_async(), "the reply to cancel")
    assert len(cancelled.goals_canceling) == 1
    status, answer = stream.end()
    assert (status, answer.status) == (GoalStatus.STATUS_CANCELED, Answer.CANCELLED)
    assert "cancelled" in answer.status_message
    assert live.ask().status == Answer.TRUNCATED


def test_while_a_question_runs_everything_else_lives(live: SeeingNode) -> None:
    assert live.set("question_policy", "reject").successful
    stream = Stream(live, 3000)
    live.graph.wait(lambda: stream.feedback and stream.feedback[-1].new_tokens >= 1, "the first token")
    request = GetParameters.Request(names=["scene.frame_id"])
    got = live.graph.call(GetParameters, f"{NAME}/get_parameters", request)
    assert got.values[0].string_value == "map"
    assert live.graph.state() == "active"
    refused = live.ask("Me too?")
    assert refused.status == Answer.BUSY and "reject" in refused.status_message
    stream.goal.cancel_goal_async()
    assert stream.end()[1].status == Answer.CANCELLED
    assert live.set("question_policy", "replace").successful
    stream = Stream(live, 3000)
    live.graph.wait(lambda: stream.feedback and stream.feedback[-1].new_tokens >= 1, "the first token")
    assert live.ask("Me first!").status == Answer.TRUNCATED
    status, answer = stream.end()
    assert (status, answer.status) == (GoalStatus.STATUS_ABORTED, Answer.CANCELLED)
    assert live.set("question_policy", "queue").successful


def test_parameters_are_all_described_and_bad_values_refused_with_a_reason(live: SeeingNode) -> None:
    names = live.graph.call(ListParameters, f"{NAME}/list_parameters").result.names
    own = [name for name in names if name not in ("use_sim_time", "start_type_description_service")]
    request = DescribeParameters.Request(names=own)
    for descriptor in live.graph.call(DescribeParameters, f"{NAME}/describe_parameters", request).descriptors:
        assert descriptor.description, descriptor.name
    for name, value, named in (
        ("question_policy", "maybe", "queue, replace, reject"),
        ("queue_limit", -1, "queue_limit"),
        ("latency_budget_ms", math.nan, "nan"),
        ("click_question", " ", "empty"),
        ("strategy", "no_such", "no_such"),
        ("strategy", "/no/such/file.yaml", "/no/such/file.yaml"),
        ("model.path", "/elsewhere", "clean the node up first"),
        ("pose.source", "static", "deactivate the node first"),
        ("autostart", True, "read-only"),
    ):
        result = live.set(name, value)
        assert not result.successful
        assert named in result.reason, (name, result.reason)


def test_parameters_that_may_change_take_effect_with_the_next_question(live: SeeingNode) -> None:
    pruned = live.ask()
    assert live.set("strategy", "none").successful
    whole = live.ask()
    assert whole.retained_tokens == whole.spatial_tokens == pruned.spatial_tokens
    assert live.set("max_new_tokens", 3).successful
    assert "max_new_tokens = 3" in live.ask().status_message
    assert live.set("latency_budget_ms", 3.6e6).successful
    assert live.ask().latency_budget_ms == 3.6e6
    for name, value in (("strategy", "ours"), ("max_new_tokens", 8), ("latency_budget_ms", 0.0)):
        assert live.set(name, value).successful
    assert live.ask().retained_tokens == pruned.retained_tokens


def test_a_question_with_another_strategy_waits_as_every_other(live: SeeingNode) -> None:
    """It is known to the worker at once: it can be cancelled while the one before it is answered."""
    assert live.ask().status == Answer.TRUNCATED
    running = Stream(live, 3000)
    live.graph.wait(lambda: running.feedback and running.feedback[-1].new_tokens >= 1, "the first token")
    first_ended = running.goal.get_result_async()
    assert live.set("strategy", "none").successful
    waiting = Stream(live, 1)
    live.graph.result(waiting.goal.cancel_goal_async(), "the reply to cancel")
    status, answer = waiting.end()
    assert not first_ended.done(), "it was cancelled only when the first question was done"
    assert (status, answer.status) == (GoalStatus.STATUS_CANCELED, Answer.CANCELLED)
    live.graph.result(running.goal.cancel_goal_async(), "the reply to cancel")
    running.end()
    after = live.ask()
    assert after.retained_tokens == after.spatial_tokens > 0
    assert live.set("strategy", "ours").successful


def test_a_strategy_that_is_gone_is_told_until_another_one_is_set(live: SeeingNode, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    default_strategy("ours", 8).save(path)
    assert live.set("strategy", str(path)).successful
    path.unlink()
    for _ in range(2):
        answer = live.ask()
        assert answer.status == Answer.ERROR and str(path) in answer.status_message
    assert live.set("strategy", "ours").successful
    assert live.ask().status == Answer.TRUNCATED
