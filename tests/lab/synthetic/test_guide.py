# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.facts import MIN_PIXELS
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom, make_room
from adatoken3d_ros.lab.synthetic.guide import Guide, merge
from adatoken3d_ros.lab.synthetic.views import View, render_views, sights


@pytest.fixture(scope="module")
def room() -> FurnishedRoom:
    return make_room(2, "test")


@pytest.fixture(scope="module")
def views(room: FurnishedRoom) -> list[View]:
    return render_views(room, count=3, width=160, height=120)


def test_together_views_show_what_they_show_at_once(views: list[View]) -> None:
    rng = np.random.default_rng(0)
    whole = sights(views, rng)
    parts = merge(dict(sights([view], rng)) for view in views)
    assert list(parts) == list(whole)
    for instance, sight in whole.items():
        assert parts[instance].pixels == sight.pixels
        np.testing.assert_array_equal(parts[instance].low, sight.low)
        np.testing.assert_array_equal(parts[instance].high, sight.high)


def test_asks_only_about_what_was_shown(room: FurnishedRoom, views: list[View]) -> None:
    guide = Guide(room, keep=2)
    assert guide.questions() == []
    for view in views:
        guide.show(view)
    assert len(guide) == 2
    seen = sights(views[1:], np.random.default_rng(0))
    asked = [qa for _ in range(10) for qa in guide.questions()]
    about = {instance for qa in asked for instance in qa.about}
    assert about and about <= {i for i, sight in seen.items() if sight.pixels >= MIN_PIXELS}
    assert len({qa.family for qa in asked}) > 6
    guide.forget()
    assert len(guide) == 0 and guide.questions() == []
