# SPDX-License-Identifier: Apache-2.0
"""Which questions a model says that it understands, and how sure it is: by hand, then of the model in the package."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.understanding import (
    FILE,
    MAX_BYTES,
    Calibration,
    Understanding,
    UnderstandingError,
    read_understanding,
    write_understanding,
)
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate
from adatoken3d_ros.lab.training.language import understanding as lab_understanding
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.weights import embedded_path
from benchmarks.photographs import read_questions
from tests.engine.scenes import ask

CONTENT: dict[str, Any] = {
    "words": ["Is", "is", "a", "the", "chair", "chairs", "coffee", "table", "red", "here", "What", "what", "object",
              "at", "number", "of"],
    "things": ["chair", "chairs", "coffee table", "object at {p}"],
    "colours": ["red"],
    "wordings": {"existence": ["Is {a} here?"], "class": ["What is the object at {p}?"],
                  "count": ["What number of {k}?"]},
    "confidence": {"model_hash": "m", "slope": 2.0, "offset": -1.0, "offsets": {"count": 0.5}},
}  # fmt: skip
P = "\N{OBJECT REPLACEMENT CHARACTER}"


@pytest.fixture
def known(tmp_path: Path) -> Understanding:
    write_understanding(tmp_path, CONTENT)
    return read_understanding(tmp_path, "m")


@pytest.mark.parametrize(
    ("question", "family"),
    [
        ("Is a chair here?", "existence"),
        ("is the red chair here", "existence"),
        ("Is the coffee table\n here ?", "existence"),
        (f"What is the object at {P}?", "class"),
        (f"Is the object at {P} here?", "existence"),
        ("What number of red chairs?", "count"),
    ],
)
def test_a_wording_with_a_known_thing_is_understood(known: Understanding, question: str, family: str) -> None:
    assert known.judge(question, question.count(P)) == (family, "")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Is a dragon here?", "the model does not know the word dragon"),
        ("Wo ist der chair?", "the model does not know the words Wo, ist, der"),
        ("Is a Chair here?", "the model does not know the word Chair (it knows chair)"),
        ("CHAIR a is", "the model does not know the word CHAIR (it knows chair)"),
        ("b c d e f g b", "the model does not know the words b, c, d, e, f and 1 more"),
        ("Is a table here?", "the model knows no thing called 'a table'"),
        (f"What number of object at {P}?", "no question like this"),
        ("Is a red here?", "the model knows no thing called 'a red'"),
        ("Is 2 here?", "the model knows no thing called '2'"),
        (
            "Is a chair the chair?",
            "the model was trained on no question like this, only on its wordings of class, count, existence",
        ),
        (f"Is {P} here?", f"the model knows no thing called '{P}'"),
        ("What is the object at [1, 2]?", "no question like this"),
        ("?", "no question like this"),
        ("🤖", "no question like this"),
        ("Is \x07dragon here?", "the model does not know the word dragon"),
    ],
)
def test_what_is_not_understood_is_named(known: Understanding, question: str, said: str) -> None:
    family, strange = known.judge(question)
    assert not family and said in strange


@pytest.mark.parametrize(
    ("question", "read"),
    [
        ("Is a chair here?", "Is a chair here?"),
        ("is a  chair\u00a0here", "is a chair here?"),
        (" Is a chair\nhere ? !!!", "Is a chair here?"),
        (f"What is the object  at {P}...", f"What is the object at {P}?"),
        ("Is a  dragon here!", "Is a  dragon here!"),
        ("Is a  table here!", "Is a  table here!"),
        ("IS a  chair here!", "IS a  chair here!"),
    ],
)
def test_what_is_understood_is_read_as_it_was_trained(known: Understanding, question: str, read: str) -> None:
    assert known.as_trained(question) == read
    assert Understanding().as_trained(question) == question


def test_one_thing_named_twice_is_no_two(tmp_path: Path) -> None:
    wordings = {"taller": ["Is {a} or {b} here?"]}
    write_understanding(tmp_path, {**CONTENT, "words": [*CONTENT["words"], "or"], "wordings": wordings})
    known = read_understanding(tmp_path, "m")
    assert known.judge("Is the chair or the chair here?") == ("", "the question names 'the chair' twice, as two things")
    for both in ("the chair or the red chair", f"the object at {P} or the object at {P}"):
        assert known.judge(f"Is {both} here?", both.count(P)) == ("taller", "")


def test_points_beside_the_text_are_no_wording(known: Understanding) -> None:
    family, strange = known.judge("Is a chair here?", n_clicks=1)
    assert not family and "points that stand in the question, as [x, y, z]" in strange


def test_words_of_any_length_are_told_in_a_line(known: Understanding) -> None:
    _, strange = known.judge("dr\u0061" * 2000)
    assert len(strange) < 200


def test_hostile_texts_take_no_time(known: Understanding) -> None:
    began = time.process_time()
    for text in ("is a chair " * 180, "the " * 500, "what number of " + "a " * 1000, "is " + "the red " * 250 + "here"):
        assert known.judge(text)[1]
    assert time.process_time() - began < 1.0


def test_confidence_by_hand(known: Understanding) -> None:
    """Log odds of 0.8 are log 4: twice that, less one."""
    assert known.confidence(0.8, "existence") == pytest.approx(1 / (1 + math.exp(1) / 16))
    assert known.confidence(0.8, "count") == pytest.approx(1 / (1 + math.exp(-0.5) / 16))
    assert 0 < known.confidence(0.0, "class") < 1e-9 and 1 - 1e-9 < known.confidence(1.0, "class") < 1


def test_without_a_file_all_is_understood_and_nothing_is_said_of_confidence(tmp_path: Path) -> None:
    nothing = read_understanding(tmp_path, "m")
    assert nothing.judge("Wo ist der Drache?", 3) == ("", "") and math.isnan(nothing.confidence(0.9, ""))


def test_the_confidence_of_other_weights_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_understanding(tmp_path, CONTENT)
    other = read_understanding(tmp_path, "other")
    assert math.isnan(other.confidence(0.9, "count")) and other.judge("Is a chair here?") == ("existence", "")
    assert "fitted to other weights" in caplog.text
    write_understanding(tmp_path, {key: value for key, value in CONTENT.items() if key != "confidence"})
    assert math.isnan(read_understanding(tmp_path, "m").confidence(0.9, "count"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"words": "all"}, "'all' is no list of texts"),
        ({"things": []}, "things or wordings are empty"),
        ({"things": [""]}, "no list of texts"),
        ({"wordings": {}}, "things or wordings are empty"),
        ({"wordings": ["x"]}, "AttributeError"),
        ({"colours": None}, "None is no list of texts"),
        ({"confidence": {"model_hash": "m", "slope": 1, "offset": "x", "offsets": {}}}, "'x'"),
        ({"confidence": {"model_hash": "m", "slope": 1, "offsets": {}}}, "KeyError: 'offset'"),
        ({"confidence": {"model_hash": "m", "slope": 1e999, "offset": 0, "offsets": {}}}, "not finite"),
        ({"confidence": 3}, "TypeError"),
        ({"unknown": ["no"]}, "is no text"),
        (None, FILE),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, change: dict[str, Any] | None, named: str) -> None:
    (tmp_path / FILE).write_text("{" if change is None else json.dumps({**CONTENT, **change}))
    with pytest.raises(UnderstandingError, match=re.escape(named)) as raised:
        read_understanding(tmp_path, "m")
    assert str(tmp_path / FILE) in str(raised.value)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(UnderstandingError, match="is no regular file"):
        read_understanding(tmp_path, "m")
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / FILE).write_bytes(b" " * (MAX_BYTES + 1))
    with pytest.raises(UnderstandingError, match="more than"):
        read_understanding(tmp_path / "big", "m")


# --- what comes of it in answers --------------------------------------------------------------------------------------

EVEN = Calibration(0.0, 0.0)  # one half, whatever the probability


@pytest.mark.parametrize(
    ("question", "calibration", "unsure_below", "status", "confidence", "said"),
    [
        ("Is a chair here?", EVEN, 0.0, Status.OK, 0.5, ""),
        ("Is a chair here?", EVEN, 0.5, Status.OK, 0.5, ""),
        ("Is a chair here?", EVEN, 0.51, Status.UNSURE, 0.5, "the confidence of 0.50 is below 0.51"),
        ("Is a chair here?", None, 1.0, Status.OK, math.nan, ""),
        ("Is a dragon here?", EVEN, 0.0, Status.UNSURE, 0.0, "the model does not know the word dragon"),
        ("Is a dragon here?", None, 0.0, Status.UNSURE, 0.0, "the model does not know the word dragon"),
        ("Is the object at [0, 2, 1] here?", EVEN, 0.0, Status.OK, 0.5, ""),
    ],
)
def test_status_and_confidence_of_an_answer(
    make_session: Callable[..., Any], frames: list[PosedFrame], known: Understanding, question: str,
    calibration: Calibration | None, unsure_below: float, status: Status, confidence: float, said: str,
) -> None:  # fmt: skip
    """A random model never ends by itself: every token ends its answers here."""
    understood = Understanding(known.words, known.things, known.colours, known.wordings, calibration)
    session = make_session(SessionConfig(unsure_below=unsure_below), understanding=understood)
    session.observe(frames[0])
    truncated = ask(session, Question(question, max_new_tokens=2))
    assert truncated.status is Status.TRUNCATED and truncated.text
    assert "max_new_tokens = 2" in truncated.status_message and said in truncated.status_message
    session.runtime.eos_ids = frozenset(range(1_000_000))
    answer = ask(session, Question(question))
    assert (answer.status, answer.status_message) == (status, said)
    for one in (answer, truncated):
        assert one.confidence == pytest.approx(confidence, nan_ok=True)


def test_spaces_and_stops_change_no_prompt_of_what_is_understood(
    make_session: Callable[..., Any], frames: list[PosedFrame], known: Understanding
) -> None:
    plain, understood = make_session(understanding=Understanding()), make_session(understanding=known)
    for session in (plain, understood):
        session.observe(frames[0])
        session.encode_pending()
    texts = ("Is the object at [0, 2, 1] here?", "Is  the object\nat [0, 2, 1] here !!!")
    written = [[session.prompt(Question(text))[0].pieces for text in texts] for session in (plain, understood)]
    assert written[0][0] != written[0][1] and written[1][0] == written[1][1] == written[0][0]


def test_an_answer_that_says_that_nobody_knows_is_unsure(
    make_session: Callable[..., Any], frames: list[PosedFrame], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are the checkpoint's own; of one without them the same answer is one like any other."""
    ids = [5, 6]
    monkeypatch.setattr("adatoken3d_ros.engine.answering.generate", lambda *args, **kwargs: iter(ids))
    plain = make_session(understanding=Understanding())
    plain.observe(frames[0])
    said = ask(plain, Question("Is a chair here?"))
    assert said.status is Status.OK and said.text
    write_understanding(tmp_path, {**CONTENT, "unknown": said.text.upper() + " ."})
    session = make_session(understanding=read_understanding(tmp_path, "m"))
    session.observe(frames[0])
    answer = ask(session, Question("Is a chair here?"))
    assert (answer.status, answer.text) == (Status.UNSURE, said.text) and answer.confidence > 0
    assert answer.status_message == "the model says that it does not know"
    strange = ask(session, Question("Is a dragon here?"))
    assert "dragon" in strange.status_message and "says that" not in strange.status_message


def test_without_an_answer_there_is_no_confidence(
    make_session: Callable[..., Any], frames: list[PosedFrame], known: Understanding
) -> None:
    session = make_session(understanding=known)
    empty = ask(session, Question("Is a chair here?"))
    session.observe(frames[0])
    cancelled = ask(session, Question("Is a dragon here?"), should_stop=lambda: True)
    assert (empty.status, cancelled.status) == (Status.NO_SCENE, Status.CANCELLED)
    assert math.isnan(empty.confidence) and math.isnan(cancelled.confidence)
    assert "dragon" not in cancelled.status_message


# --- the model in the package -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def embedded() -> Understanding:
    model = registry.load(embedded_path()).model
    return read_understanding(embedded_path(), model.identity)


def test_the_file_is_what_the_lab_writes_and_its_confidence_is_of_these_weights(embedded: Understanding) -> None:
    content = json.loads((embedded_path() / FILE).read_text(encoding="utf-8"))
    fitted = content.pop("confidence")
    assert content == json.loads(json.dumps(lab_understanding(unseen=True, told=True)))
    assert embedded.calibration is not None and set(fitted["offsets"]) == set(embedded.wordings)
    assert embedded.calibration.slope > 0


def test_every_question_of_the_lab_is_understood(embedded: Understanding) -> None:
    wrong, count = [], 0
    for seed in range(24):
        split = ("train", "test", "test_unseen")[seed % 3]
        for qa in generate(make_room(seed, split), np.random.default_rng(seed), per_family=8):
            text, points = parse_clicks(qa.question)
            count += 1
            assert embedded.as_trained(text) == text
            if embedded.judge(text, len(points)) != (qa.family, ""):
                wrong.append((qa.question, qa.family, embedded.judge(text, len(points))))
    assert not wrong and count > 1000


def test_every_question_about_the_photographs_is_understood(embedded: Understanding) -> None:
    for asked in read_questions()[0]:
        text, points = parse_clicks(asked.question)
        assert embedded.judge(text, len(points)) == (asked.family, ""), asked.question
        assert embedded.as_trained(text) == text


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("Describe the room.", "the model does not know the word Describe"),
        ("Is it safe to drive forward?", "the model does not know the words safe, drive, forward"),
        ("Is there a dragon in the room?", "the model does not know the word dragon"),
        ("Wo ist der Tisch?", "the model does not know the words Wo, ist, der, Tisch"),
        ("What is this?", "no question like this"),
        ("Where is the table?", "no question like this"),
        ("Is there a room in the room?", "the model knows no thing called 'a room'"),
        ("How many object at [1, 1, 0.5] are there?", "no question like this"),
        ("Is there the object at [1, 1, 0.5] in the room?", "no question like this"),
        ("How many chairs are there on the moon?", "the word moon"),
    ],
)
def test_what_the_model_in_the_package_does_not_understand(embedded: Understanding, question: str, said: str) -> None:
    text, points = parse_clicks(question)
    family, strange = embedded.judge(text, len(points))
    assert not family and said in strange
