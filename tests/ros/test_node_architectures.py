# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, over DDS, with the tiny model of each architecture: all that it offers works.

It is started with what the launch file would start it with (`ros.wiring.wire`), and becomes active by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from action_msgs.msg import GoalStatus
from adatoken3d.msg import Answer, TokenReport
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Point, PointStamped
from ros_graph import ROOT, Graph, synthetic_frame
from seeing_node import LATER, NAME, STAMP, VIEWS, SeeingNode
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import Trigger
from test_node import Stream
from test_shared_files import RVIZ, topics_of
from visualization_msgs.msg import MarkerArray

from adatoken3d_ros.ros.wiring import wire
from tests.architectures import NAMES, write_tiny

ANSWERED = (Answer.OK, Answer.TRUNCATED)  # a model of random weights may end an answer at any token
CONTEXT = 1024


@dataclass(frozen=True)
class Files:
    """What one model leaves on disk, its own identity, a scene that it saw and a strategy that was made for it."""

    model: Path
    identity: str
    scene: Path
    strategy: Path


@pytest.fixture(scope="module")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Files]:
    """Written by an engine in this process."""
    from adatoken3d_ros.engine.loading import load_engine
    from adatoken3d_ros.pruning.strategy import default_strategy
    from adatoken3d_ros.scene.frames import PosedFrame
    from adatoken3d_ros.settings import Settings

    root = tmp_path_factory.mktemp("architectures")

    @cache
    def write(name: str) -> Files:
        path = write_tiny(name, root / f"tiny-{name}", context_length=CONTEXT)
        engine = load_engine(Settings({"model.path": str(path), "budget.warm_up": False}))
        found = Files(path, engine.model.identity, root / f"{name}.scene", root / f"{name}.yaml")
        strategy = default_strategy("ours", engine.n_layers, engine.model.decoder.first_gate)
        replace(strategy, name=f"made-for-{name}", model_hash=found.identity).save(found.strategy)
        scene = engine.open()
        rgb, depth, K, T = synthetic_frame(0)
        scene.observe(PosedFrame(rgb, depth.astype(np.float32) / 1e3, K, T, STAMP))
        scene.save(found.scene)
        return found

    return write


@pytest.fixture(scope="module", params=NAMES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def live(kind: str, files_of: Callable[[str], Files], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeeingNode]:
    """One process for each architecture, on a graph of its own; it has seen a few views."""
    graph = Graph(tmp_path_factory.mktemp(kind))
    wiring = wire({"model": str(files_of(kind).model), "pose_source": "pose_topic"}, ROOT / "config")
    yield SeeingNode(graph, files_of(kind).model, wiring)
    graph.close()


def test_questions_by_service_and_by_action(live: SeeingNode, kind: str) -> None:
    answer = live.ask("Tell me everything", max_new_tokens=6)
    assert answer.status in ANSWERED, answer.status_message
    assert answer.model_id.startswith(f"tiny-{kind}@")
    assert answer.header.stamp.nanosec == (STAMP + (VIEWS - 1) * 100_000_000) % 10**9
    assert 0 < answer.retained_tokens < answer.spatial_tokens
    assert 0 < answer.prefill_flops < answer.prefill_flops_unpruned
    # Its confidence is NaN, which equals nothing.
    live.graph.wait(lambda: live.answers and str(live.answers[-1]) == str(answer), "the answer on the topic")
    stream, status, streamed = Stream.heard(live, 6)
    assert (status, streamed.status, streamed.text) == (GoalStatus.STATUS_SUCCEEDED, answer.status, answer.text)
    assert streamed.text.startswith(stream.feedback[-1].text_so_far)
    stages = list(dict.fromkeys(feedback.stage for feedback in stream.feedback))
    assert stages == [stage for stage in ("queue", "encode", "tokens", "prefill", "decode") if stage in stages]


def test_what_rviz_shows(live: SeeingNode) -> None:
    """The topics of its view are there, and clouds, report and markers agree with the answer."""
    answer = live.ask("Where is it?")
    kinds = {"scene_tokens": PointCloud2, "retained_tokens": PointCloud2, "token_report": TokenReport}
    found = {name: live.graph.collect(kind, f"{NAME}/{name}") for name, kind in kinds.items()}
    markers = live.graph.collect(MarkerArray, f"{NAME}/markers")
    live.graph.wait(lambda: all(found.values()) and markers, "the outputs")
    scene, retained, report = (messages[-1] for messages in found.values())
    assert scene.width == answer.spatial_tokens == retained.width
    assert scene.header.stamp == retained.header.stamp == report.header.stamp == answer.header.stamp
    columns = {field.name: column(retained, field.name) for field in retained.fields if field.name != "rgb"}
    assert int(columns["retained"].sum()) == answer.retained_tokens == report.retained_tokens
    assert columns["contribution"].sum() > 0 and columns["last_layer"].max() == len(report.layers) - 1
    depth = column(scene, "x")  # the wall is 2 m away along x
    assert {field.name for field in scene.fields} >= {"x", "y", "z", "rgb"} and np.abs(depth - 2).max() < 0.2
    assert report.layers[0].spatial_tokens == answer.spatial_tokens
    assert report.layers[-1].spatial_tokens == answer.retained_tokens
    shown = {marker.ns: marker for marker in markers[-1].markers}
    assert shown["answer"].text == answer.text and len(shown["views"].points) == 16 * VIEWS
    node = live.graph.node
    for topic in topics_of(yaml.safe_load(RVIZ.read_text())):
        there = node.count_publishers(f"/{topic}") + node.count_subscribers(f"/{topic}")
        assert there, f"nobody knows /{topic}"


def column(cloud: PointCloud2, name: str) -> Any:
    """A field of float32 of a cloud."""
    (offset,) = (field.offset for field in cloud.fields if field.name == name)
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.width, cloud.point_step)
    return raw[:, offset : offset + 4].copy().view("<f4")[:, 0]


def test_points_of_the_scene(live: SeeingNode) -> None:
    """Clicked in RViz, beside a question and in its words."""
    publisher = live.graph.node.create_publisher(PointStamped, "/clicked_point", 10)
    live.graph.wait(publisher.get_subscription_count, "a subscriber of clicked_point")
    before = len(live.answers)
    message = PointStamped(point=Point(x=2.0, y=0.0, z=1.0))
    message.header.frame_id = "map"
    publisher.publish(message)
    live.graph.wait(lambda: len(live.answers) > before, "an answer")
    assert live.answers[-1].question == "What is this?"
    assert live.answers[-1].status in ANSWERED, live.answers[-1].status_message
    beside = live.ask("What is this?", clicks=[message.point])
    assert beside.text == live.answers[-1].text
    assert live.ask("What is at [2.0, 0.0, 1.0]?").status in ANSWERED
    for x, named in ((500.0, "m from what has been seen"), (math.nan, "nan")):
        refused = live.ask("What is this?", clicks=[Point(x=x, y=0.0, z=0.0)])
        assert refused.status == Answer.INVALID_REQUEST and named in refused.status_message


def test_a_part_of_the_scene_another_strategy_and_probabilities(live: SeeingNode) -> None:
    """What an ask or a stream may say beside the question holds for that question alone."""
    whole = live.ask()
    clouds = live.graph.collect(PointCloud2, f"{NAME}/retained_tokens")
    live.graph.wait(lambda: clouds and clouds[-1].width == whole.spatial_tokens, "the tokens of the answer")
    xyz = np.stack([column(clouds[-1], axis) for axis in "xyz"], axis=1).astype(float)
    left = [Point(x=x, y=y, z=z) for x, y, z in xyz[xyz[:, 1] < np.median(xyz[:, 1])].tolist()]
    without = live.ask(without=left, candidates=[whole.text, "a"])
    assert without.status in ANSWERED and 0 < without.spatial_tokens < whole.spatial_tokens
    assert live.ask(only=left).spatial_tokens == whole.spatial_tokens - without.spatial_tokens
    assert len(without.candidate_probabilities) == 2 and all(0 <= p <= 1 for p in without.candidate_probabilities)
    assert live.ask(only=[Point(x=900.0)]).status == Answer.NO_SCENE
    other = live.ask(strategy="none")
    assert other.strategy.startswith("none") and other.retained_tokens == other.spatial_tokens
    again = live.ask()
    assert (again.strategy, again.text, again.spatial_tokens) == (whole.strategy, whole.text, whole.spatial_tokens)
    for name in ("/etc/some.yaml", "best"):
        refused = live.ask(strategy=name)
        assert refused.status == Answer.INVALID_REQUEST and repr(name) in refused.status_message
    assert live.ask(without=[Point(x=math.nan)]).status == Answer.INVALID_REQUEST


def test_strategies_change_at_run_time_and_those_of_others_are_refused(
    live: SeeingNode, kind: str, files_of: Callable[[str], Files]
) -> None:
    from adatoken3d_ros.pruning.policies import POLICY_NAMES

    whole = live.ask().spatial_tokens
    for policy in POLICY_NAMES:
        assert live.set("strategy", policy).successful
        answer = live.ask()
        assert answer.status in ANSWERED, (policy, answer.status_message)
        assert answer.spatial_tokens == whole and (answer.retained_tokens == whole) == (policy == "none"), policy
    assert live.set("strategy", str(files_of(kind).strategy)).successful
    assert live.ask().strategy == f"made-for-{kind}"
    for other in set(NAMES) - {kind}:
        refused = live.set("strategy", str(files_of(other).strategy))
        assert not refused.successful
        assert f"made for the model {files_of(other).identity}" in refused.reason
    assert live.ask().strategy == f"made-for-{kind}"
    assert live.set("strategy", "ours").successful


def test_without_a_grounding_head_no_thing_is_pointed_at(live: SeeingNode) -> None:
    refused = live.ask("locate: the red chair")
    assert refused.status == Answer.INVALID_REQUEST and "this model has no grounding head" in refused.status_message
    assert live.ask().status in ANSWERED


def test_latency_budgets(live: SeeingNode) -> None:
    ample = live.ask(latency_budget_ms=60_000.0)
    assert ample.status in ANSWERED and ample.budget_met, ample.status_message
    tiny = live.ask(latency_budget_ms=1e-3)
    assert tiny.status in ANSWERED and not tiny.budget_met
    assert "0.001 ms cannot be kept: the smallest feasible one is" in tiny.status_message


def test_a_scene_comes_back_from_its_file_and_others_are_refused(
    live: SeeingNode, kind: str, files_of: Callable[[str], Files], tmp_path: Path
) -> None:
    def do(what: str) -> Any:
        return live.graph.call(Trigger, f"{NAME}/{what}_scene")

    before = live.ask()
    assert live.set("scene.file", str(tmp_path / "scene")).successful
    assert do("save").success and do("clear").success
    assert live.ask().status == Answer.NO_SCENE
    loaded = do("load")
    assert loaded.success and loaded.message.startswith(f"{VIEWS} views"), loaded.message
    for other in set(NAMES) - {kind}:
        assert live.set("scene.file", str(files_of(other).scene)).successful
        refused = do("load")
        assert not refused.success and f"model '{files_of(other).identity}'" in refused.message
    after = live.ask()
    assert (after.text, after.spatial_tokens) == (before.text, before.spatial_tokens)


def test_bad_input_is_named_and_the_node_lives_on(live: SeeingNode) -> None:
    """A question beyond the context, a view without depth, one smaller than a patch; then a good one counts."""
    long = live.ask("\N{SLIGHTLY SMILING FACE}" * 500)
    assert long.status == Answer.INVALID_REQUEST and f"context of {CONTEXT}" in long.status_message
    good = live.ask()
    assert good.status in ANSWERED

    def send(index: int, size: tuple[int, int] = (48, 64), depth_factor: int = 1) -> None:
        """One more frame, and some time for what it does to be told."""
        rgb, depth, K, T = synthetic_frame(index)
        rgb, depth, told = rgb[: size[0], : size[1]], depth[: size[0], : size[1]] * depth_factor, len(live.diagnostics)
        live.camera.send(live.camera.messages(STAMP + next(LATER), rgb, depth.astype(np.uint16), K, T))
        live.graph.wait(lambda: len(live.diagnostics) > told + 1, "diagnostics")

    def says(text: str) -> bool:
        status = live.status("inputs")
        return bool(status.level == DiagnosticStatus.ERROR and text in status.message)

    def until(condition: Callable[[], bool], what: str, **frame: Any) -> None:
        """Topics overtake each other: an image may be matched with the calibration before its own."""
        live.graph.wait(lambda: send(**frame) or condition(), what)

    until(lambda: says("no valid depth"), "an error that tells of the depth", index=20, depth_factor=0)
    views = live.key_frames()
    # Some models scale any picture to their size; others say that they cannot.
    until(lambda: says("smaller than a patch") or live.key_frames() > views, "the small view", index=30, size=(8, 8))
    views = live.key_frames()
    assert live.ask().status in ANSWERED
    until(lambda: live.key_frames() > views, "the next good view", index=40)
    until(lambda: live.status("inputs").level == DiagnosticStatus.OK, "the inputs to be good again", index=40)
    assert live.ask().status in ANSWERED


def test_diagnostics(live: SeeingNode, kind: str) -> None:
    names = {status.name for status in live.diagnostics[-1].status}
    assert names == {f"adatoken3d: {task}" for task in ("inputs", "scene", "model", "latency", "memory")}
    live.graph.wait(lambda: live.status("model").message == "ready", "the model to be ready")
    assert live.value(live.status("model"), "model_id").startswith(f"tiny-{kind}@")
    assert live.value(live.status("latency"), "total_ms.p50") != "n/a"
    assert live.key_frames() >= VIEWS and live.value(live.status("model"), "callback_failures") == "0"


def test_configured_anew_with_a_kept_prefix_in_half_precision(
    live: SeeingNode, files_of: Callable[[str], Files], kind: str
) -> None:
    """The scene of another dtype is the same model's; an answer over the prefix prunes nothing."""
    assert live.graph.transition("deactivate") and live.graph.transition("cleanup")
    assert live.ask().status == Answer.ERROR
    for name, value in (("budget.reuse", "prefix"), ("model.dtype", "bfloat16"), ("budget.infeasible", "refuse")):
        assert live.set(name, value).successful
    assert live.set("scene.file", str(files_of(kind).scene)).successful
    assert live.graph.transition("configure") and live.graph.transition("activate")
    assert live.graph.call(Trigger, f"{NAME}/load_scene").success
    for _ in range(2):
        answer = live.ask()
        assert answer.status in ANSWERED, answer.status_message
        assert answer.strategy == "scene-prefix" and answer.retained_tokens == answer.spatial_tokens > 0
    refused = live.ask(latency_budget_ms=1e-3)
    assert refused.status == Answer.BUDGET_INFEASIBLE and "the smallest feasible one is" in refused.status_message
    status, _ = live.process.stop()
    assert status == 0 and "Traceback" not in live.process.log, live.process.log
