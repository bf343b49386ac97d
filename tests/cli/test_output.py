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

from adatoken3d_ros.cli.output import print_answer, record_of_answer, record_of_message, rows
from adatoken3d_ros.engine.answer import Answer, Box, Question, Status
from adatoken3d_ros.engine.stages import StageTimes

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
)


def message_of(answer: Answer) -> Any:
    """The fields of adatoken3d/msg/Answer for an answer, without ROS."""
    record = record_of_answer(answer)
    fields = {key: value for key, value in record.items() if key not in ("stamp_ns", "boxes", "status", "clicks")}
    boxes = [
        SimpleNamespace(
            center=SimpleNamespace(position=SimpleNamespace(**dict(zip("xyz", box.centre, strict=True)))),
            size=SimpleNamespace(**dict(zip("xyz", box.size, strict=True))),
        )
        for box in answer.boxes
    ]
    header = SimpleNamespace(stamp=SimpleNamespace(sec=2, nanosec=5))
    return SimpleNamespace(
        **{
            **fields,
            "status": int(answer.status),
            "boxes": boxes,
            "header": header,
            "data_age": 0.75,
            "confirmed_age": 0.5,
            "confidence": answer.confidence,
        }
    )


def test_rows_by_hand() -> None:
    assert rows(record_of_answer(ANSWER)) == [
        ("question", "Where is the chair?"),
        ("answer", "[bold]there"),
        ("status", "TRUNCATED: cut"),
        ("boxes (m)", "centre (1.00, 2.00, 3.00) size (0.50, 0.25, 1.00)"),
        ("spatial tokens", "200 before, 25 after (12% kept)"),
        ("prefill FLOPs", "1e+09 of 4e+09 (75.0% saved)"),
        ("time (ms)", "15.0 in all: queue 1.0, encode 2.0, tokens 3.0, prefill 4.0, decode 5.0"),
        ("age of the data", "no live data"),
        ("latency budget", "300 ms, missed"),
        ("strategy, model", "ours, m@1"),
    ]


def test_message_and_engine_give_the_same_record() -> None:
    answer = replace(ANSWER, confidence=0.25)
    record = record_of_answer(answer)
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
