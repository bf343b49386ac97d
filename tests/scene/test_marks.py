# SPDX-License-Identifier: Apache-2.0
"""Places with names: what may be one, and what a question makes of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from adatoken3d_ros.scene import marks as module
from adatoken3d_ros.scene.marks import Mark, MarkError, Marks

DOCK = Mark("charging dock", (1.0, 2.5, 0.0), (0.4, 0.4, 0.2), 7)
MARKS = Marks([DOCK, Mark("the dock", (-1.0, 0.0, 0.0)), Mark("Café", (0.0, 0.0, 3.25)), Mark("7", (7.0, 0.0, 0.0))])


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("What is near the charging dock?", "What is near [1.000, 2.500, 0.000]?"),
        ("Charging  Dock!", "[1.000, 2.500, 0.000]!"),
        ("What is between the dock and my CAFÉ?", "What is between [-1.000, 0.000, 0.000] and [0.000, 0.000, 3.250]?"),
        ("Is the docker near the charging docks?", "Is the docker near the charging docks?"),
        ("Is there a dock? Which dock, how many docks, another dock?",) * 2,
        ("Is [7, 7.0, 7] 1.7 m or 7.5 m from 7?", "Is [7, 7.0, 7] 1.7 m or 7.5 m from [7.000, 0.000, 0.000]?"),
        ("dock, dock", "[-1.000, 0.000, 0.000], [-1.000, 0.000, 0.000]"),
        ("", ""),
    ],
)
def test_a_question_that_names_marks(text: str, places: str) -> None:
    assert MARKS.resolved(text) == places
    assert Marks().resolved(text) == text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": ""}, "1 to 64 printable"),
        ({"name": "x" * 65}, "1 to 64 printable"),
        ({"name": " dock"}, "single spaces"),
        ({"name": "a\nb"}, "single spaces"),
        ({"name": "a\x1bb"}, "printable"),
        ({"name": "What"}, "stands in questions"),
        ({"name": "the ?"}, "a letter or digit"),
        ({"name": "[1, 2, 3]"}, "none of"),
        ({"name": "<image>"}, "none of"),
        ({"place": (math.nan, 0.0, 0.0)}, "'dock' is at .*nan"),
        ({"place": (0.0, 1e9, 0.0)}, "'dock' is at .*not within"),
        ({"extent": (0.0, -1.0, 0.0)}, "'dock' has edges of"),
        ({"extent": (math.inf, 0.0, 0.0)}, "'dock' has edges of"),
    ],
)
def test_what_is_no_mark_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(MarkError, match=named):
        Mark(**{"name": "dock", "place": (0.0, 0.0, 0.0), **change})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("Café", "What is near the cafe\u0301?"),
        ("Cafe\u0301", "What is near the CAFÉ?"),
        ("Große Straße", "What is near the GROSSE STRASSE?"),
        ("充电桩", "充电桩在哪里?"),
        ("Ladestation Süd", "Was ist bei ladestation  süd?"),
    ],
)
def test_a_name_of_any_script_is_found_however_it_is_written(name: str, text: str) -> None:
    marks = Marks([Mark(name, (1.0, 2.0, 3.0))])
    assert "[1.000, 2.000, 3.000]" in marks.resolved(text)


def test_one_name_is_of_one_place_and_goes_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MarkError, match="already"):
        Marks([Mark("Café", (0.0, 0.0, 0.0))]).add(Mark("CAFE\u0301", (0.0, 0.0, 0.0)))
    marks = Marks([DOCK])
    for name in ("Charging Dock", "the charging dock"):
        with pytest.raises(MarkError, match=r"a mark 'charging dock' already, at \[1.0, 2.5, 0.0\] m"):
            marks.add(Mark(name, (0.0, 0.0, 0.0)))
    assert marks.remove("the CHARGING dock") is DOCK and not len(marks)
    with pytest.raises(MarkError, match="there is no mark 'dock'; there are: none"):
        marks.remove("dock")
    monkeypatch.setattr(module, "MOST", 1)
    marks.add(DOCK)
    with pytest.raises(MarkError, match="1 marks already"):
        marks.add(Mark("door", (0.0, 0.0, 0.0)))
    marks.add_missing([Mark("door", (0.0, 0.0, 0.0))])
    assert marks.all() == (DOCK,)


def test_marks_come_back_from_json_and_nothing_else_does() -> None:
    assert Marks.read(json.loads(json.dumps(MARKS.plain()))).all() == MARKS.all()
    bad: list[Any] = [7, [7], [{}], [{**MARKS.plain()[0], "place": [1, 2]}], [{**MARKS.plain()[0], "place": "abc"}]]
    for value in [*bad, [{**MARKS.plain()[0], "added_ns": math.inf}], [MARKS.plain()[0]] * 2]:
        with pytest.raises(MarkError):
            Marks.read(value)
