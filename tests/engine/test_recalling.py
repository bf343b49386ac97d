# SPDX-License-Identifier: Apache-2.0
"""Questions about time, asked of a room that changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.recalling import told_when
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.engine.time_questions import WhenSeen
from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.scene.evidence import Evidence, Observed
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, Verdict
from adatoken3d_ros.scene.marks import Mark
from tests.engine.scenes import ask
from tests.scene.room import CUPBOARD, TABLE, view

SECOND = 10**9
NOON = 1_717_243_200 * SECOND
EYES = [(-1.5, -0.5, 1.4), (-1.3, 0.0, 1.6), (-1.0, 0.5, 1.5)]
AT_TABLE = [look_at(np.array(eye), TABLE.mean(axis=0)) for eye in EYES]
AWAY = look_at(np.array((1.0, 0.0, 1.4)), CUPBOARD.mean(axis=0))


@pytest.fixture
def scene(make_session: Callable[..., Scene]) -> Scene:
    """A table that was seen for two seconds at noon and was gone eight seconds later; then the camera looks away."""
    made = make_session(SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0)))
    shown = [(0, AT_TABLE[0], True), (1, AT_TABLE[1], True), (2, AT_TABLE[2], True)]
    shown += [(10, AT_TABLE[0], False), (11, AT_TABLE[1], False), (12, AT_TABLE[2], False), (20, AWAY, False)]
    for seconds, pose, table in shown:
        frame = view(NOON + seconds * SECOND, pose, *([CUPBOARD, TABLE] if table else [CUPBOARD]))
        assert made.observe(frame) is Verdict.KEY_FRAME
        made.encode_pending()
    return made


def test_what_changed(scene: Scene) -> None:
    found = ask(scene, Question("What has changed in the last minute?"))
    assert found.status is Status.OK and found.verdict is Observed.SEEN_THEN_GONE
    assert "changed in the last minute. What was at [" in found.text
    assert "last seen 18 seconds before the newest frame (2024-06-01 12:00:02 UTC)" in found.text
    assert 1 <= len(found.evidence) <= 3, "parts of the table"
    for gone in found.evidence:
        assert gone.last_ns == NOON + 2 * SECOND and NOON + 10 * SECOND <= gone.gone_ns <= NOON + 12 * SECOND
        assert (np.array(gone.place) > TABLE[0] - 0.2).all() and (np.array(gone.place) < TABLE[1] + 0.2).all()
    assert (found.as_of_ns, found.question.text) == (NOON + 20 * SECOND, "What has changed in the last minute?")
    for text in ("What changed in the last 5 seconds?", "Did anything move in the past 2 seconds?"):
        nothing = ask(scene, Question(text))
        assert nothing.text.startswith("Nothing that I have looked at has changed in the last")
        assert not nothing.evidence and nothing.verdict is Observed.SEEN
    assert ask(scene, Question("What has disappeared?")).evidence == found.evidence


def test_when_a_place_was_seen(scene: Scene) -> None:
    x, y, z = TABLE.mean(axis=0).tolist()
    scene.memory.marks.add(Mark("charging dock", (x, y, z)))
    scene.memory.marks.add(Mark("cellar", (0.0, 0.0, -40.0)))
    last = ask(scene, Question("When did you last see the charging dock?"))
    assert last.text.startswith(
        "I last saw the charging dock 8 seconds before the newest frame (2024-06-01 12:00:12 UTC)"
    )
    assert last.evidence[0].last_ns == NOON + 12 * SECOND and last.verdict is Observed.SEEN and last.coverage > 0.5
    first = ask(scene, Question(f"When did you first see [{x}, {y}, {z}]?"))
    assert "first saw" in first.text and first.evidence[0].first_ns < NOON + 12 * SECOND
    # That the dock was looked at does not say that there is a chair.
    chair = ask(scene, Question("When did you last see the chair at the charging dock?", max_new_tokens=4))
    assert not chair.text.startswith("I last saw the chair at the charging dock 8 seconds") and chair.spatial_tokens
    never = ask(scene, Question("When was the cellar last seen?"))
    assert never.verdict is Observed.NOT_OBSERVED and never.text.startswith(
        "I have never looked at the cellar, at [0.00"
    )


def test_when_a_thing_was_seen_is_told_of_what_the_answer_rests_on(scene: Scene) -> None:
    found = ask(scene, Question("When did you last see the chair?", max_new_tokens=4))
    assert found.question.text == "When did you last see the chair?" and found.evidence
    verdicts = {
        "I last saw the chair ": (Observed.SEEN, Observed.SEEN_THEN_GONE),
        "I have never seen the chair.": (Observed.NOT_OBSERVED,),
        "I do not know when I saw the chair.": (Observed.UNKNOWN,),
    }
    (expected,) = [verdict for text, verdict in verdicts.items() if found.text.startswith(text)]
    assert found.verdict in expected and (found.status is Status.UNSURE) == (Observed.UNKNOWN in expected)


PLACE = (1.0, -0.001, 0.5)
HERE = Evidence(PLACE, (1.0,) * 3, 2 * SECOND, 5 * SECOND, 3, 0.5)
GONE = replace(HERE, gone_ns=8 * SECOND)


@pytest.mark.parametrize(
    ("evidence", "verdict", "first", "told"),
    [
        (HERE, Observed.SEEN, False, "I last saw it 5 seconds before the newest frame, at [1.00, 0.00, 0.50]."),
        (HERE, Observed.SEEN, True, "I first saw it 8 seconds before"),
        (GONE, Observed.SEEN_THEN_GONE, False, "was gone 2 seconds before the newest frame."),
        (replace(GONE, moved_to=(3.0, 0.0, 0.0), moved_confidence=0.8), Observed.SEEN_THEN_GONE, False,
         "has moved to [3.00, 0.00, 0.00] (80% sure)."),
        (None, Observed.NOT_OBSERVED, False, "I have never seen it."),
        (HERE, Observed.UNKNOWN, False, "I do not know when I saw it."),
    ],
)  # fmt: skip
def test_what_is_told(evidence: Evidence | None, verdict: Observed, first: bool, told: str) -> None:
    given = Answer(Question(""), Status.OK, text="a model's", verdict=verdict, evidence=(evidence,) if evidence else ())
    found = told_when(given, WhenSeen("it", first), 10 * SECOND)
    assert told in found.text
    assert found.status is (Status.UNSURE if verdict is Observed.UNKNOWN else Status.OK)
    strange = told_when(replace(given, confidence=0.0, status_message="no such word"), WhenSeen("it"), 10 * SECOND)
    assert (strange.status, strange.status_message) == (
        Status.OK if verdict is Observed.NOT_OBSERVED else Status.UNSURE,
        "no such word",
    )
    assert "1970" not in found.text + strange.text, "no wall clock tells this"
    failed = replace(given, status=Status.ERROR)
    assert told_when(failed, WhenSeen("it"), 10 * SECOND) is failed


def test_what_is_not_understood_is_said_and_costs_nothing(scene: Scene) -> None:
    found = ask(scene, Question("What changed since the party?"))
    assert found.status is Status.UNSURE and found.confidence == 0.0 and not found.spatial_tokens
    assert "since the party" in found.status_message and found.text.startswith("I did not understand")
    both = ask(scene, Question("When did you last see the chair near [0, 0, 1]?"))
    assert both.status is Status.UNSURE and "one thing or one place" in both.status_message
    scene.clear()
    assert ask(scene, Question("What has changed?")).status is Status.NO_SCENE


@pytest.mark.parametrize(
    ("text", "clicks", "named"),
    [
        ("When did you last see [1e999, 0, 0]?", (), "is not finite"),
        ("When did you last see [1, 2, 3, 4]?", (), "has 4 numbers"),
        ("When did you last see [1e6, 0, 0]?", (), "[1000000.0, 0.0, 0.0]"),
        ("What has changed?", (math.nan, 0.0, 0.0), "clicks must be finite"),
        ("What changed since the party?", (math.nan, 0.0, 0.0), "clicks must be finite"),
    ],
)
def test_a_question_about_time_that_cannot_be_asked_is_refused(
    scene: Scene, text: str, clicks: tuple[float, ...], named: str
) -> None:
    found = ask(scene, Question(text, np.array(clicks).reshape(-1, 3)))
    assert found.status is Status.INVALID_REQUEST and named in found.status_message


def test_what_was_before_a_clock_was_set_back_is_told_as_later(scene: Scene) -> None:
    frame = view(NOON - 43_200 * SECOND, AT_TABLE[1], CUPBOARD)
    assert scene.observe(frame) is Verdict.KEY_FRAME
    scene.encode_pending()
    found = ask(scene, Question("What has changed?"))
    assert found.evidence and "12 hours after the newest frame, whose clock was set back (2024-06-01 12:" in found.text


@pytest.mark.parametrize(
    ("said", "verdict", "named"),
    [
        (
            "no",
            Observed.SEEN,
            "the model answers 'no' to 'Can you see the chair?', but what its answer rests on is there",
        ),
        ("I can’t see one.", Observed.SEEN, "but what its answer rests on is there"),
        ("There is no chair here", Observed.SEEN, "but what its answer rests on is there"),
        ("Yes.", Observed.NOT_OBSERVED, "the model answers 'Yes.' to 'Can you see the chair?', but nobody looked"),
        ("no", Observed.SEEN_THEN_GONE, ""),
        ("no", Observed.NOT_OBSERVED, ""),
        ("yes", Observed.SEEN, ""),
        ("a chair that is not red", Observed.SEEN, ""),
        ("Now I see it", Observed.SEEN, ""),
    ],
)
def test_where_the_model_and_what_was_seen_say_otherwise_nothing_is_told(
    said: str, verdict: Observed, named: str
) -> None:
    evidence = (GONE if verdict is Observed.SEEN_THEN_GONE else HERE,)
    given = Answer(Question(""), Status.OK, said, verdict=verdict, evidence=evidence, verdict_reason="nobody looked")
    found = told_when(given, WhenSeen("the chair"), 10 * SECOND)
    assert named in found.status_message
    assert (found.status is Status.UNSURE) == bool(named) == found.text.startswith("I do not know when I saw the chair")


def test_what_the_model_is_asked_within_is_not_told_as_the_answer(scene: Scene) -> None:
    told: list[str] = []
    found = ask(
        scene, Question("When did you last see the chair?", max_new_tokens=4), on_text=lambda text, n: told.append(text)
    )
    assert found.spatial_tokens and not told
    ask(scene, Question("Is there a chair?", max_new_tokens=4), on_text=lambda text, n: told.append(text))
    assert told
