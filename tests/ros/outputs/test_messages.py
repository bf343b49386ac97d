# SPDX-License-Identifier: Apache-2.0
"""Messages out, byte by byte where it matters."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from ros_answers import ANSWER, REPORT, SCENE, STAMP
from visualization_msgs.msg import Marker

from adatoken3d_ros.cli.output import record_of_answer, record_of_message
from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.events import SceneView
from adatoken3d_ros.ros.outputs import messages as m
from adatoken3d_ros.ros.outputs.markers import markers
from adatoken3d_ros.scene.evidence import Observed


def read(cloud: m.PointCloud2) -> dict[str, np.ndarray]:
    """The fields of a cloud as PCL reads them: by name, offset and point_step."""
    raw = np.frombuffer(cloud.data, np.uint8).reshape(cloud.height * cloud.width, cloud.point_step)
    return {f.name: raw[:, f.offset : f.offset + 4].copy().view("<f4")[:, 0] for f in cloud.fields}


def test_rgb_is_packed_as_pcl_reads_it() -> None:
    bits = m.pack_rgb(np.array([[0x12, 0x34, 0x56]], np.uint8)).view(np.uint32)
    assert hex(bits[0]) == "0x123456"


def test_retained_cloud() -> None:
    cloud = m.retained_cloud(REPORT, STAMP, "map")
    fields = read(cloud)
    assert list(fields) == ["x", "y", "z", "rgb", "contribution", "last_layer", "retained"]
    assert (cloud.height, cloud.width, cloud.point_step, cloud.row_step) == (1, 2, 28, 56)
    assert fields["y"].tolist() == [2.0, 5.0]
    assert fields["contribution"].tolist() == [0.75, 0.25]
    assert fields["last_layer"].tolist() == [7.0, 3.0]
    assert fields["retained"].tolist() == [1.0, 0.0]
    assert (cloud.header.frame_id, cloud.header.stamp.sec) == ("map", 1_305_031_102)


def test_scene_cloud_and_an_empty_one() -> None:
    fields = read(m.scene_cloud(SCENE))
    assert list(fields) == ["x", "y", "z", "rgb", "count"]
    assert fields["count"].tolist() == [4.0, 9.0]
    assert m.scene_cloud(SceneView()).width == 0


def test_answer_keeps_the_sensor_stamp_and_says_its_age() -> None:
    message = m.answer_message(ANSWER, "map", STAMP + 250_000_000)
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (1_305_031_102, 175_304_000)
    assert message.data_age == pytest.approx(0.25)
    confirmed = replace(ANSWER, confirmed_ns=STAMP + 200_000_000)
    assert m.answer_message(confirmed, "map", STAMP + 250_000_000).confirmed_age == pytest.approx(0.05)
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


def test_confidence_goes_along_and_is_nan_where_nobody_knows() -> None:
    assert m.answer_message(replace(ANSWER, confidence=0.25), "map", STAMP).confidence == 0.25
    assert math.isnan(m.answer_message(ANSWER, "map", STAMP).confidence)


def test_what_an_answer_rests_on() -> None:
    message = m.answer_message(ANSWER, "map", STAMP)
    assert (message.as_of, message.coverage) == (message.header.stamp, 0.25)
    assert (message.verdict, message.verdict_reason) == (message.SEEN_THEN_GONE, "it was there")
    here, gone = message.evidence
    assert (here.place.z, here.extent.y, here.views, here.contribution) == (3.0, 0.2, 2, 0.75)
    assert (here.first_seen.nanosec, here.last_seen.nanosec, here.gone.sec, here.moved) == (
        175_303_995,
        175_304_000,
        0,
        0,
    )
    assert (gone.gone, gone.moved, gone.moved_to.y, gone.moved_confidence) == (message.as_of, True, 8.0, 0.5)
    goal = message.goal_near
    assert (goal.header.frame_id, goal.pose.position.x, goal.pose.orientation.w) == ("map", 2.0, 1.0)
    nowhere = m.answer_message(replace(ANSWER, goal=None, goal_reason="no floor"), "map", STAMP)
    assert (nowhere.goal_near.header.frame_id, nowhere.goal_reason) == ("", "no floor")
    assert record_of_message(message)["evidence"] == record_of_answer(ANSWER)["evidence"]


@pytest.mark.parametrize("verdict", list(Observed))
def test_verdict_numbers_are_those_of_the_message(verdict: Observed) -> None:
    assert getattr(m.AnswerMsg, verdict.name) == int(verdict)


def test_without_a_scene_the_age_is_nan() -> None:
    nothing = m.answer_message(Answer(Question("?"), Status.NO_SCENE), "map", STAMP)
    assert math.isnan(nothing.data_age) and math.isnan(nothing.confirmed_age)
    before_simulated_time = m.answer_message(Answer(Question("?"), Status.OK, stamp_ns=STAMP), "map", 0)
    assert math.isnan(before_simulated_time.data_age)


@pytest.mark.parametrize("status", list(Status))
def test_status_numbers_are_those_of_the_message(status: Status) -> None:
    assert getattr(m.AnswerMsg, status.name) == int(status)


def test_report() -> None:
    message = m.report_message(ANSWER, REPORT, "map")
    assert [(layer.layer, layer.spatial_tokens, layer.flops) for layer in message.layers] == [(0, 2, 10.0), (1, 1, 5.0)]
    assert message.lorenz_share_60 == pytest.approx(0.2)
    assert message.header.stamp.nanosec == 175_304_000


def test_markers_show_text_boxes_and_views() -> None:
    answer = m.answer_message(ANSWER, "map", STAMP)
    array = markers(answer, SCENE)
    assert array.markers[0].action == Marker.DELETEALL
    by_name = {marker.ns: marker for marker in array.markers[1:]}
    assert set(by_name) == {"views", "boxes", "answer", "evidence", "goal"}
    assert by_name["evidence"].pose.position.z == 3.0 and by_name["goal"].pose.position.x == 2.0
    assert by_name["answer"].text == "there"
    assert by_name["boxes"].scale.z == 0.3
    ends = np.array([(point.x, point.y, point.z) for point in by_name["views"].points])
    assert ends.shape == (16, 3)
    np.testing.assert_allclose(ends[0], (1.0, 0.0, 0.0))
    unsure = markers(m.answer_message(replace(ANSWER, status=Status.UNSURE), "map", STAMP), SCENE)
    assert [marker.text for marker in unsure.markers if marker.ns == "answer"] == ["there (unsure)"]
    refused = m.answer_message(replace(ANSWER, status=Status.BUSY), "map", STAMP)
    assert [marker.ns for marker in markers(refused, SCENE).markers[1:]] == ["views"]


def test_markers_show_the_floor_and_what_has_gone() -> None:
    scene = replace(SCENE, free=np.zeros((3, 3)), unseen=np.ones((2, 3)), gone=ANSWER.evidence)
    by_name = {marker.ns: marker for marker in markers(None, scene).markers[1:]}
    assert set(by_name) == {"views", "free", "unseen", "gone", "moved"}
    assert (len(by_name["free"].points), len(by_name["unseen"].points)) == (3, 2)
    assert [point.z for point in by_name["moved"].points] == [6.0, 9.0]


def test_a_big_cloud_is_built_fast() -> None:
    """One copy, not one assertion for each byte: the slow way takes a minute for these 300,000 points."""
    n = 300_000
    scene = SceneView("map", np.zeros((n, 3), np.float32), np.zeros((n, 3), np.uint8), np.ones(n, np.int64))
    begin = time.process_time()
    m.scene_cloud(scene)
    assert time.process_time() - begin < 2.0


def test_the_message_of_an_answer_is_bounded() -> None:
    long = replace(ANSWER, question=Question("x" * 10**6), status_message="[1.0, " * 10**6 + "\n")
    message = m.answer_message(long, "map", 0)
    assert len(message.status_message) <= 2000 and "more characters" in message.status_message
    assert len(message.question) == m.LONGEST_TEXT


def test_how_probable_answers_are_goes_along() -> None:
    message = m.answer_message(replace(ANSWER, probability=0.5, candidate_probabilities=(0.25, 0.125)), "map", 0)
    assert message.probability == 0.5 and list(message.candidate_probabilities) == [0.25, 0.125]
    assert math.isnan(m.answer_message(ANSWER, "map", 0).probability)
