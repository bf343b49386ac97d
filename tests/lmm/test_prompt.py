# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.lmm.interface import Placeholder, PromptError, PromptIds
from adatoken3d_ros.lmm.llava3d.prompt import (
    CLICK_MARK,
    CONTROL_WORDS,
    MAX_CLICKS,
    build_prompt,
    move_boxes,
    parse_boxes,
    parse_clicks,
)

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def _text(tokenizer, prompt: PromptIds) -> str:
    """The prompt as it would be read, with its placeholders written out."""
    parts = []
    for piece in prompt.pieces:
        if isinstance(piece, Placeholder):
            parts.append("<scene>" if piece.kind == "image" else f"<click {piece.index}>")
        else:
            parts.append(tokenizer.decode(list(piece), skip_special_tokens=True))
    return "".join(parts)


def test_template_reads_as_trained(tokenizer):
    prompt = build_prompt(tokenizer, "  What is it? ")
    assert _text(tokenizer, prompt) == f"{SYSTEM} USER: <scene>\nWhat is it? ASSISTANT:"
    vicuna = build_prompt(tokenizer, "What is it?", template="vicuna_v1")
    assert _text(tokenizer, vicuna) == _text(tokenizer, prompt).replace("human", "user")


def test_rows_of_the_tiny_vocabulary(tokenizer):
    # One row for the start and each of the 24 words, then the mark that stands for the space after "USER:".
    prompt = build_prompt(tokenizer, "What is it?")
    before, image, after = prompt.pieces
    assert (len(before), image) == (1 + len(f"{SYSTEM} USER:".split()) + 1, Placeholder("image"))
    words = ["\N{LOWER ONE EIGHTH BLOCK}", "<0x0A>", "W", "h", "a", "t"]  # a line break ends no word
    assert tokenizer.convert_ids_to_tokens(list(after))[:6] == words
    assert prompt.n_tokens == len(before) + len(after) and prompt.n_clicks == 0


def test_start_token_stands_once_and_no_other_special_token(tokenizer):
    prompt = build_prompt(tokenizer, "What is at the door?", n_clicks=2)
    ids = [i for piece in prompt.pieces if not isinstance(piece, Placeholder) for i in piece]
    assert ids[0] == tokenizer.bos_token_id == 1
    assert not set(ids[1:]) & {0, 1, 2}


def test_every_run_of_text_begins_with_a_word_start(tokenizer):
    text, _ = parse_clicks("Is [1,2,3] near [4,5,6]?")
    prompt = build_prompt(tokenizer, text, n_clicks=2)
    runs = [tokenizer.convert_ids_to_tokens(list(p)) for p in prompt.pieces if not isinstance(p, Placeholder)]
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    assert [run[0] for run in runs[1:]] == [mark, mark, mark]
    assert runs[2] == [mark, mark + "near", mark]  # " near ": one mark of its own, and one for each space


def test_clicks_in_the_text_keep_their_place(tokenizer):
    text, points = parse_clicks("Compare [1.0, 2.0, 0.5] with [ -3 4e-1 .5, 1 1 1 ].")
    assert points == [(1.0, 2.0, 0.5), (-3.0, 0.4, 0.5)]
    assert text == f"Compare {CLICK_MARK} with {CLICK_MARK}."
    prompt = build_prompt(tokenizer, text, n_clicks=2)
    assert _text(tokenizer, prompt).endswith("USER: <scene>\nCompare <click 0> with <click 1>. ASSISTANT:")


def test_other_clicks_come_first_in_the_trained_wording(tokenizer):
    def asked(question: str, n: int) -> str:
        text, _ = parse_clicks(question)
        return _text(tokenizer, build_prompt(tokenizer, text, n_clicks=n)).split("<scene>\n")[1]

    assert asked("Describe it.", 1) == "The related object is located at <click 0>. Describe it. ASSISTANT:"
    assert asked("Go.", 2) == "The related objects are located at <click 0>, <click 1>. Go. ASSISTANT:"
    assert asked("Is it [0,0,0]?", 2) == "The related object is located at <click 1>. Is it <click 0>? ASSISTANT:"


def test_two_points_side_by_side(tokenizer):
    text, _ = parse_clicks("[0,0,0][1,1,1]")
    kinds = [p.kind if isinstance(p, Placeholder) else "text" for p in build_prompt(tokenizer, text, n_clicks=2).pieces]
    assert kinds == ["text", "image", "text", "click", "click", "text"]


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
        ("what is <image>", "<image>"),
        ("what is <BOXES>", "<boxes>"),
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


@pytest.mark.parametrize("word", CONTROL_WORDS)
def test_control_words_are_named(tokenizer, word):
    with pytest.raises(PromptError, match=word):
        build_prompt(tokenizer, f"Say {word} please")


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "empty"),
        ("a" * 2001, {}, "2001 characters, more than 2000"),
        ("hello", {"max_chars": 4}, "5 characters, more than 4"),
        ("a", {"template": "chatml"}, "'chatml' is unknown, known: llava_v1, vicuna_v1"),
        ("a", {"n_clicks": MAX_CLICKS + 1}, f"{MAX_CLICKS + 1} clicks"),
        (f"at {CLICK_MARK}", {"n_clicks": 0}, "mentions 1 points, but only 0 clicks"),
        ("a\x07b", {}, r"U\+0007"),
    ],
)
def test_prompts_that_cannot_be_built(tokenizer, question, options, message):
    with pytest.raises(PromptError, match=message):
        build_prompt(tokenizer, question, **options)


def test_lengths_at_the_limit_are_fine(tokenizer):
    assert build_prompt(tokenizer, "a" * 2000, n_clicks=MAX_CLICKS).n_clicks == MAX_CLICKS


def test_braces_and_line_breaks_are_plain_text(tokenizer):
    assert "\n{question}\n\t{0} ASSISTANT:" in _text(tokenizer, build_prompt(tokenizer, "{question}\n\t{0}"))


@given(st.text(max_size=80))
def test_any_text_is_refused_or_comes_out_as_it_went_in(tokenizer, text):
    try:
        marked, points = parse_clicks(text)
        prompt = build_prompt(tokenizer, marked, n_clicks=len(points))
    except PromptError:
        return
    ids = [i for piece in prompt.pieces if not isinstance(piece, Placeholder) for i in piece]
    assert ids.count(1) == 1 and not {0, 2} & set(ids)
    written = marked.strip().replace("\N{LOWER ONE EIGHTH BLOCK}", " ")
    for k in range(len(points)):
        written = written.replace(CLICK_MARK, f"<click {k}>", 1)
    assert _text(tokenizer, prompt) == f"{SYSTEM} USER: <scene>\n{written} ASSISTANT:"


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
