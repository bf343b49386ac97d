# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from adatoken3d_ros.engine.words import whole_words


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("a red cha", "a red"),
        ("a red chair.", "a red chair."),
        ("a red chair, ", "a red chair,"),
        ("it is 1.", "it is"),
        ("it is 1.2", "it is"),
        ("it is 1,", "it is"),
        ("it is -", "it is"),
        ("it is -3", "it is"),
        ("I don'", "I"),
        ("I don\u2019", "I"),
        ("a dark-", "a"),
        ("at [0.5, 1.0, 2.0, 1.0, 1.0, 0", "at [0.5, 1.0, 2.0, 1.0, 1.0,"),
        ("at [0.5", "at"),
        ("at [0.5, 1.0]", "at [0.5, 1.0]"),
        # Without spaces between words, each character stands for itself.
        ("says 日本", "says 日本"),
        ("says 日本 12", "says 日本"),
        ("サッカ", "サッカ"),
        ("椅子が 3", "椅子が"),
        # One that would leave nothing stays, but for a number's stop.
        ("refr", "refr"),
        ("1.", "1"),
        ("1.2", "1.2"),
        ("", ""),
    ],
)
def test_whole_words(text: str, whole: str) -> None:
    assert whole_words(text) == whole


def test_whole_words_of_a_text_begin_those_of_a_longer_one() -> None:
    text = "the U.S. chair(s), don't: -1.25 m [0.5, 1,000.0] at 12:30 a/b 'x' 3. Well-made. 1.5"
    for start in range(len(text)):
        wholes = [whole_words(text[start:end].strip()) for end in range(start, len(text) + 1)]
        assert all(longer.startswith(whole) for whole, longer in zip(wholes, wholes[1:], strict=False)), text[start:]
