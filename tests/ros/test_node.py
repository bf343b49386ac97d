# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, with the tiny model: questions in every way they can be asked."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from action_msgs.msg import GoalStatus
from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer, TokenReport
from adatoken3d.srv import AskScene
from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rcl_interfaces.srv import DescribeParameters, GetParameters, ListParameters, SetParameters
from rclpy.action import ActionClient
from ros_graph import Camera, Graph, synthetic_frame
from sensor_msgs.msg import PointCloud2
from std_msgs.msg import String
from std_srvs.srv import Trigger
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.pruning.strategy import default_strategy

STAMP = 1_700_000_000_000_000_000
VIEWS = 3
NAME = "/adatoken3d"
# Nanoseconds after STAMP, for one more frame each: a camera at rest is looked at once in a second.
LATER = itertools.count(10_000_000_000, 2_000_000_000)


class Live:
    """A configured and active node that has seen a few views."""

    def __init__(self, graph: Graph, model: Path) -> None:
        self.graph = graph
        self.process = graph.start_node(model, diagnostics__period=0.1)
        self.answers = graph.collect(Answer, f"{NAME}/answer")
        self.diagnostics = graph.collect(DiagnosticArray, "/diagnostics", 10)
        assert graph.transition("configure") and graph.transition("activate")
        self.camera = Camera(graph)
        graph.wait(self.camera.matched, "the node's inputs")
        self.show_views()

    def show_views(self, first: int = 0) -> None:
        for i in range(first, first + VIEWS):
            self.camera.send(self.camera.messages(STAMP + i * 100_000_000, *synthetic_frame(i)))
            self.graph.wait(lambda count=i + 1: self.key_frames() >= count - first, f"key frame {i}")

    def key_frames(self) -> int:
        status = self.status("scene")
        return int(self.value(status, "key_frames")) if status is not None else 0

    def status(self, task: str) -> Any:
        for array in reversed(self.diagnostics):
            for status in array.status:
                if status.name == f"adatoken3d: {task}":
                    return status
        return None

    def value(self, status: Any, key: str) -> str:
        return str(next(pair.value for pair in status.values if pair.key == key))

    def ask(self, question: str = "What is there?", **fields: Any) -> Answer:
        return self.graph.call(AskScene, f"{NAME}/ask", AskScene.Request(question=question, **fields)).answer

    def set(self, name: str, value: Any) -> Any:
        kinds = {bool: "bool", int: "integer", float: "double", str: "string"}
        kind = kinds[type(value)]
        message = ParameterValue(type=getattr(ParameterType, f"PARAMETER_{kind.upper()}"), **{f"{kind}_value": value})
        request = SetParameters.Request(parameters=[Parameter(name=name, value=message)])
        return self.graph.call(SetParameters, f"{NAME}/set_parameters", request).results[0]


@pytest.fixture(scope="module")
def live(shared_graph: Graph, tiny_model: Path) -> Iterator[Live]:
    yield Live(shared_graph, tiny_model)


def test_a_question_over_the_service(live: Live) -> None:
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
    assert live.answers[-1] == answer


def test_the_same_question_has_the_same_answer(live: Live) -> None:
    first, second = live.ask("And now?"), live.ask("And now?")
    assert (first.text, first.retained_tokens, first.prefill_flops) == (
        second.text,
        second.retained_tokens,
        second.prefill_flops,
    )


def test_clouds_report_and_markers_agree_with_the_answer(live: Live) -> None:
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


def test_a_question_on_the_topic(live: Live) -> None:
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
def test_a_clicked_point(live: Live, frame: str, x: float, status: int, named: str) -> None:
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
def test_bad_requests_name_the_value(live: Live, fields: dict[str, Any], named: str) -> None:
    answer = live.ask(**{"question": "What?", **fields})
    assert answer.status == Answer.INVALID_REQUEST
    assert named in answer.status_message
    assert live.ask().status == Answer.TRUNCATED


class Stream:
    """A goal of the action, its feedback and its end."""

    def __init__(self, live: Live, max_new_tokens: int) -> None:
        self.live = live
        self.feedback: list[Any] = []
        self._client = ActionClient(live.graph.node, AskSceneStream, f"{NAME}/ask_stream")
        live.graph.wait(self._client.server_is_ready, "the action server")
        goal = AskSceneStream.Goal(question="Tell me everything", max_new_tokens=max_new_tokens)
        sent = self._client.send_goal_async(goal, feedback_callback=lambda m: self.feedback.append(m.feedback))
        self.goal = live.graph.result(sent, "the goal's acceptance")
        assert self.goal.accepted

    def end(self, last: Callable[[Any], bool] | None = None) -> tuple[int, Answer]:
        """Status and answer; feedback is a topic and may come later: with `last`, one like that is awaited, too."""
        found = self.live.graph.result(self.goal.get_result_async(), "the goal's result")
        if last is not None:
            self.live.graph.wait(lambda: self.feedback and last(self.feedback[-1]), "the last feedback")
        self._client.destroy()  # nothing arrives after this
        return found.status, found.result.answer


def test_an_answer_is_streamed(live: Live) -> None:
    stream = Stream(live, 6)
    # Of a burst of feedback some may be missing.
    status, answer = stream.end(lambda feedback: feedback.new_tokens > 0)
    assert (status, answer.status) == (GoalStatus.STATUS_SUCCEEDED, Answer.TRUNCATED)
    stages = list(dict.fromkeys(feedback.stage for feedback in stream.feedback))
    assert stages == [stage for stage in ("queue", "encode", "tokens", "prefill", "decode") if stage in stages]
    counts = [feedback.new_tokens for feedback in stream.feedback]
    assert counts == sorted(counts)
    assert answer.text.startswith(stream.feedback[-1].text_so_far)


def test_a_stream_is_cancelled_within_one_step(live: Live) -> None:
    stream = Stream(live, 3000)
    live.graph.wait(lambda: stream.feedback and stream.feedback[-1].new_tokens >= 2, "the first tokens")
    cancelled = live.graph.result(stream.goal.cancel_goal_async(), "the reply to cancel")
    assert len(cancelled.goals_canceling) == 1
    status, answer = stream.end()
    assert (status, answer.status) == (GoalStatus.STATUS_CANCELED, Answer.CANCELLED)
    assert "cancelled" in answer.status_message
    assert live.ask().status == Answer.TRUNCATED


def test_while_a_question_runs_everything_else_lives(live: Live) -> None:
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


def test_parameters_are_all_described_and_bad_values_refused_with_a_reason(live: Live) -> None:
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


def test_parameters_that_may_change_take_effect_with_the_next_question(live: Live) -> None:
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


def test_a_question_with_another_strategy_waits_as_every_other(live: Live) -> None:
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


def test_a_strategy_that_is_gone_is_told_until_another_one_is_set(live: Live, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    default_strategy("ours", 8).save(path)
    assert live.set("strategy", str(path)).successful
    path.unlink()
    for _ in range(2):
        answer = live.ask()
        assert answer.status == Answer.ERROR and str(path) in answer.status_message
    assert live.set("strategy", "ours").successful
    assert live.ask().status == Answer.TRUNCATED


def test_frames_add_up_in_the_diagnostics(live: Live) -> None:
    live.camera.send(live.camera.messages(STAMP, *synthetic_frame(0)))
    live.graph.wait(lambda: "dropped.rgb/image" in str(live.status("inputs")), "a drop in the diagnostics")
    status = live.status("inputs")
    counts = {pair.key: int(pair.value) for pair in status.values if pair.value.isdigit()}
    for stream in ("rgb/image", "depth/image"):
        dropped = sum(count for key, count in counts.items() if key.startswith(f"dropped.{stream}"))
        assert counts[f"received.{stream}"] == counts[f"paired.{stream}"] + counts[f"pending.{stream}"] + dropped
    matched = sum(count for key, count in counts.items() if key.startswith("pairs.") and key != "pairs.matched")
    assert counts["pairs.matched"] == matched
    assert {s.name for s in live.diagnostics[-1].status} == {
        f"adatoken3d: {task}" for task in ("inputs", "scene", "model", "latency", "memory")
    }
    assert live.value(live.status("latency"), "total_ms.p50") != "n/a"


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda m: setattr(m["rgb"], "encoding", "strange"), "'strange'"),
        (lambda m: setattr(m["rgb"], "step", 7), "step 7"),
        (lambda m: setattr(m["depth"], "width", 3), "3x48"),
        (lambda m: setattr(m["rgb_info"], "k", [0.0] * 9), "not calibrated"),
        (lambda m: setattr(m["rgb_info"], "width", 640), "640x48"),
        (lambda m: setattr(m["depth"], "data", [0] * len(m["depth"].data)), "no valid depth"),
        (lambda m: setattr(m["pose"].pose.orientation, "w", math.nan), "quaternion"),
        (lambda m: setattr(m["pose"].header, "frame_id", "odom"), "'odom'"),
    ],
)
def test_bad_input_shows_in_the_diagnostics_and_the_node_lives_on(live: Live, spoil: Any, named: str) -> None:
    messages = live.camera.messages(STAMP + next(LATER), *synthetic_frame(100))
    spoil(messages)
    live.camera.send(messages)

    def complains() -> bool:
        status = live.status("inputs")
        return status is not None and status.level == DiagnosticStatus.ERROR and named in status.message

    live.graph.wait(complains, f"an error that names {named}")
    assert live.ask().status == Answer.TRUNCATED
    # Topics overtake each other: an image may be matched with the calibration before its own.
    for _ in range(2):
        count = len(live.diagnostics)
        live.camera.send(live.camera.messages(STAMP + next(LATER), *synthetic_frame(0)))
        live.graph.wait(lambda count=count: len(live.diagnostics) > count + 1, "diagnostics")
    live.graph.wait(lambda: live.status("inputs").level == DiagnosticStatus.OK, "the inputs to be good again")


def test_the_scene_is_cleared_and_built_again(live: Live) -> None:
    retained = live.graph.collect(PointCloud2, f"{NAME}/retained_tokens")
    live.graph.wait(lambda: retained and retained[-1].width > 0, "the tokens of the last answer")
    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    live.graph.wait(lambda: retained[-1].width == 0, "their end")
    assert live.ask().status == Answer.NO_SCENE
    live.camera.send(live.camera.messages(STAMP + next(LATER), *synthetic_frame(5)))
    live.graph.wait(lambda: live.ask().status == Answer.TRUNCATED, "an answer about the new scene")


def test_the_scene_goes_into_a_file_and_comes_back(live: Live, tmp_path: Path) -> None:
    def do(what: str) -> Any:
        return live.graph.call(Trigger, f"{NAME}/{what}_scene")

    assert not do("save").success and "scene.file is empty" in do("load").message
    refused = live.set("scene.file", "https://example.org/scene")
    assert not refused.successful and "absolute path on this machine" in refused.reason
    before, path = live.ask(), tmp_path / "scene"
    assert live.set("scene.file", str(path)).successful
    # What is missing or damaged is named, and nothing is lost.
    assert not (missing := do("load")).success and str(path) in missing.message
    path.write_bytes(b"no scene at all")
    assert not (damaged := do("load")).success and f"{path} is no scene" in damaged.message
    path.unlink()
    path.mkdir()
    assert not do("save").success and not do("load").success
    path.rmdir()
    assert live.ask().text == before.text
    saved = do("save")
    assert saved.success and saved.message.endswith(f"views are in {path}")
    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    assert live.ask().status == Answer.NO_SCENE
    loaded = do("load")
    assert loaded.success and loaded.message.endswith(f"views came from {path}")
    answer = live.ask()
    assert (answer.text, answer.header.stamp, answer.spatial_tokens) == (
        before.text,
        before.header.stamp,
        before.spatial_tokens,
    )
    scenes = live.graph.collect(PointCloud2, f"{NAME}/scene_tokens")
    live.graph.wait(lambda: scenes and scenes[-1].width == answer.spatial_tokens, "the scene in sight")
    live.set("scene.file", "")


def test_two_publishers_whose_clocks_differ_are_said_and_the_scene_survives(live: Live) -> None:
    """The second camera's clock is 1.5 s behind, and its calibration is of another frame.

    Afterwards the node expects two clocks for a while, so this comes last.
    """
    before = live.key_frames()
    second = Camera(live.graph)
    live.graph.wait(second.matched, "the node's inputs")
    start = STAMP + next(LATER)

    def both(step: int) -> None:
        messages = live.camera.messages(start + step * 100_000_000, *synthetic_frame(step % 3))
        live.camera.send(messages)
        late = second.messages(start + (step - 15) * 100_000_000, *synthetic_frame(step % 3))
        late["rgb_info"].header.frame_id = "other"
        second.send({name: late[name] for name in ("rgb_info", "rgb", "depth")})

    steps = itertools.count()

    def said() -> bool:
        count = len(live.diagnostics)
        both(next(steps))
        live.graph.wait(lambda: len(live.diagnostics) > count, "diagnostics")
        status = live.status("inputs")
        return bool(status.level == DiagnosticStatus.WARN and "two clocks on one topic" in status.message)

    live.graph.wait(said, "a warning of two clocks")
    status = live.status("inputs")
    assert "/rgb/image: the stamp" in status.message and "it has 2 publishers: ['/tester', '/tester']" in status.message
    live.graph.wait(lambda: said() and "frame 'other'" in live.status("inputs").message, "a warning of the calibration")
    answer = live.ask()
    assert answer.status == Answer.TRUNCATED
    assert "two clocks on one topic" in answer.status_message and "frame 'other'" in answer.status_message
    assert live.key_frames() >= before and live.value(live.status("inputs"), "time_jumps") == "0"
    for publisher in (second.rgb, second.depth, second.rgb_info, second.depth_info, second.pose):
        live.graph.node.destroy_publisher(publisher)
