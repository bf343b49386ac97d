# SPDX-License-Identifier: Apache-2.0
"""What people read about an answer, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from adatoken3d_ros.cli.output import brief, print_answer, record_of_answer, record_of_message, rows
from adatoken3d_ros.engine.answer import Answer, Box, Question, Status
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.scene.evidence import Evidence, Observed
from adatoken3d_ros.view.drawing import answer_html
from adatoken3d_ros.view.report import Reported, report_page

ANSWER = Answer(
    Question("Where is the chair?", np.array([[1.0, 2.0, 3.5]]), latency_budget_ms=300.0),
    Status.TRUNCATED,
    text="[bold]there",
    status_message="cut",
    boxes=(Box((1.0, 2.0, 3.0), (0.5, 0.25, 1.0)),),
    stamp_ns=2_000_000_005,
    times=StageTimes(1.0, 2.0, 3.0, 4.0, 5.0, 15.04),
    budget_met=False,
    spatial_tokens=200,
    retained_tokens=25,
    prefill_flops=1e9,
    prefill_flops_unpruned=4e9,
    strategy="ours",
    model_id="m@1",
    plan="ours, all tokens",
    predicted=StageTimes(0.0, 2.0, 3.0, 4.0, 5.0, 14.0),
    as_of_ns=2_000_000_005,
    verdict=Observed.SEEN_THEN_GONE,
    verdict_reason="there until 1.50 s",
    evidence=(
        Evidence((1.0, 2.0, 0.5), (0.5, 0.25, 1.0), 1_000_000_000, 1_500_000_000, 3, 0.25),
        Evidence((0.0, 1.0, 0.5), (0.5, 0.5, 0.5), 5, 1_000_000_002, 1, 0.0, 2_000_000_005, (3.0, 4.0, 0.5), 0.75),
    ),
    coverage=0.5,
    goal=np.array([[1.0, 0, 0, 7], [0, 1, 0, 8], [0, 0, 1, 0], [0, 0, 0, 1]]),
)


def point(values: Any) -> Any:
    return SimpleNamespace(**dict(zip("xyz", values, strict=True)))


def stamp(time_ns: int) -> Any:
    return SimpleNamespace(sec=time_ns // 10**9, nanosec=time_ns % 10**9)


def message_of(answer: Answer) -> Any:
    """The fields of adatoken3d/msg/Answer for an answer, without ROS."""
    record = record_of_answer(answer)
    boxes = [
        SimpleNamespace(center=SimpleNamespace(position=point(box.centre)), size=point(box.size))
        for box in answer.boxes
    ]
    evidence = [
        SimpleNamespace(
            place=point(item.place),
            extent=point(item.extent),
            first_seen=stamp(item.first_ns),
            last_seen=stamp(item.last_ns),
            views=item.views,
            contribution=item.contribution,
            gone=stamp(item.gone_ns),
            moved=item.moved_to is not None,
            moved_to=point(item.moved_to or (0.0, 0.0, 0.0)),
            moved_confidence=item.moved_confidence,
        )
        for item in answer.evidence
    ]
    goal = (0.0, 0.0, 0.0) if answer.goal is None else answer.goal[:3, 3].tolist()
    return SimpleNamespace(
        **{
            **record,
            "status": int(answer.status),
            "boxes": boxes,
            "header": SimpleNamespace(stamp=stamp(answer.stamp_ns)),
            "data_age": 0.75,
            "confirmed_age": 0.5,
            "confidence": answer.confidence,
            "as_of": stamp(answer.as_of_ns),
            "verdict": int(answer.verdict),
            "evidence": evidence,
            "coverage": answer.coverage,
            "probability": answer.probability,
            "goal_near": SimpleNamespace(
                header=SimpleNamespace(frame_id="" if answer.goal is None else "map"),
                pose=SimpleNamespace(position=point(goal)),
            ),
        }
    )


def test_rows_by_hand() -> None:
    assert rows(record_of_answer(ANSWER)) == [
        ("question", "Where is the chair?"),
        ("answer", "[bold]there"),
        ("status", "TRUNCATED: cut"),
        ("boxes (m)", "centre (1.00, 2.00, 3.00) size (0.50, 0.25, 1.00)"),
        ("known", "SEEN_THEN_GONE: there until 1.50 s"),
        ("spatial tokens", "200 before, 25 after (12% kept)"),
        ("prefill FLOPs", "1e+09 of 4e+09 (75.0% saved)"),
        ("time (ms)", "15.0 in all: queue 1.0, encode 2.0, tokens 3.0, prefill 4.0, decode 5.0"),
        ("age of the data", "no live data"),
        ("latency budget", "300 ms, missed"),
        ("strategy, model", "ours, m@1"),
    ]


def test_an_answer_whose_plan_could_not_be_kept_does_not_look_like_another() -> None:
    said = "the latency budget of 40 ms cannot be kept"
    for message, status in ((said, f"DEGRADED: {said}"), ("", "OK")):
        record = record_of_answer(replace(ANSWER, status=Status.OK, status_message=message))
        assert dict(rows(record))["status"] == status and brief(record).startswith(status)
        badge = status.partition(":")[0]
        assert f">{badge}</span>" in report_page([Reported(record)], (), "") and badge in answer_html(record)
        assert record["status"] == "OK"  # as in the message


def test_message_and_engine_give_the_same_record() -> None:
    answer = replace(ANSWER, confidence=0.25, probability=0.125, candidate_probabilities=(0.5, 0.25))
    record = record_of_answer(answer)
    assert (record["probability"], record["candidate_probabilities"]) == (0.125, [0.5, 0.25])
    assert record_of_answer(ANSWER)["probability"] is None
    assert record.pop("clicks") == [[1.0, 2.0, 3.5]]  # which a message does not tell
    assert record["plan"] == "ours, all tokens" and record["predicted_ms"] == 14.0
    assert record_of_message(message_of(answer)) == {**record, "data_age": 0.75, "confirmed_age": 0.5}


def test_confidence_is_told_where_it_is_known() -> None:
    known = record_of_answer(replace(ANSWER, confidence=0.625))
    assert known["confidence"] == 0.625 and ("confidence", "62% likely to be right") in rows(known)
    unknown = record_of_answer(ANSWER)
    assert unknown["confidence"] is None and not [name for name, _ in rows(unknown) if name == "confidence"]
    message = message_of(ANSWER)
    message.confidence = math.nan
    assert record_of_message(message)["confidence"] is None


def test_both_ages_are_told() -> None:
    assert ("age of the data", "0.75 s, confirmed 0.50 s ago") in rows(record_of_message(message_of(ANSWER)))


def test_what_is_not_known() -> None:
    message = message_of(ANSWER)
    message.data_age = message.confirmed_age = message.predicted_ms = math.nan
    record = record_of_message(message)
    assert record["data_age"] is None and record["confirmed_age"] is None and record["predicted_ms"] is None


def test_nothing_seen_divides_by_nothing() -> None:
    empty = rows(record_of_answer(Answer(Question("x"), Status.NO_SCENE, status_message="nothing seen")))
    assert ("spatial tokens", "0 before, 0 after") in empty
    assert ("prefill FLOPs", "none") in empty
    assert ("answer", "(empty)") in empty
    assert ("strategy, model", "none was asked") in empty


def test_text_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_answer(record_of_answer(ANSWER), Console(width=120))
    assert "[bold]there" in capsys.readouterr().out
