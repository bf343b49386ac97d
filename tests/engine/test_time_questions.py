# SPDX-License-Identifier: Apache-2.0
"""Which questions are about time, what they ask, and which of them are not understood."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adatoken3d_ros.engine.time_questions import NotUnderstood, WhatChanged, WhenSeen, parse, span


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("When did you last see the chair?", WhenSeen("the chair")),
        ("when did you  first see the Red Chair", WhenSeen("the Red Chair", first=True)),
        ("When did you see my keys last?", WhenSeen("my keys")),
        ("When did you see the door for the first time?", WhenSeen("the door", first=True)),
        ("When was the chair last seen?", WhenSeen("the chair")),
        ("When were the keys seen?", WhenSeen("the keys")),
        ("How long ago did you see the charging dock?", WhenSeen("the charging dock")),
        ("When was the last time you saw the dog?", WhenSeen("the dog")),
        ("What changed in the last minute?", WhatChanged(60)),
        ("What has changed in the past 5 minutes?", WhatChanged(300)),
        ("What is new since two hours ago?", WhatChanged(7200)),
        ("Did anything move in the last half an hour?", WhatChanged(1800)),
        ("Has anything been moved within the last 90 seconds?", WhatChanged(90)),
        ("What has gone missing?", WhatChanged(math.inf)),
        ("what disappeared during the last 1.5 hours", WhatChanged(5400)),
        ("What things have changed here?", WhatChanged(math.inf)),
        ("WHEN DID YOU FIRST SEE THE CHAIR", WhenSeen("THE CHAIR", first=True)),
        ("When did you see İİ's chair last?", WhenSeen("İİ's chair")),
        ("When was the last seen spot last seen?", WhenSeen("the last seen spot")),
        ("What has changed in the last ٥ minutes?", WhatChanged(300)),
        ("When’s the last time you saw the chairs?", WhenSeen("the chairs")),
        ("When is the first time that the robot saw a chair", WhenSeen("a chair", first=True)),
    ],
)
def test_what_is_asked(text: str, asked: object) -> None:
    assert parse(text) == asked


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("What changed since the party?", "since the party"),
        ("What changed in the last few minutes?", "in the last few minutes"),
        ("What has moved in the last 0 seconds?", "in the last 0 seconds"),
        ("What changed in the last -5 minutes?", "in the last -5 minutes"),
        (f"What changed in the last {'9' * 150} months?", "in the last 999"),
        ("Which chairs have moved in the last minute?", "only 'when did you last see"),
        ("When did you eat?", "'When did you eat'"),
        ("At what time did you last see the chair?", "only 'when did you last see"),
        ("How long has it been since you saw the chair?", "only 'when did you last see"),
        ("Have you seen the chair in the last 5 minutes?", "only 'when did you last see"),
        ("What was on the table two hours ago?", "only 'when did you last see"),
        ("Wann hast du den Stuhl zuletzt gesehen?", "English alone"),
        ("¿Qué ha cambiado en el último minuto?", "English alone"),
        ("Quand as-tu vu la chaise ?", "English alone"),
        ("最后一次看到椅子是什么时候?", "English alone"),
        ("何か変わった?", "English alone"),
        ("When was this house built?", "only 'when did you last see"),
        ("How long ago was it?", "only 'when did you last see"),
        ("When did you see the chair in the last minute?", "one time or a span"),
    ],
)
def test_what_is_not_understood_is_said(text: str, named: str) -> None:
    found = parse(text)
    assert isinstance(found, NotUnderstood) and named in found.why


@pytest.mark.parametrize(
    "text",
    ["What is on the table?", "Is there a clock?", "What time does the clock show?", "When I stand here, what is left?",
     "What colour is the new chair?", "", "What is missing from the table?", "What is new about it?",
     "What is missing?" * 30, "Where is the chair?", "What is new in the day room?", "What is newest?",
     "What is different about the last room?", "Wo ist der Stuhl?", "椅子はどこ?", "What are the changes of colour?",
     "What time is it?", "When I look up, what is there?"],
)  # fmt: skip
def test_other_questions_are_the_model_s(text: str) -> None:
    assert parse(text) is None


@given(st.text(alphabet="when didyoulastseechangedinthe 0123456789?.", max_size=300))
def test_no_text_is_too_much(text: str) -> None:
    parse(text)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.0, "0 seconds"), (1.0, "1 second"), (12.34, "12 seconds"), (2.5, "2.5 seconds"), (80, "80 seconds"),
     (90, "1.5 minutes"), (60, "1 minute"), (3600, "1 hour"), (7200, "2 hours"), (200000, "2.3 days"),
     (1e6, "1.7 weeks")],
)  # fmt: skip
def test_spans_in_words(seconds: float, words: str) -> None:
    assert span(seconds) == words
