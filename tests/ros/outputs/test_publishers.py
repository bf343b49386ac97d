# SPDX-License-Identifier: Apache-2.0
"""Messages out, byte by byte where it matters."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ros_messages import at
from visualization_msgs.msg import Marker

from adatoken3d_ros.engine.answer import (
    Answer,
    Box,
    Question,
    Status,
    TokenReport,
)
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.ros.outputs import publishers as p

STAMP = 1_305_031_102_175_304_000

REPORT = TokenReport(
    xyz=np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32),
    rgb=np.array([[255, 128, 1], [0, 0, 2]], np.uint8),
    contribution=np.array([0.75, 0.25], np.float32),
    last_layer=np.array([7, 3]),
    retained=np.array([True, False]),
    spatial_per_layer=(2, 1),
    flops_per_layer=(10.0, 5.0),
    lorenz_share_60=0.2,
)
ANSWER = Answer(
    Question("Where?", latency_budget_ms=100.0),
    Status.TRUNCATED,
    text="there",
    status_message="cut",
    boxes=(Box((1.0, 2.0, 3.0), (0.1, 0.2, 0.3)),),
    stamp_ns=STAMP,
    times=StageTimes(1.0, 2.0, 3.0, 4.0, 5.0, 15.0),
    budget_met=False,
    spatial_tokens=2,
    retained_tokens=1,
    prefill_flops=15.0,
    prefill_flops_unpruned=20.0,
    strategy="ours",
    model_id="tiny@1",
    seed=3,
    report=REPORT,
)
SCENE = p.SceneView(REPORT.xyz, REPORT.rgb, np.array([4, 9]), {STAMP: at(1.0)}, STAMP)


def read(cloud: p.PointCloud2) -> dict[str, np.ndarray]:
    """The fields of a cloud as PCL reads them: by name, offset and point_step."""
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.height * cloud.width, cloud.point_step)
    return {f.name: raw[:, f.offset : f.offset + 4].copy().view("<f4")[:, 0] for f in cloud.fields}


def test_rgb_is_packed_as_pcl_reads_it() -> None:
    bits = p.pack_rgb(np.array([[0x12, 0x34, 0x56]], np.uint8)).view(np.uint32)
    assert hex(bits[0]) == "0x123456"


def test_retained_cloud() -> None:
    cloud = p.retained_cloud(REPORT, STAMP, "map")
    fields = read(cloud)
    assert list(fields) == ["x", "y", "z", "rgb", "contribution", "last_layer", "retained"]
    assert (cloud.height, cloud.width, cloud.point_step, cloud.row_step) == (1, 2, 28, 56)
    assert fields["y"].tolist() == [2.0, 5.0]
    assert fields["contribution"].tolist() == [0.75, 0.25]
    assert fields["last_layer"].tolist() == [7.0, 3.0]
    assert fields["retained"].tolist() == [1.0, 0.0]
    assert (cloud.header.frame_id, cloud.header.stamp.sec) == ("map", 1_305_031_102)


def test_scene_cloud_and_an_empty_one() -> None:
    fields = read(p.scene_cloud(SCENE, "map"))
    assert list(fields) == ["x", "y", "z", "rgb", "count"]
    assert fields["count"].tolist() == [4.0, 9.0]
    assert p.scene_cloud(p.SceneView(), "map").width == 0


def test_answer_keeps_the_sensor_stamp_and_says_its_age() -> None:
    message = p.answer_message(ANSWER, "map", STAMP + 250_000_000)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1_305_031_102, 175_304_000)
    assert message.data_age == pytest.approx(0.25)
    assert (message.status, message.text, message.status_message) == (message.TRUNCATED, "there", "cut")
    assert [message.queue_ms, message.encode_ms, message.tokens_ms, message.prefill_ms, message.decode_ms] == [
        1.0,
        2.0,
        3.0,
        4.0,
        5.0,
    ]
    assert (message.total_ms, message.latency_budget_ms, message.budget_met) == (15.0, 100.0, False)
    assert (message.spatial_tokens, message.retained_tokens, message.seed) == (2, 1, 3)
    assert message.boxes[0].center.position.z == 3.0 and message.boxes[0].size.y == 0.2
    assert message.boxes[0].center.orientation.w == 1.0


def test_without_a_scene_the_age_is_nan() -> None:
    assert math.isnan(p.answer_message(Answer(Question("?"), Status.NO_SCENE), "map", STAMP).data_age)
    before_simulated_time = p.answer_message(Answer(Question("?"), Status.OK, stamp_ns=STAMP), "map", 0)
    assert math.isnan(before_simulated_time.data_age)


@pytest.mark.parametrize("status", list(Status))
def test_status_numbers_are_those_of_the_message(status: Status) -> None:
    assert getattr(p.AnswerMsg, status.name) == int(status)


def test_report() -> None:
    message = p.report_message(ANSWER, REPORT, "map")
    assert [(layer.layer, layer.spatial_tokens, layer.flops) for layer in message.layers] == [(0, 2, 10.0), (1, 1, 5.0)]
    assert message.lorenz_share_60 == pytest.approx(0.2)
    assert message.header.stamp.nanosec == 175_304_000


def test_markers_keep_an_answer_that_comes_while_the_scene_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, list[Any]] = {}

    def create_publisher(kind: Any, topic: str, qos: Any) -> Any:
        return SimpleNamespace(
            publish=sent.setdefault(topic, []).append,
            get_subscription_count=lambda: 1,
            wait_for_all_acked=lambda timeout: True,
        )

    node: Any = SimpleNamespace(create_publisher=create_publisher, create_timer=Topic().create_timer)
    outputs = p.Publishers(node)
    offer = outputs._markers.offer

    def answer_first(build: Any) -> None:
        monkeypatch.setattr(outputs._markers, "offer", offer)
        outputs.publish_answer(ANSWER, "map", 0)
        offer(build)

    monkeypatch.setattr(outputs._markers, "offer", answer_first)
    outputs.publish_scene(SCENE, "map")
    assert {marker.ns for marker in sent["~/markers"][-1].markers} >= {"views", "answer", "boxes"}


def test_markers_show_text_boxes_and_views() -> None:
    answer = p.answer_message(ANSWER, "map", STAMP)
    array = p.markers(answer, SCENE, "map")
    assert array.markers[0].action == Marker.DELETEALL
    by_name = {marker.ns: marker for marker in array.markers[1:]}
    assert set(by_name) == {"views", "boxes", "answer"}
    assert by_name["answer"].text == "there"
    assert by_name["boxes"].scale.z == 0.3
    ends = np.array([(point.x, point.y, point.z) for point in by_name["views"].points])
    assert ends.shape == (16, 3)
    np.testing.assert_allclose(ends[0], (1.0, 0.0, 0.0))
    refused = p.answer_message(replace(ANSWER, status=Status.BUSY), "map", STAMP)
    assert [marker.ns for marker in p.markers(refused, SCENE, "map").markers[1:]] == ["views"]


def test_a_big_cloud_is_built_fast() -> None:
    """One copy, not one assertion for each byte: the slow way takes a minute for these 300,000 points."""
    n = 300_000
    scene = p.SceneView(np.zeros((n, 3), np.float32), np.zeros((n, 3), np.uint8), np.ones(n, np.int64))
    begin = time.process_time()
    p.scene_cloud(scene, "map")
    assert time.process_time() - begin < 2.0


def test_the_message_of_an_answer_is_bounded() -> None:
    long = replace(ANSWER, question=Question("x" * 10**6), status_message="[1.0, " * 10**6 + "\n")
    message = p.answer_message(long, "map", 0)
    assert len(message.status_message) <= 2000 and "more characters" in message.status_message
    assert len(message.question) == p.MAX_WRITTEN_CHARS


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
