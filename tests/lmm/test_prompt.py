# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.lmm.interface import Placeholder, PromptIds
from adatoken3d_ros.lmm.llava3d.prompt import CONTROL_WORDS, build_prompt
from adatoken3d_ros.lmm.text_places import CLICK_MARK, MAX_CLICKS, PromptError, parse_clicks

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


@pytest.mark.parametrize("word", CONTROL_WORDS)
def test_control_words_are_named(tokenizer, word):
    for written in (word, word.upper()):
        with pytest.raises(PromptError, match=word):
            build_prompt(tokenizer, f"Say {written} please")


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("", {}, "empty"),
        ("a" * 2001, {}, "2001 characters, more than 2000"),
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
