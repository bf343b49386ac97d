# SPDX-License-Identifier: Apache-2.0
"""The node in a process of its own, with the tiny model: its inputs, and its scene as a whole."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adatoken3d.msg import Answer
from diagnostic_msgs.msg import DiagnosticStatus
from geometry_msgs.msg import Point, PoseStamped
from ros_graph import Camera, Graph, synthetic_frame
from seeing_node import LATER, NAME, STAMP, VIEWS, SeeingNode
from sensor_msgs.msg import PointCloud2
from std_srvs.srv import Trigger
from visualization_msgs.msg import MarkerArray

from tests.scene.room import CUPBOARD, TABLE, K, depth_of, walk


@pytest.fixture(scope="module")
def live(shared_graph: Graph, tiny_model: Path) -> Iterator[SeeingNode]:
    yield SeeingNode(shared_graph, tiny_model)


def test_frames_add_up_in_the_diagnostics(live: SeeingNode) -> None:
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
    assert live.value(live.status("latency"), "total_ms.p50") == "n/a"
    live.ask()
    live.graph.wait(lambda: live.value(live.status("latency"), "total_ms.p50") != "n/a", "the time that it took")


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
def test_bad_input_shows_in_the_diagnostics_and_the_node_lives_on(live: SeeingNode, spoil: Any, named: str) -> None:
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


def test_the_scene_is_cleared_and_built_again(live: SeeingNode) -> None:
    retained = live.graph.collect(PointCloud2, f"{NAME}/retained_tokens")
    live.graph.wait(lambda: retained and retained[-1].width > 0, "the tokens of the last answer")
    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    live.graph.wait(lambda: retained[-1].width == 0, "their end")
    assert live.ask().status == Answer.NO_SCENE
    live.camera.send(live.camera.messages(STAMP + next(LATER), *synthetic_frame(5)))
    live.graph.wait(lambda: live.ask().status == Answer.TRUNCATED, "an answer about the new scene")


def test_the_scene_goes_into_a_file_and_comes_back(live: SeeingNode, tmp_path: Path) -> None:
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


def test_poses_that_contradict_each_other_are_an_error_until_they_are_right(live: SeeingNode) -> None:
    """In the answer, on /diagnostics and in the log, with the cause; over a scene that was right before, too."""

    def show(said: Callable[[Any], Any]) -> None:
        for pose in walk(12):
            depth = (depth_of(pose, CUPBOARD, TABLE) * 1000).astype(np.uint16)
            seen = sum(frames().values())
            rgb = synthetic_frame(0)[0]
            live.camera.send(live.camera.messages(STAMP + next(LATER), rgb, depth, K, said(pose)))
            live.graph.wait(lambda seen=seen: sum(frames().values()) > seen, "what became of the frame")

    def frames() -> dict[str, int]:
        return {p.key: int(p.value) for p in live.status("scene").values if p.key.startswith("frames.")}

    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    show(np.linalg.inv)
    answer = live.ask()
    assert answer.status == Answer.ERROR and "probably the poses are inverted" in answer.status_message
    assert live.status("scene").level == DiagnosticStatus.ERROR
    live.graph.wait(lambda: "probably the poses are inverted" in live.process.log, "a line in the log")
    show(lambda pose: pose)
    live.graph.wait(lambda: live.ask().status == Answer.TRUNCATED, "an answer about what is right now")
    live.graph.wait(lambda: live.status("scene").level == DiagnosticStatus.OK, "the scene to be well")


def test_what_is_known_of_a_place_comes_with_the_answer_and_is_kept_in_files(live: SeeingNode, tmp_path: Path) -> None:
    def show(*boxes: Any) -> None:
        for pose in walk(12):
            seen = sum(int(p.value) for p in live.status("scene").values if p.key.startswith("frames."))
            depth = (depth_of(pose, *boxes) * 1000).astype(np.uint16)
            live.camera.send(live.camera.messages(STAMP + next(LATER), synthetic_frame(0)[0], depth, K, pose))
            live.graph.wait(
                lambda seen=seen: (
                    sum(int(p.value) for p in live.status("scene").values if p.key.startswith("frames.")) > seen
                ),
                "what became of the frame",
            )

    table = Point(x=1.2, y=0.7, z=0.7)
    goals, shown = (
        live.graph.collect(PoseStamped, f"{NAME}/goal", 1),
        live.graph.collect(MarkerArray, f"{NAME}/markers"),
    )
    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    show(CUPBOARD, TABLE)
    there = live.ask(clicks=[table])
    assert (there.verdict, there.verdict_reason) == (Answer.SEEN, "something is at the place")
    assert there.as_of == there.header.stamp and 0 < there.coverage < 1
    assert there.evidence[0].views > 0 and not there.evidence[0].gone.sec
    live.graph.wait(lambda: goals, "a goal")
    assert there.goal_near.header.frame_id == "map" and goals[-1] == there.goal_near and not there.goal_reason
    show(CUPBOARD)
    gone = live.ask(clicks=[table])
    print(gone)
    assert gone.verdict == Answer.SEEN_THEN_GONE and gone.verdict_reason.startswith("it was at (")
    last = gone.evidence[-1]
    assert there.as_of.sec >= last.last_seen.sec > 0 and last.gone.sec > there.as_of.sec
    live.graph.wait(lambda: shown and {"gone", "evidence", "free"} <= {m.ns for m in shown[-1].markers}, "it in sight")
    assert live.set("scene.file", str(tmp_path / "scene")).successful
    for what in ("save", "clear", "load"):
        assert live.graph.call(Trigger, f"{NAME}/{what}_scene").success
    again = live.ask(clicks=[table])
    assert (again.verdict, again.verdict_reason, again.as_of) == (gone.verdict, gone.verdict_reason, gone.as_of)
    live.set("scene.file", "")


def test_two_publishers_whose_clocks_differ_are_said_and_the_scene_survives(live: SeeingNode) -> None:
    """The second camera's clock is 1.5 s behind, and its calibration is of another frame.

    The scene is of what the cameras show: three frames that contradict it would take its views out, rightly. Afterwards
    the node expects two clocks for a while, so this comes last.
    """
    assert live.graph.call(Trigger, f"{NAME}/clear_scene").success
    start = STAMP + next(LATER)
    for step in range(VIEWS):
        live.camera.send(live.camera.messages(start + step * 100_000_000, *synthetic_frame(step)))
        live.graph.wait(lambda views=step + 1: live.key_frames() == views, "a key frame of the first camera")
    second = Camera(live.graph)
    live.graph.wait(second.matched, "the node's inputs")

    def both(step: int) -> None:
        messages = live.camera.messages(start + step * 100_000_000, *synthetic_frame(step % 3))
        live.camera.send(messages)
        late = second.messages(start + (step - 15) * 100_000_000, *synthetic_frame(step % 3))
        late["rgb_info"].header.frame_id = "other"
        second.send({name: late[name] for name in ("rgb_info", "rgb", "depth")})

    steps = itertools.count(VIEWS)

    def said() -> bool:
        count = len(live.diagnostics)
        both(next(steps))
        live.graph.wait(lambda: len(live.diagnostics) > count, "diagnostics")
        status = live.status("inputs")
        return bool(status.level == DiagnosticStatus.WARN and "two clocks on one topic" in status.message)

    # The graph may know a publisher before it knows its node's name.
    named = "it has 2 publishers: ['/tester', '/tester']"
    live.graph.wait(lambda: said() and named in live.status("inputs").message, "a warning of two clocks, with names")
    assert "/rgb/image: the stamp" in live.status("inputs").message
    live.graph.wait(lambda: said() and "frame 'other'" in live.status("inputs").message, "a warning of the calibration")
    answer = live.ask()
    assert answer.status == Answer.TRUNCATED
    assert "two clocks on one topic" in answer.status_message and "frame 'other'" in answer.status_message
    assert live.value(live.status("inputs"), "time_jumps") == "0"
    assert live.key_frames() >= VIEWS
    for publisher in (second.rgb, second.depth, second.rgb_info, second.depth_info, second.pose):
        live.graph.node.destroy_publisher(publisher)
