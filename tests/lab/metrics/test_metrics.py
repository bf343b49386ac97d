# SPDX-License-Identifier: Apache-2.0
"""Metrics against the numbers of pycocoevalcap 1.2 on a small made set, and against cases done by hand."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.metrics import java
from adatoken3d_ros.lab.metrics.answers import cleaned, exact, refined
from adatoken3d_ros.lab.metrics.captions import bleu, bleu_counts, cider, rouge_l, tokens
from adatoken3d_ros.lab.metrics.resampling import Resampled, interval

ANSWERS = (
    *("a brown wooden chair", "two", "left of the desk", "the TV is next to the window, behind the couch", "no"),
    "it's a round table that doesn't have four legs",
)
RIGHT = (
    ("brown chair", "the chair is brown and made of wood"),
    ("three", "2"),
    ("to the left of the desk", "left"),
    ("the tv is behind the brown couch", "next to the window"),
    ("yes",),
    ("a round table with three legs", "it is a round table", "table"),
)
# pycocoevalcap 1.2 on these, Bleu(4), Rouge(), Cider(), Meteor(), tokens by its PTBTokenizer (OpenJDK 17).
BLEU = (0.6451612903017689, 0.5327954276468817, 0.4328635112405232, 0.3125420828373055)
ROUGE = (0.7093023255813954, 0.0, 1.0, 0.7854077253218884, 0.0, 0.5823389021479713)
CIDER = (1.0884022765779204, 0.0, 4.279440877606823, 2.9469398660688495, 0.0, 1.1900179532289255)
METEOR = 0.34881260130126585

# What its tokenizer makes of them.
SENTENCES = {
    "There are two chairs, and a well-lit lamp.": "there are two chairs and a well-lit lamp",
    "It's on the left; isn't it?": "it 's on the left is n't it",
    "I cannot see the dog's bowl.": "i can not see the dog 's bowl",
    "At 3 o'clock, there is a 1,000 kg box.": "at 3 o'clock there is a 1,000 kg box",
    "the tv (a big one) is on/off": "the tv -lrb- a big one -rrb- is on/off",
    "red,blue and green": "red blue and green",
    "They're 50% done!": "they 're 50 % done",
    "on top of the desk - near the door": "on top of the desk near the door",
    "no. it is 'black'": "no it is black",
    'mirror-like "glass" door': "mirror-like glass door",
    "the chairs' legs": "the chairs legs",
    "it'll be 10:30": "it 'll be 10:30",
    "can't": "ca n't",
}


def parted() -> tuple[list[list[str]], list[list[list[str]]]]:
    return [tokens(text) for text in ANSWERS], [[tokens(text) for text in several] for several in RIGHT]


@pytest.mark.parametrize("text", SENTENCES)
def test_words_are_parted_as_by_the_usual_tokenizer(text: str) -> None:
    assert tokens(text) == SENTENCES[text].split()


def test_bleu_rouge_and_cider_are_those_of_the_usual_implementation() -> None:
    answers, right = parted()
    counts = np.sum([bleu_counts(a, r) for a, r in zip(answers, right, strict=True)], axis=0)
    np.testing.assert_allclose(bleu(counts), BLEU, atol=1e-9)
    np.testing.assert_allclose([rouge_l(a, r) for a, r in zip(answers, right, strict=True)], ROUGE, atol=1e-9)
    np.testing.assert_allclose(cider(answers, right), CIDER, atol=1e-9)


def test_a_short_answer_pays_in_bleu_and_an_empty_one_is_worth_nothing() -> None:
    """One word of a right answer of four: BLEU-1 is its precision 1 times exp(1 - 4)."""
    right = [tokens("on the left side")]
    assert bleu(bleu_counts(["left"], right))[0] == pytest.approx(np.exp(-3), abs=1e-7)
    assert bleu(bleu_counts([], right))[0] == 0 == rouge_l([], right)
    assert cider([[], ["left"]], [right, [["left"]]])[0] == 0


@pytest.mark.skipif(bool(java.why_not()), reason=java.why_not() or "all is there")
def test_the_java_programs_give_the_same() -> None:
    answers, right = parted()
    assert java.penn_tokens(ANSWERS) == answers
    assert java.meteor([" ".join(a) for a in answers], [[" ".join(r) for r in several] for several in right]) == (
        pytest.approx(METEOR, abs=1e-9)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The  brown chair. ", "brown chair"),
        ("3", "three"),
        ("none", "zero"),
        ("a TV", "TV"),
        ("to the rigth of an oven!", "to right of oven"),
        ("2 o' clock", "two o'clock"),
        ("mat2 backwards", "mat backward"),
        ("twenty-three", "twenty-three"),
        ("23", "twenty-three"),
        ("21", "21"),
    ],
)
def test_answers_are_cleaned_as_published(text: str, expected: str) -> None:
    assert cleaned(text) == expected


@pytest.mark.parametrize(
    ("answer", "right", "em", "em_refined"),
    [
        ("Two", ("2", "three"), True, True),
        ("the left", ("to the left",), False, True),
        ("to the left of the desk", ("left",), False, True),
        ("week end", ("weekend",), False, True),
        ("right", ("left",), False, False),
    ],
)
def test_exact_and_refined_match(answer: str, right: tuple[str, ...], em: bool, em_refined: bool) -> None:
    assert (exact(answer, right), refined(answer, right)) == (em, em_refined)


def test_scenes_are_drawn_not_questions() -> None:
    """Two scenes, one of three questions that are right, one of a question that is wrong: a draw has 1, 3/4 or 0."""
    drawn = Resampled(["a", "a", "b", "a"], resamples=4000, seed=1)
    means = drawn.means(np.array([1.0, 1.0, 0.0, 1.0]))
    assert set(np.round(means, 6)) == {0.0, 0.75, 1.0}
    assert np.mean(means == 0.75) == pytest.approx(0.5, abs=0.03)
    assert interval(means) == [0.0, 1.0]
