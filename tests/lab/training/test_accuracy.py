# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.lab.metrics.answers import overlap
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.questions import generate as ask
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.synthetic.wordings import QA, UNKNOWN
from adatoken3d_ros.lab.training.data import DataError, room_digest
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lab.training.variants import looked_away
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.scene.keyframes import KeyFrameConfig
from benchmarks._paired import EXACT
from benchmarks._scenes import Reader, Workers, find_rooms
from benchmarks.accuracy import (
    Outcome,
    about_the_unseen,
    answers,
    guesses,
    majority_answers,
    outcomes,
    score,
    summary,
    unknown,
)
from tests.engine.scenes import new_scene

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
    # Of two rooms one is drawn twice in half of the cases.
    assert found["intervals"] == {"colour": [0, 1], "class": [1, 1], "acc25": [1, 1], "acc50": [0, 1]}


def test_the_interval_is_that_of_rooms() -> None:
    """All questions of a room share its fate: 25 rooms, half of them right, is as uncertain as 25 coins."""
    outcomes = [Outcome(room, family, "", float(room % 2)) for room in range(25) for family in EXACT for _ in range(4)]
    low, high = summary(outcomes)["interval"]
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 5, abs=0.06)


def test_without_looking_little_is_right() -> None:
    frequent = majority_answers(12)
    assert frequent["existence"] in ("yes", "no") and frequent["direction"] in ("front", "left", "behind", "right")
    asked = [qa for seed in range(60) for qa in ask(make_room(seed, "test"), np.random.default_rng(seed))]
    given = guesses(asked, frequent)
    right: dict[str, list[float]] = {family: [] for family in EXACT}
    for qa, guess in zip(asked, given, strict=True):
        if qa.family in right:
            right[qa.family].append(score(qa, guess))
    # Of two things, one is as good as the other; all else is known less often.
    for family, scores in right.items():
        limit = {"existence": 0.65, "closer": 0.65, "taller": 0.65, "larger": 0.65, "count": 0.5}.get(family, 0.4)
        assert np.mean(scores) < limit, family
    assert all(np.mean(right[family]) > 0.35 for family in ("closer", "taller", "larger"))


def test_answers_are_those_of_a_session_that_prunes_nothing(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    make_trainer().save(tmp_path / "model")  # random weights say a lot before they end
    reader = Reader(tmp_path / "model")
    rooms = find_rooms(reader, tmp_path / "scenes", "test", 20, seed=0)
    assert sum(len(room.questions) for room in rooms) >= 20 > len(rooms[0].questions)
    room = rooms[1]  # seen through a camera with noise

    # The prompts are a session's, but for features kept in half precision.
    session = new_scene(reader.model, reader.tokenizer, SessionConfig(key_frames=KeyFrameConfig(0.0, 0.0, 3)))
    for view in render_views(room.scene().room, seed=room.seed, count=3, noise=True):
        session.observe(view.frame)
    session.encode_pending()
    samples = reader.samples(room.scene(), room.questions)
    for qa, sample in zip(room.questions, samples, strict=True):
        spliced, block = session.spliced(Question(qa.question))
        assert (sample.spatial_start, sample.n_spatial) == (spliced.spatial_start, spliced.n_spatial)
        np.testing.assert_allclose(sample.embeds, spliced.embeds, atol=2e-3)
        assert sample.scene is not None
        np.testing.assert_allclose(sample.scene.xyz, block.scene.xyz, atol=1e-4)

    # The answers are those of each prompt read alone.
    (given,) = Workers(reader, 1, Console(quiet=True)).map("", answers, [room])
    assert any(given)
    for sample, text in list(zip(samples, given, strict=True))[:6]:
        filled = prefill(reader.decoder, sample.embeds, sample.layout, Schedule(), make_policy("none"))
        ids = list(generate(reader.decoder, filled, max_new_tokens=48, eos_ids={reader.eos}))
        assert reader.text(ids) == text
    assert [o.answer for o in outcomes([room], [given])] == given


def test_how_often_one_does_not_know_by_hand() -> None:
    """Room 0: one of two about what nobody saw; room 1: both. Rooms weigh alike."""
    hidden = [Outcome(0, "class", "I do not know", 1.0), Outcome(0, "class", "chair", 0.0)]
    hidden += [Outcome(1, "box", "I do not know", 0.0)] * 2
    found = unknown(hidden, [Outcome(0, "colour", "red", 1.0), Outcome(0, "colour", "blue", 0.0)])
    assert found["of_unseen"] == {"said": 0.75, "interval": [0.5, 1.0], "questions": 4}
    assert found["of_seen"] == {"said": 0.0, "interval": [0.0, 0.0], "questions": 2}
    assert unknown([], [])["of_unseen"] == {"said": None, "interval": [None, None], "questions": 0}


def test_the_unseen_is_asked_for_where_there_is_any(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    make_trainer(unseen=2).save(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "understanding.json").read_text())["unknown"] == UNKNOWN
    make_trainer().save(tmp_path / "seeing")
    assert "unknown" not in json.loads((tmp_path / "seeing" / "understanding.json").read_text())
    reader = Reader(tmp_path / "model")
    (room, *_) = find_rooms(reader, tmp_path / "scenes", "test", 1, seed=0)
    asked = about_the_unseen(reader, room)
    assert 1 <= len(asked) <= 3 and {family for family, _ in asked} <= {"class", "colour", "box"}
    scene = room.scene()
    item = next(i for i in scene.room.items if i.instance in scene.sights)
    away = looked_away(scene, item, 0.5)
    assert 0 < len(away.features) < len(scene.features) and len(away.xyz) < len(scene.xyz)
    low, high = np.array(item.low) - 0.5 / 3**0.5, np.array(item.high) + 0.5 / 3**0.5
    assert not ((away.xyz.numpy() > low) & (away.xyz.numpy() < high)).all(axis=1).any()
    assert item.instance in set(scene.sights) - set(away.sights)
    assert sorted(away.voxel.unique().tolist()) == list(range(len(away.features)))


def test_rooms_are_seen_through_the_camera_that_is_asked_for(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    make_trainer().save(tmp_path / "model")
    seen = {}
    for camera in ("ideal", "other"):
        reader = Reader(tmp_path / "model", camera=camera)
        (room, *_) = find_rooms(reader, tmp_path / camera, "test", 1)
        seen[camera] = room.scene()
    assert room_digest(seen["ideal"].room) == room_digest(seen["other"].room), "one room"
    assert not torch.equal(seen["ideal"].xyz, seen["other"].xyz)
    assert reader.again()().camera == "other", "in other processes, too"
    with pytest.raises(DataError, match="camera"):
        find_rooms(reader, tmp_path / "ideal", "test", 1)
