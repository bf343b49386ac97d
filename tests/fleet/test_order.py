# SPDX-License-Identifier: Apache-2.0
"""The order of robots' questions: the earliest deadline first, within a bound that is tested on random histories."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.fleet.order import Full, Line


def test_the_earliest_deadline_comes_first_and_no_budget_counts_as_patience() -> None:
    line: Line[str] = Line(patience=10.0)
    for name, now, deadline in (("none", 0.0, math.inf), ("late", 1.0, 9.0), ("soon", 2.0, 5.0), ("later", 3.0, 12.0)):
        line.join(name, name, now, deadline)
    order = []
    while (entry := line.next(4.0)) is not None:
        order.append(entry.what)
        line.ended(4.0)
    assert order == ["soon", "late", "none", "later"]


def test_what_cannot_be_kept_is_refused_with_the_time_that_it_would_take() -> None:
    line: Line[str] = Line()
    line.join("first", "a", 0.0)
    assert line.next(0.0) is not None
    line.ended(2.0)  # an answer takes 2 s
    line.join("running", "a", 2.0)
    assert line.next(2.0) is not None and line.next(2.0) is None
    line.join("fits", "b", 2.5, 2.5 + 1.6)  # 1.5 s are left of the one that runs
    with pytest.raises(Full, match=r"2 questions come before it: it would take 5500 ms from now on, 3000 ms are left"):
        line.join("does not", "c", 2.5, 5.5)
    assert [entry.what for entry in line.late(4.2)] == ["fits"] and not len(line)


def test_a_robot_has_only_so_many_questions_waiting() -> None:
    line: Line[int] = Line(limit=2)
    line.join(0, "greedy", 0.0), line.join(1, "greedy", 0.0)
    with pytest.raises(Full, match="2 questions of greedy are waiting already"):
        line.join(2, "greedy", 0.0)
    line.join(3, "modest", 0.0)


def test_between_two_answers_a_view_is_made_of_the_scenes_that_wait_for_it_in_turn() -> None:
    line: Line[str] = Line(limit=9)
    for name, deadline, views in (("a", 5.0, 2), ("b", 9.0, 3), ("1", 7.0, 0), ("2", 6.0, 0), ("3", 8.0, 0)):
        line.join(name, name, 0.0, deadline, views)
    order = []
    while (entry := line.next(1.0)) is not None:
        order.append(entry.what + "+" * line.viewing)
        line.ended(1.0, views=entry.views - 1)
    assert order == ["a+", "2", "b+", "1", "a+", "a", "b+", "3", "b+", "b"]


def test_views_of_its_scene_count_to_the_time_that_a_question_would_take() -> None:
    line: Line[str] = Line()
    line.join("first", "a", 0.0, views=3)
    for begins, ends in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5), (1.0, 3.0)):  # a view takes 0.5 s, an answer 2 s
        entry = line.next(begins)
        assert entry is not None
        line.ended(ends, views=max(0, entry.views - 1))
    line.join("whole", "b", 3.0, 6.0)
    with pytest.raises(Full, match=r"1 questions and 4 views of its scene come before it: it would take 6000 ms from"):
        line.join("late", "a", 3.0, 6.9, views=4)
    line.leave(line.late(math.inf))
    with pytest.raises(Full, match=r"0 questions and 4 views of its scene come before it: it would take 4000 ms from"):
        line.join("late", "a", 3.0, 4.9, views=4)
    line.join("early", "a", 3.0, 5.1, views=4)


def test_a_view_that_took_long_once_refuses_nobody_for_ever() -> None:
    """As the first one does: nothing is measured of what is refused. Nor do another robot's pictures."""
    line: Line[str] = Line()
    line.join("first", "a", 0.0, views=1)
    assert line.next(0.0) is not None
    line.ended(5.0)
    line.leave([line._waiting[0]])
    with pytest.raises(Full, match=r"0 questions and 1 views of its scene come before it: it would take 5000 ms from"):
        line.join("again", "a", 6.0, 8.0, views=1)
    line.join("again", "a", 6.0, 8.0, views=1)
    line.leave([line._waiting[0]])
    line.join("first", "a", 10.0, views=1)
    assert line.next(10.0) is not None
    line.ended(15.0)
    line.leave([line._waiting[0]])
    line.join("features", "b", 16.0, 18.0, views=9)


VIEWS = st.integers(0, 4)
ASKED = st.lists(
    st.tuples(st.integers(0, 4), st.floats(0.0, 2.0), st.one_of(st.none(), st.floats(0.01, 30.0)), VIEWS), max_size=60
)


@given(ASKED, st.floats(0.05, 3.0), st.floats(0.05, 3.0))
@settings(max_examples=100, deadline=None)
def test_nobody_is_overtaken_by_what_comes_later_than_patience(
    asked: list[tuple[int, float, float | None, int]], took: float, view: float
) -> None:
    """But by those whose scenes are made sooner; and nobody waits longer than patience and the answers to all that may
    be waiting then, with a view made before each, and for as much again for each view of the own scene."""
    patience, limit, robots = 2.0, 3, 5
    line: Line[int] = Line(patience, limit)
    now, free, served = 0.0, 0.0, []

    def serve(until: float) -> None:
        nonlocal free
        while len(line) and free <= until:
            begun = max(free, min(one.arrived for one in line._waiting))
            entry = line.next(begun)
            assert entry is not None
            if not line.viewing:
                served.append((entry, begun))
            free = begun + (view if line.viewing else took)
            line.ended(free, measured=False, views=entry.views - 1)

    for robot, gap, budget, views in asked:
        now += gap
        serve(now)
        try:
            line.join(views, str(robot), now, math.inf if budget is None else now + budget, views)
        except Full as error:
            assert "waiting already" in str(error)  # nothing was measured, so nothing else refuses
    serve(math.inf)
    for place, (entry, begun) in enumerate(served):
        assert begun - entry.arrived <= patience + (1 + entry.what) * (robots * limit + 1) * (took + view) + 1e-9
        for later, _ in served[place + 1 :]:
            assert entry.arrived <= later.arrived + patience or later.what
