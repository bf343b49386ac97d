# SPDX-License-Identifier: Apache-2.0
"""The questions about the photographs can be asked of the model, and their answers follow from the photographs."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from adatoken3d_ros.lab.synthetic.facts import DIRECTIONS
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.synthetic.wordings import STANDPOINTS, WORDINGS
from adatoken3d_ros.lab.training.language import words
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.scene.folder import read_folder
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import backproject
from benchmarks import photographs
from benchmarks.photographs import (
    Checked,
    constant_answers,
    offered,
    read_questions,
    summary,
    wilson,
)

DESK = Path(__file__).resolve().parents[3] / "shared" / "data" / "tum_fr1_desk"
FLOOR = 0.05  # metres, in the frame of the poses
QUESTIONS, THINGS = read_questions()
IDS = [asked.question[:60] for asked in QUESTIONS]


def checked(family: str, answer: str, question: str = "?", also: tuple[str, ...] = (), about: tuple[str, ...] = ()):
    return Checked(family, question, answer, also, (), (), about, "000")


def wordings(family: str) -> list[str]:
    """Patterns of everything that the family asks."""
    found = []
    for name in (name for name in WORDINGS if name.split()[0] == family):
        for template in WORDINGS[name]:
            stands = [s for group in STANDPOINTS.values() for s in group] if "{s}" in template else [""]
            for stand in stands:
                pattern = re.escape(template).replace(r"\{s\}", re.escape(stand))
                found.append(re.sub(r"\\\{\w\\\}", r"[\\w .,\\[\\]-]+", pattern))
    return found


@pytest.mark.parametrize("asked", QUESTIONS, ids=IDS)
def test_question_is_one_of_its_family(asked: Checked) -> None:
    assert any(re.fullmatch(pattern, asked.question) for pattern in wordings(asked.family))
    _, written = parse_clicks(asked.question)
    assert [tuple(point) for point in written] == list(asked.clicks)
    known = {word.strip() for word in words()}
    spoken = re.sub(r"\[.*?\]|[?,.:;]", " ", asked.question).split()
    assert set(spoken) <= known
    for name in asked.about:
        assert f"the {name}" in asked.question and name in THINGS


@pytest.mark.parametrize("asked", QUESTIONS, ids=IDS)
def test_answer_is_one_that_the_family_has(asked: Checked) -> None:
    for answer in (asked.answer, *asked.also):
        if asked.family == "existence":
            assert answer in ("yes", "no")
        elif asked.family == "count":
            assert answer in "123456"
        elif asked.family == "colour":
            assert answer in COLOURS
        elif asked.family == "direction":
            assert answer in DIRECTIONS
        elif asked.family == "distance":
            assert re.fullmatch(r"\d\.[05]", answer)
        elif asked.family in ("closer", "taller", "larger"):
            assert answer == asked.about[-2] and answer in THINGS
        else:
            assert answer in KINDS


def test_guessing_does_not_pay() -> None:
    assert len(QUESTIONS) >= 48 and len({asked.question for asked in QUESTIONS}) == len(QUESTIONS)
    assert summary(QUESTIONS, constant_answers(QUESTIONS))["accuracy"] < 0.4
    families = Counter(asked.family for asked in QUESTIONS)
    for family, count in families.items():
        answers = Counter(asked.answer for asked in QUESTIONS if asked.family == family)
        assert max(answers.values()) <= max(1, count / 2)
    first = [offered(asked)[0] == asked.answer for asked in QUESTIONS if offered(asked)]
    assert 0.35 < sum(first) / len(first) < 0.65


@pytest.mark.parametrize("asked", [a for a in QUESTIONS if a.family in ("closer", "distance", "direction")])
def test_relations_follow_from_where_things_are(asked: Checked) -> None:
    """With the generator's own margins."""
    where = [np.array(THINGS[name].centre) for name in asked.about]
    if asked.family == "closer":
        goal, near, far = where
        assert np.linalg.norm(far - goal) > 1.25 * np.linalg.norm(near - goal) + 0.2
    elif asked.family == "distance":
        assert abs(np.linalg.norm(where[0] - where[1]) - float(asked.answer)) < 0.19
    else:
        stand = np.array(asked.clicks[0])[:2]
        faced, target = (np.arctan2(*(point[:2] - stand)[::-1]) for point in where)
        degrees = math.degrees(target - faced)
        reach = math.degrees(math.asin(THINGS[asked.about[1]].radius / float(np.linalg.norm(where[1][:2] - stand))))
        assert DIRECTIONS[round(degrees / 90) % 4] == asked.answer
        assert abs((degrees + 45) % 90 - 45) + reach < 40


@pytest.fixture(scope="module")
def desk() -> dict[str, PosedFrame]:
    if not DESK.is_dir():
        pytest.skip(f"the photographs are not at {DESK}")
    return {f"{number:03d}": frame for number, frame in enumerate(read_folder(DESK))}


def seen_at(frame: PosedFrame, u: int, v: int) -> np.ndarray:
    depth = np.nanmedian(frame.depth[v - 3 : v + 4, u - 3 : u + 4])
    return backproject(depth, np.array(u), np.array(v), frame.K, frame.T_world_camera)


def test_points_are_those_of_their_pixels(desk: dict[str, PosedFrame]) -> None:
    for asked in QUESTIONS:
        assert asked.photograph in desk
        for click, pixel in zip(asked.clicks, asked.pixels, strict=bool(asked.pixels)):
            assert pixel is not None
            np.testing.assert_allclose(seen_at(desk[asked.photograph], *pixel), click, atol=0.006)
        if asked.family == "direction":
            assert asked.clicks[0][2] == FLOOR  # somebody stands on it
    for thing in THINGS.values():
        found = seen_at(desk[thing.photograph], *thing.pixel)
        assert np.linalg.norm(found - thing.centre) < thing.radius + 0.02


def test_the_floor_of_the_photographs_is_level_and_found(desk: dict[str, PosedFrame], tiny_directory: Path) -> None:
    """The bare boards below the desk in photograph 011: upright within 3 degrees, and the model's z = 0."""
    frame = desk["011"]
    rows, columns = (a.ravel() for a in np.mgrid[240:330:3, 280:560:3])
    points = backproject(frame.depth[rows, columns], columns, rows, frame.K, frame.T_world_camera)
    points = points[np.isfinite(points[:, 2])].astype(np.float64)
    normal = np.linalg.svd(points - points.mean(axis=0), full_matrices=False)[2][2]
    assert abs(normal[2]) > math.cos(math.radians(3))
    assert points[:, 2].mean() == pytest.approx(FLOOR, abs=0.02)
    origin = photographs.watch(tiny_directory, DESK, "none")[1].memory.origin
    assert origin[2] == pytest.approx(FLOOR, abs=0.15)
    assert np.abs(origin[:2]).max() < 2.0


def test_interval_by_hand() -> None:
    """Brown, Cai and DasGupta 2001 give the formula; none of ten is z^2 / (n + z^2) at most."""
    assert wilson(0, 10) == (0.0, pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4))
    assert wilson(5, 10) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
    assert wilson(10, 10) == (pytest.approx(1 - wilson(0, 10)[1]), pytest.approx(1.0))


def test_summary_and_the_best_guess_by_hand() -> None:
    asked = [
        checked("on", "desk", also=("table",)),
        checked("on", "table"),
        checked("on", "box"),
        checked("taller", "plant", "Is the person or the plant taller?", about=("plant", "person")),
        checked("taller", "mug", "Is the phone or the mug taller?", about=("mug", "phone")),
    ]
    assert constant_answers(asked) == ["table", "table", "table", "plant", "mug"]
    found = summary(asked, ["table", "table", "chair", "plant", "phone"])
    assert found["families"] == {"on": pytest.approx(2 / 3), "taller": 0.5}
    assert found["accuracy"] == 0.6 and found["counts"] == {"on": 3, "taller": 2}


def test_a_file_that_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps({"objects": {}, "questions": [{"family": "on", "question": "?"}]}))
    with pytest.raises(ValueError, match="questions.json: an entry lacks 'answer'"):
        read_questions(path)
    path.write_text(
        json.dumps({"objects": {}, "questions": [{"family": "smell", "question": "?", "answer": "", "photograph": ""}]})
    )
    with pytest.raises(ValueError, match="unknown family 'smell'"):
        read_questions(path)


def test_a_folder_is_asked_about(tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to figures, with a random model: every question is answered, and by each way."""
    for name in ("color", "depth", "pose"):
        (tmp_path / name).mkdir()
    views = render_views(make_room(0, "test"), count=2, width=96, height=72)
    K = views[0].frame.K
    sizes = {"width": 96, "height": 72, "fx": K[0, 0], "fy": K[1, 1], "cx": K[0, 2], "cy": K[1, 2]}
    (tmp_path / "intrinsics.json").write_text(json.dumps(sizes))
    for number, view in enumerate(views):
        Image.fromarray(view.frame.rgb).save(tmp_path / "color" / f"{number}.png")
        depth = np.rint(1000 * view.frame.depth).astype(np.uint16)
        Image.fromarray(depth).save(tmp_path / "depth" / f"{number}.png")
        np.savetxt(tmp_path / "pose" / f"{number}.txt", view.frame.T_world_camera)
    some = [next(asked for asked in QUESTIONS if asked.family == family) for family in ("count", "nearest")]
    monkeypatch.setattr(photographs, "read_questions", lambda: (some, {}))
    monkeypatch.setattr(photographs, "STRATEGIES", ("ours",))
    monkeypatch.setattr(photographs, "majority_answers", lambda: {"count": "1"})
    result = photographs.run(tiny_directory, tmp_path, None, Console(quiet=True))
    assert result["views"] == 2 and result["spatial_tokens"] > 0
    assert result["majority"]["families"] == {"count": 1.0, "nearest": 0.0}
    assert all(entry["ours"] for entry in result["answers"])
    assert photographs.report(result).row_count == 4
    with pytest.raises(ValueError, match="was trained with spatial tokens"):
        photographs.run(tiny_directory, tmp_path, tiny_directory, Console(quiet=True))
