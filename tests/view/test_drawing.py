# SPDX-License-Identifier: Apache-2.0
"""What the view draws and hits, by hand; questions that are asked twice; that texts are escaped."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.cli.output import record_of_answer
from adatoken3d_ros.engine.answer import Answer, Question, Status, TokenReport
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.view import drawing
from adatoken3d_ros.view.dialogue import Asked, Dialogue
from adatoken3d_ros.view.report import Reported
from adatoken3d_ros.view.source import Ages, Shown

XYZ = np.array([[0, 0, 2], [1, 0, 2], [0, 1, 4], [0, 0, -1]], dtype=np.float32)
TOKENS = TokenReport(
    XYZ, np.arange(12, dtype=np.uint8).reshape(4, 3), np.array([0.5, 0.5, 0, 0], np.float32),
    np.array([3, 1, 0, 3]), np.array([True, False, False, True]), (4, 3, 2, 2), (1.0,) * 4, 0.2,
)  # fmt: skip
EVIL = "<script>alert(1)</script>{alert(1)}"


def test_what_is_in_a_rectangle() -> None:
    """A camera at the origin that looks along z, 90 degrees high and wide."""
    inside = drawing.in_rectangle(XYZ, np.eye(4), math.pi / 2, 1.0, (0.4, 0.4), (0.8, 0.6))
    assert inside.tolist() == [True, True, False, False]
    assert drawing.in_rectangle(XYZ, np.eye(4), math.pi / 2, 1.0, (0.4, 0.6), (0.6, 0.7)).tolist() == [0, 0, 1, 0]
    wide = drawing.in_rectangle(XYZ, np.eye(4), math.pi / 2, 4.0, (0.55, 0.4), (0.57, 0.6))
    assert wide.tolist() == [False, True, False, False]


def test_a_scene_is_looked_at_from_above_wherever_it_is() -> None:
    room = np.random.default_rng(0).uniform((98, 48, 0), (102, 52, 2), (1000, 3))
    eye, middle = drawing.viewpoint(np.concatenate([room, [[9000.0, 0, 0]]]).astype(np.float32))
    np.testing.assert_allclose(middle, (100, 50, 1), atol=0.2)
    assert 2 < np.linalg.norm(eye - middle) < 8 and eye[2] > 3
    assert np.isfinite(drawing.viewpoint(XYZ[:0])).all()


def test_what_a_ray_hits() -> None:
    forward = np.array([0.0, 0.0, 3.0])
    assert drawing.hit(XYZ, np.zeros(3), forward) == 0
    assert drawing.hit(XYZ, np.zeros(3), -forward) == 3
    assert drawing.hit(XYZ, np.array([5.0, 0, 0]), forward) is None
    assert drawing.hit(XYZ[:0], np.zeros(3), forward) is None


def test_colours() -> None:
    scene = Shown(XYZ, np.full((4, 3), 9, np.uint8), np.array([0, 1, 2, 2]) * 10**9, stamp_ns=2 * 10**9)
    assert drawing.colours(drawing.LAYER, scene, None)[1].tolist() == [[9] * 3] * 4  # before any answer
    age = drawing.colours(drawing.LIVE_AGE, scene, TOKENS)[1]
    assert age[2].tolist() == age[3].tolist() == [250, 220, 60] and age[0].tolist() == [48, 18, 110]
    layer = drawing.colours(drawing.LAYER, scene, TOKENS)[1]
    assert layer[0].tolist() == [250, 220, 60] and layer[2].tolist() == [48, 18, 110]
    share = drawing.colours(drawing.SHARE, scene, TOKENS)[1]
    assert share[0].tolist() == share[1].tolist() != share[2].tolist()
    assert drawing.colours(drawing.PICTURE, scene, TOKENS)[1] is TOKENS.rgb


def test_ages_are_those_of_the_last_change() -> None:
    ages, count = Ages(), np.array([1, 1, 1, 1])
    assert ages.of(XYZ, count, 5).tolist() == [5] * 4
    assert ages.of(XYZ, np.array([1, 2, 1, 1]), 7).tolist() == [5, 7, 5, 5]
    assert ages.of(XYZ[1:], count[1:], 9).tolist() == [9, 5, 5]


def test_lit_pictures() -> None:
    shown = drawing.lit_picture(np.full((4, 8, 3), 100, np.uint8), (2, 2), (0.25, 0.0, 0.75, 1.0), [1])
    expected = np.full((4, 8), 25)
    expected[:2, 4:6] = 100
    assert (shown == expected[..., None]).all()
    whole = np.ones((2, 2, 3), np.uint8)
    assert drawing.lit_picture(whole, (0, 0), (0, 0, 1, 1), []) is whole


class Scripted:
    """A source that knows what it answers to whom."""

    strategies, budget_ms, click_question = ("ours", "none"), 0.0, "What is at {p}?"

    def __init__(self) -> None:
        self.heard: list[tuple[Question, str]] = []

    def ask(self, question: Question, strategy: str, on_text: Any, on_stage: Any) -> Reported:
        self.heard.append((question, strategy))
        part = bool(len(question.without) or len(question.only)) or strategy == "none"
        text, known = ("chair", {"chair": 0.75, "table": 0.125}) if part else ("table", {"table": 0.5, "chair": 0.25})
        chances = tuple(known.get(one, 0.0) for one in question.candidates)
        own = known[text] if chances else math.nan
        times = StageTimes(total=1000.0 / len(self.heard))  # what comes again is quicker
        answer = Answer(question, Status.OK, text, probability=own, candidate_probabilities=chances, times=times)
        return Reported(record_of_answer(answer), TOKENS)


def test_asked_again_without_what_was_selected() -> None:
    source = Scripted()
    dialogue = Dialogue(source)
    first = dialogue.ask(Question("What?", latency_budget_ms=9.0), "ours")
    pair = dialogue.again(first, XYZ[:2], False, print, print)
    assert pair.chances == (("table", 0.5, 0.125), ("chair", 0.25, 0.75))
    assert (pair.left.text, pair.right.text, pair.names) == ("table", "chair", ("as before", "without 2 tokens"))
    np.testing.assert_array_equal(source.heard[2][0].without, XYZ[:2])
    assert {(question.latency_budget_ms, strategy) for question, strategy in source.heard} == {(9.0, "ours")}
    assert len(dialogue.again(first, XYZ[:1], True, print, print).right.question.only) == 1
    compared = dialogue.compare(Question("What?"), ("ours", "none"))
    assert [one[1] for one in source.heard[-3:]] == ["ours", "none", "ours"]
    assert compared.chances == pair.chances
    assert pair.left.answer.record["total_ms"] == first.answer.record["total_ms"] == 1000.0
    assert compared.left.answer.record["total_ms"] > compared.right.answer.record["total_ms"]
    html = drawing.pair_html(pair)
    assert "0.125 (-0.375)" in html and "0.750 (+0.500)" in html
    unknown = drawing.pair_html(replace(pair, chances=(("a", math.nan, 0.5),)))
    assert "nan" not in unknown and unknown.count("not known") == 1
    assert drawing.history_html(dialogue.history).count("<tr>") == 7


class Moving(Scripted):
    """As the camera moves, the question is answered in another way from the second time on."""

    def ask(self, question: Question, strategy: str, on_text: Any, on_stage: Any) -> Reported:
        if self.heard:
            return super().ask(question, strategy, on_text, on_stage)
        self.heard.append((question, strategy))
        return Reported(record_of_answer(Answer(question, Status.OK, "nothing")), TOKENS)


def test_a_scene_that_changes_meanwhile_leaves_no_probability_unknown() -> None:
    pair = Dialogue(Moving()).compare(Question("What?"), ("ours", "none"))  # type: ignore[arg-type]
    assert pair.chances == (("table", 0.5, 0.125), ("chair", 0.25, 0.75))


def test_texts_are_no_html() -> None:
    record = record_of_answer(Answer(Question(EVIL), Status.OK, EVIL, EVIL, strategy=EVIL))
    asked = Asked(Question(EVIL), EVIL, Reported(record))
    pair = replace(Dialogue(Scripted()).compare(Question(EVIL), (EVIL, EVIL)), left=asked)
    for html in (
        drawing.answer_html(record),
        drawing.writing_html(EVIL, EVIL, EVIL),
        drawing.history_html([asked]),
        drawing.pair_html(pair),
    ):
        assert "<script" not in html and "&lt;script&gt;" in html


@pytest.mark.parametrize(("budget", "met"), [(0.0, True), (10.0, False)])
def test_the_bar_tells_the_budget(budget: float, met: bool) -> None:
    record = record_of_answer(Answer(Question("a", latency_budget_ms=budget), Status.OK, "b", budget_met=met))
    assert ("budget 10 ms missed" in drawing.bar_html(record)) == (not met)
