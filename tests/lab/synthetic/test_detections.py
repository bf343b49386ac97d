# SPDX-License-Identifier: Apache-2.0
"""What a detector might say: mostly what is there, sometimes not, sometimes something else; and what was never seen."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.detections import CALLED, simulated
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.furniture import KINDS
from adatoken3d_ros.lab.synthetic.items import Item
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.lab.synthetic.unseen import unseen
from adatoken3d_ros.lab.synthetic.views import render_views, sights
from adatoken3d_ros.lab.synthetic.wordings import UNKNOWN
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.lmm.vision.ssd import CLASSES

NAMES = list(CLASSES)


@pytest.fixture(scope="module")
def room() -> FurnishedRoom:
    return make_room(0)


def _first(room: FurnishedRoom, called: bool) -> Item:
    return next(i for i in room.items if (i.kind in CALLED) == called)


def test_every_name_is_one_of_furniture_and_of_the_detector() -> None:
    assert set(CALLED) <= set(KINDS)
    assert {name for names in CALLED.values() for name, _ in names} <= set(CLASSES)
    assert all(sum(share for _, share in names) <= 1 for names in CALLED.values())


def test_a_large_thing_is_mostly_found_where_it_is(room: FurnishedRoom) -> None:
    item = _first(room, called=True)
    ids = np.zeros((240, 240), np.int16)
    ids[60:180, 80:160] = item.instance
    name = NAMES.index(CALLED[item.kind][0][0])
    hits, boxes = 0, []
    for seed in range(200):
        found, scores = simulated(ids, [item], NAMES, np.random.default_rng(seed))
        assert found.shape == (len(scores), 4) and scores.shape[1] == len(NAMES)
        right = [k for k in range(len(found)) if scores[k].argmax() == name and abs(found[k, 0] - 1 / 3) < 0.1]
        hits += bool(right)
        boxes += [found[k] for k in right]
    expected = CALLED[item.kind][0][1]
    assert 0.6 * expected < hits / 200 < expected
    np.testing.assert_allclose(np.mean(boxes, axis=0), (80 / 240, 60 / 240, 160 / 240, 180 / 240), atol=0.02)


def test_what_the_detector_has_no_name_for_or_sees_too_small_is_missed(room: FurnishedRoom) -> None:
    ids = np.zeros((240, 240), np.int16)
    strange, known = next(i for r in (room, make_room(1)) for i in r.items if i.kind not in CALLED), _first(room, True)
    ids[100:140, 100:140] = strange.instance
    ids[5:8, 5:8] = known.instance + 100
    counts = [len(simulated(ids, [strange], NAMES, np.random.default_rng(s))[0]) for s in range(200)]
    assert 0.6 < np.mean(counts) < 1.0  # boxes around nothing alone


def test_what_no_view_shows_is_not_known() -> None:
    found = []
    for seed in range(6):
        room = make_room(seed)
        views = render_views(room, seed=seed, count=1, renderer=Renderer(room))
        visible = sights(views, np.random.default_rng(0))
        shown = np.concatenate([s.points for s in visible.values()])
        for qa in unseen(room, visible, shown, np.random.default_rng(seed), count=2):
            found.append(qa)
            point = np.array(parse_clicks(qa.question)[1][0])
            assert np.linalg.norm(shown - point, axis=1).min() >= 0.75
            hidden = [i for i in room.items if i.instance not in visible]
            assert any(
                (point >= np.array(i.low) - 0.01).all() and (point <= np.array(i.high) + 0.01).all() for i in hidden
            )
        everything = {i.instance: next(iter(visible.values())) for i in room.items}
        assert unseen(room, everything, shown, np.random.default_rng(0)) == []
    assert len(found) >= 3 and {qa.answer for qa in found} == {UNKNOWN} and all(qa.about == () for qa in found)
