# SPDX-License-Identifier: Apache-2.0
"""What comes from outside stands in a message on one line, and in bounded length."""

from __future__ import annotations

import sys
from array import array
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.text import MESSAGE, TRACE, described, escaped, quoted, shown, trace


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, with spaces and ünï©ødé", "plain, with spaces and ünï©ødé"),
        ("a\n[FATAL] forged", "a\\n[FATAL] forged"),
        ("\x1b[2Jgone\r\0", "\\x1b[2Jgone\\r\\x00"),
        ("right\u202eleft\u2028line\ud800", "right\\u202eleft\\u2028line\\ud800"),
        ("a\\n stays", "a\\n stays"),
    ],
)
def test_escaped(text: str, expected: str) -> None:
    assert escaped(text) == expected
    assert escaped(expected) == expected


def test_shown_says_what_was_cut() -> None:
    assert shown("x" * 100, 100) == "x" * 100
    assert shown("x" * 101, 100) == "x" * 60 + "... (41 more characters)"
    assert shown("\n" * 90, 100) == "\\n" * 30 + "... (30 more characters)"
    assert shown(ValueError("a\nb")) == "a\\nb"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("it's", '"it\'s"'),
        ("a\nb", "'a\\nb'"),
        ("x" * 1000, f"'{'x' * 80}'... (1000 characters)"),
        (b"\xff" * 200, f"{bytes([255] * 80)!r}... (200 bytes)"),
        (None, "None"),
        (1.5, "1.5"),
        (True, "True"),
        (7, "7"),
        (10**5000, "an integer of 16610 bits"),
        ([1, "a", 2.5], "[1, 'a', 2.5]"),
        ((1, 2), "(1, 2)"),
        ({"k": [1]}, "{'k': [1]}"),
        (array("d", [0.5, 1.5]), "[0.5, 1.5]"),
        (np.array([1.0, np.nan]), "[1.0, nan]"),
        (np.zeros((1, 3)), "[0.0, 0.0, 0.0] (shape (1, 3))"),
        ([float("nan")] * 10**6, "[" + "nan, " * 16 + "...] (1000000 in all)"),
        (np.full(10**6, np.nan), "[" + "nan, " * 16 + "...] (1000000 in all)"),
    ],
    ids=count(),
)
def test_quoted(value: Any, expected: str) -> None:
    assert quoted(value) == expected


class Unwritable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def test_what_cannot_be_written_is_named_by_its_kind() -> None:
    said = "<Unwritable, which raises RuntimeError when it is written>"
    assert (quoted(Unwritable()), shown(Unwritable())) == (said, said)


def nested(depth: int) -> Any:
    value: Any = "x" * 1000
    for _ in range(depth):
        value = [value] * 50
    return value


@pytest.mark.parametrize("depth", range(4))
def test_quoted_is_bounded_for_nested_values(depth: int) -> None:
    assert len(quoted(nested(depth))) < 400


def test_quoted_of_what_is_nested_beyond_reason() -> None:
    value: Any = []
    for _ in range(sys.getrecursionlimit() * 2):
        value = [value]
    assert len(quoted(value)) < 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=300) | st.binary(),
    lambda inner: st.lists(inner, max_size=50) | st.dictionaries(st.text(max_size=5), inner) | st.tuples(inner, inner),
    max_leaves=30,
)


@given(VALUES)
def test_quoted_is_one_short_line(value: Any) -> None:
    text = quoted(value)
    assert text.isprintable() and len(text) < 1200


@given(st.text(st.characters(), max_size=500), st.integers(41, 300))
def test_shown_is_one_line_within_its_limit(text: str, limit: int) -> None:
    line = shown(text, limit)
    assert line.isprintable() and len(line) <= limit
    assert shown(line, limit) == line


def test_a_traceback_has_its_lines_and_an_exception_one() -> None:
    try:
        try:
            raise KeyError("in\nner")
        except KeyError as inner:
            raise ValueError("out\n[FATAL] er" + "x" * 10**6) from inner
    except ValueError as error:
        text, line = trace(error), described(error)
    assert 'File "' in text and "raise ValueError" in text and "\ncaused this:\n" in text
    assert "ValueError: out\\n[FATAL] er" in text and "\n[FATAL]" not in text and "'in\\nner'" in text
    assert len(text) <= TRACE + 100
    assert line.startswith("ValueError: out\\n") and len(line) <= MESSAGE


def test_the_end_of_a_long_traceback_is_kept() -> None:
    def deep(levels: int) -> None:
        if levels:
            deep(levels - 1)
        raise ValueError("the bottom")

    with pytest.raises(ValueError) as caught:
        deep(400)
    assert len(trace(caught.value, 500)) < 600 and trace(caught.value, 500).endswith("ValueError: the bottom")
