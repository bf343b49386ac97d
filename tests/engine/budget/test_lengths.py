# SPDX-License-Identifier: Apache-2.0
"""How long answers will be, from those to similar questions."""

from __future__ import annotations

from adatoken3d_ros.engine.budget.lengths import AnswerLengths


def known(*answers: tuple[str, int]) -> AnswerLengths:
    lengths = AnswerLengths()
    for question, n_tokens in answers:
        lengths.add(question, n_tokens)
    return lengths


def test_with_few_answers_the_limit_is_expected() -> None:
    assert known(*[("Is there a chair?", 2)] * 3).of("Is there a chair?", 16, 95) == 16


def test_similar_questions_tell() -> None:
    lengths = known(
        *[(f"Is there a {thing}?", 2) for thing in ("chair", "sofa", "bed", "lamp", "desk")],
        *[(f"What is the 3D box of the {thing}?", 30) for thing in ("chair", "sofa", "bed", "lamp", "desk")],
    )
    assert lengths.of("Is there a piano?", 64, 95) == lengths.of("is there a PIANO", 64, 50) == 2
    assert lengths.of("What is the 3D box of the piano?", 64, 50) == 30
    assert lengths.of("What is the 3D box of the piano?", 16, 50) == 16


def test_where_none_is_similar_all_of_them_tell() -> None:
    lengths = known(*[("Is there a chair?", 2)] * 5, *[("Describe everything", 40)] * 5)
    assert lengths.of("Where shall we meet?", 64, 50) == 21
    assert lengths.of("Where shall we meet?", 64, 95) == 40


def test_newer_answers_count_first_and_old_ones_are_forgotten() -> None:
    lengths = known(*[("What now?", 9)] * 20, *[("What now?", 3)] * 12)
    assert lengths.of("What now?", 64, 95) == 3
    lengths.add("What now?", 5)
    assert lengths.of("What now?", 64, 100) == 5
    for _ in range(300):
        lengths.add("Is there a chair?", 2)
    assert lengths.of("What now?", 64, 95) == 2


def test_no_word_at_all() -> None:
    assert known(*[("?", 2)] * 4).of("?", 16, 50) == 2


def test_an_answer_that_was_cut_counts_for_more_than_it_had() -> None:
    lengths = AnswerLengths()
    for _ in range(4):
        lengths.add("Is there a chair?", 2)
    for n, expected in ((2, 4), (4, 8), (1, 8), (8, 10)):
        for _ in range(12):
            lengths.add_cut("Is there a chair?", n, 10)
        assert lengths.of("Is there a chair?", 10, 95) == expected
