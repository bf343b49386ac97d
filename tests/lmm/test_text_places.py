# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.lmm.text_places import (
    CLICK_MARK,
    MAX_CLICKS,
    PromptError,
    check_text,
    move_boxes,
    parse_boxes,
    parse_clicks,
)


def test_box_gives_its_centre():
    assert parse_clicks("[1,2,3,0.1,0.2,0.3]")[1] == [(1, 2, 3)]
    assert parse_clicks("[1;2;3; 1 1 1 0 0 \N{MINUS SIGN}1.5]")[1] == [(1, 2, 3)]


@pytest.mark.parametrize(
    "text", ["pick [a] or [b]", "row [1]", "cells [1, 2]", "[ ]", "a ] b [", "[1,,2,3]", "[1 2 x]"]
)
def test_other_brackets_are_text(text):
    assert parse_clicks(text) == (text, [])


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ("[1,2,3,4]", r"\[1,2,3,4\] has 4 numbers"),
        ("[1,2,nan]", r"\[1,2,nan\] is not finite"),
        ("[inf,0,0]", "not finite"),
        ("[1e999,0,0]", "not finite"),
        ("[1,2,3,4,5,-inf]", "not finite"),
        ("a\x00b", r"U\+0000"),
        ("a\x1b[31mb", r"U\+001B"),
        ("a\x85b", r"U\+0085"),
        ("a\ud800b", r"U\+D800"),
        (f"where is {CLICK_MARK}", r"U\+FFFC"),
        ("[0,0,0]" * (MAX_CLICKS + 1), f"{MAX_CLICKS + 1} clicks are more than {MAX_CLICKS}"),
    ],
)
def test_questions_that_cannot_be_asked(question, message):
    with pytest.raises(PromptError, match=message):
        parse_clicks(question)


finite = st.floats(-1e3, 1e3).map(lambda v: round(v, 3))


@given(st.lists(st.tuples(finite, finite, finite), max_size=5), st.sampled_from([", ", ",", " ", " ; ", "\t"]))
def test_points_survive_writing_and_parsing(points, separator):
    question = "Look at " + " and ".join("[" + separator.join(f"{v:.3f}" for v in p) + "]" for p in points) + "."
    assert parse_clicks(question)[1] == points


def test_boxes_of_an_answer():
    answer = (
        "It is a chair. It is localized at [-3.150, -2.905, 0.940, 0.601, 1.218, 1.938] next to "
        "[0.5,-0.25,+1,1,1,1,0.1,0.2,-.3], not [1, 2, 3], [a, b] or [1,2,3,4,5,1e999]."
    )
    assert parse_boxes(answer) == [
        (-3.15, -2.905, 0.94, 0.601, 1.218, 1.938),
        (0.5, -0.25, 1.0, 1.0, 1.0, 1.0, 0.1, 0.2, -0.3),
    ]
    assert parse_boxes("[ 1 2 3\n4 5 6 ]") == [(1, 2, 3, 4, 5, 6)]
    assert parse_boxes("") == parse_boxes("[[1,2,3]]") == parse_boxes("[1,2,3,4,5,6") == []


@given(st.text(alphabet="[]0123456789,.-+e nai", max_size=60))
def test_boxes_are_finite_whatever_the_model_writes(text):
    for box in parse_boxes(text):
        assert len(box) in (6, 9) and all(math.isfinite(v) for v in box)


@pytest.mark.parametrize(
    ("text", "moved"),
    [
        ("At [1.0, 2.0, 0.5, 1, 1, 1.25].", "At [32.0, -5.0, 1.8, 1, 1, 1.25]."),
        ("[ -31.00;+7.50\t.25 1 2 3 0 0 9 ]", "[ 0.00;+0.50\t1.50 1 2 3 0 0 9 ]"),
        ("[1,2,3,4,5,6] and [0,0,0,1,1,1]", "[32,-5,4,4,5,6] and [31,-7,1,1,1,1]"),
        ("[\N{MINUS SIGN}40.50, 6., 1e-1, 1, 1, 1]", "[\N{MINUS SIGN}9.50, -1., 1.35, 1, 1, 1]"),
        ("not [1, 2, 3], [a, b], [1,2,3,4,5,6,7] or [1,2,3,4,5,nan]",) * 2,
        ("half of one [1.0, 2.0, 0.5, 1, 1,", "half of one"),
        ("with words [1.0, 2.0 or so",) * 2,
        ("",) * 2,
    ],
)
def test_boxes_move_in_the_text_and_all_else_stays(text, moved):
    assert move_boxes(text, (31.0, -7.0, 1.25)) == moved
    assert move_boxes(text, (0.0, 0.0, 0.0)) == text


@given(st.text(alphabet="[]0123456789,.-+e nai", max_size=60), st.integers(0, 60))
def test_what_is_moved_of_a_beginning_begins_what_is_moved_of_the_whole(text, length):
    text, origin = text.strip(), (31.0, -7.0, 1.25)
    assert move_boxes(text, origin).startswith(move_boxes(text[:length].strip(), origin))
    boxes = parse_boxes(text)
    if all(abs(v) < 1e6 for box in boxes for v in box):
        moved = parse_boxes(move_boxes(text, origin))
        for box, there in zip(boxes, moved, strict=True):
            assert there[3:] == box[3:]
            assert there[:3] == pytest.approx([v + o for v, o in zip(box, origin, strict=False)], abs=0.51)


def test_control_words_are_those_of_the_model():
    check_text("what is <image>")
    with pytest.raises(PromptError, match="the control word <image>"):
        check_text("what is <IMAGE>", control_words=["<box>", "<image>"])
