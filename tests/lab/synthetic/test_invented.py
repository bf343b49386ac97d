# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import numpy as np

from adatoken3d_ros.lab.synthetic.furniture import KINDS
from adatoken3d_ros.lab.synthetic.invented import invented
from adatoken3d_ros.lab.synthetic.wordings import STANDPOINTS, WORDINGS, article, plural
from adatoken3d_ros.lmm.text_places import parse_clicks

POINTS = np.array([[1.0, 2.0, 0.5], [-0.004, 0.0, 1.25]])
THING = "|".join(f"the {kind}" for kind in KINDS)
ONE, SOME = ("|".join(map(form, KINDS)) for form in (article, plural))
STANDS = "|".join(re.escape(words) for group in STANDPOINTS.values() for words in group)


def shaped(wording: str, template: str) -> re.Pattern[str]:
    """What a template can become: whether there is one, how many there are, and all else about a known thing."""
    about = SOME if wording == "count" else ONE
    text = re.escape(template)
    for gap, words in (("s", STANDS), ("x", THING), ("a", THING), ("b", THING), ("k", about)):
        text = text.replace(re.escape(f"{{{gap}}}"), f"(?:{words})")
    return re.compile(text.replace(re.escape("{p}"), r"\[[-\d., ]+\]"), re.IGNORECASE)


def test_one_question_of_each_wording_as_they_were_trained() -> None:
    asked: set[str] = set()
    for seed in range(20):
        found = invented(np.random.default_rng(seed), POINTS)
        assert found == invented(np.random.default_rng(seed), POINTS)
        for question, (wording, templates) in zip(found, WORDINGS.items(), strict=True):
            plain = re.sub(r"\[[-\d., ]+\]", "{p}", question)
            shapes = [shaped(wording, template) for template in templates]
            assert any(shape.fullmatch(question) or shape.fullmatch(plain) for shape in shapes), question
            assert all(point in ((1.0, 2.0, 0.5), (0.0, 0.0, 1.25)) for point in parse_clicks(question)[1])
        asked.update(found)
    assert len(asked) > 200  # they differ


def test_without_points() -> None:
    for seed in range(20):
        found = invented(np.random.default_rng(seed), POINTS, clicks=False)
        assert len(found) == len(WORDINGS) - 2 and not any("[" in question for question in found)
