# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.session import SceneSession
from adatoken3d_ros.pruning.strategy import default_strategy
from adatoken3d_ros.synthetic.questions import QA
from adatoken3d_ros.training.train import Trainer
from benchmarks.accuracy import EXACT, Answerer, Outcome, cases, majority_answers, overlap, score, summary

UNIT = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (UNIT, 1.0),
        ((0.5, 0.0, 0.0, 1.0, 1.0, 1.0), 0.5 / 1.5),
        ((0.0, 0.0, 0.0, 2.0, 2.0, 2.0), 1 / 8),
        ((1.0, 0.0, 0.0, 1.0, 1.0, 1.0), 0.0),
        ((5.0, 5.0, 5.0, 1.0, 1.0, 1.0), 0.0),
        ((0.0, 0.0, 0.0, 1.0, -1.0, 1.0), 0.0),
    ],
)
def test_overlap_by_hand(box: tuple[float, ...], expected: float) -> None:
    assert overlap(box, UNIT) == pytest.approx(expected) == overlap(UNIT, box)


def test_scores() -> None:
    word = QA("colour", "?", "red", np.zeros((0, 3)))
    assert (score(word, "red"), score(word, "red chair"), score(word, "")) == (1.0, 0.0, 0.0)
    box = QA("box", "?", "", np.zeros((1, 3)), UNIT)
    assert score(box, "[0.00, 0.00, 0.00, 1.00, 1.00, 1.00]") == 1.0
    assert score(box, "[0.50, 0.00, 0.00, 1.00, 1.00, 1.00]") == pytest.approx(1 / 3)
    assert score(box, "chair") == 0.0


def test_summary_by_hand() -> None:
    """Families weigh alike in the macro, boxes are apart."""
    outcomes = [Outcome(0, "colour", "", 1.0), Outcome(1, "colour", "", 0.0), Outcome(1, "class", "", 1.0)]
    outcomes += [Outcome(0, "box", "", 0.3), Outcome(1, "box", "", 0.6)]
    found = summary(outcomes)
    assert found["families"] == {"colour": 0.5, "class": 1.0} and found["macro"] == 0.75
    assert found["boxes"] == {"acc25": 1.0, "acc50": 0.5}
    assert found["counts"] == {"box": 2, "class": 1, "colour": 2} and found["rooms"] == 2
    low, high = found["interval"]
    assert low <= 0.75 <= high and low >= 0.5  # room 1 alone gives (0 + 1) / 2


def test_the_interval_is_that_of_rooms() -> None:
    """All questions of a room share its fate: 25 rooms, half of them right, is as uncertain as 25 coins."""
    outcomes = [Outcome(room, family, "", float(room % 2)) for room in range(25) for family in EXACT for _ in range(4)]
    low, high = summary(outcomes)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 5, abs=0.06)


def test_the_majority_answer_is_no_great_help() -> None:
    frequent = majority_answers(12)
    assert frequent["existence"] in ("yes", "no") and frequent["direction"] in ("front", "left", "behind", "right")


def test_answers_are_those_of_a_session_that_prunes_nothing(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    make_trainer().save(tmp_path)  # random weights say a lot before they end
    answerer = Answerer(tmp_path)
    (case,) = cases("test", 1, 3, seed=0)
    given = answerer.answers(case)
    assert len(given) == len(case.questions) > 10 and any(given)
    session = SceneSession(answerer.model, answerer.tokenizer, answerer.config, strategy=default_strategy("none", 4))
    for view in case.views:
        session.observe(view.frame)
    for qa, text in list(zip(case.questions, given, strict=True))[:8]:
        assert session.ask(Question(qa.question, max_new_tokens=48)).text == text
