# SPDX-License-Identifier: Apache-2.0
"""What has gone, by hand: one thing of neighbouring voxels, found again elsewhere, bounded in number and age."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from adatoken3d_ros.scene.contributions import Contribution
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.tombstones import ALIKE, MOST_VOXELS, Thing, Tombstones, likeness, things

S = 10**9
RED, BLUE = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)  # what things look like; their colours go with it
MEAN = torch.tensor([0.1, 0.1, 0.0])


def seen(stamp: int, points: Sequence[Sequence[float]], look: Sequence[float] = RED) -> dict[int, Contribution]:
    """A view's rows of points of one look."""
    token_map = TokenMap(0.2)
    xyz = np.array(points, np.float32)
    rgb = np.full((len(xyz), 3), np.array(look) * 100 + 50, np.uint8)
    token_map.add_view(stamp, torch.tensor([look] * len(xyz)), xyz, rgb)
    return token_map.contributions()


def box(x: float, y: float, n: int = 4) -> list[list[float]]:
    return [[x, y, 0.2 * k] for k in range(n)]


def never(points: np.ndarray) -> int:
    return 0


def test_what_hangs_together_is_one_thing() -> None:
    held = {**seen(3 * S, box(0.0, 0.0)), **seen(5 * S, box(0.0, 0.0)[:2])}
    (thing,) = things(held, gone_ns=9 * S)
    assert (thing.first_ns, thing.last_ns, thing.views, thing.gone_ns) == (3 * S, 5 * S, 2, 9 * S)
    assert thing.count.tolist() == [2, 2, 1, 1] and thing.rgb[0].tolist() == [150, 50, 50]
    np.testing.assert_allclose([*thing.low, *thing.high], [0, 0, 0, 0, 0, 0.6], atol=1e-6)
    assert thing.look().tolist() == list(RED)
    assert len(things(seen(S, box(0.0, 0.0) + box(3.0, 0.0)))) == 2
    assert things({}) == []


def test_a_long_thing_keeps_its_fullest_voxels() -> None:
    (thing,) = things(seen(S, [[0.2 * k, 0.0, 0.0] for k in range(50)] + [[9.0, 0.0, 0.0]] * 3))
    assert len(thing.keys) == MOST_VOXELS and int(thing.count.max()) == 4
    assert thing.high[0] == pytest.approx(9.8) and bool((thing.keys.diff() > 0).all())


def test_last_seen_is_when_it_was_last_measured() -> None:
    tombstones = Tombstones()
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 9 * S, lambda points: 7 * S)
    assert tombstones.gone[0].last_ns == 7 * S
    tombstones.bury(seen(3 * S, box(5.0, 0.0)), 9 * S, lambda points: 99 * S)  # not after it had gone
    assert tombstones.gone[1].last_ns == 9 * S


@pytest.mark.parametrize(
    ("patches", "measured", "kept"), [(2, 8.5, False), (2, 7.0, True), (3, 8.5, True), (1, 9.0, False)]
)
def test_an_edge_that_was_measured_a_moment_ago_is_no_thing(patches: int, measured: float, kept: bool) -> None:
    tombstones = Tombstones()
    tombstones.bury(seen(3 * S, [[0.0, 0.0, 0.0]] * patches), 9 * S, lambda points: round(measured * S))
    assert bool(tombstones.gone) is kept


def test_an_edge_of_what_is_known_does_not_appear_and_one_before_a_thing_does_not_make_it_older() -> None:
    tombstones, held = Tombstones(), seen(3 * S, box(0.0, 0.0))
    keys = next(iter(held.values())).keys
    tombstones.greet(held, 3 * S, keys)
    assert tombstones.appeared == []
    tombstones.greet(held, 3 * S, keys[:2])  # half of it is beside nothing
    assert len(tombstones.appeared) == 1
    whole = seen(25 * S, box(0.2, 0.0) * 20)
    tombstones.greet(whole, 25 * S, next(iter(whole.values())).keys)  # so much is no edge
    (thing,) = tombstones.appeared
    assert thing.first_ns == 25 * S and len(thing.keys) == 8


@pytest.mark.parametrize(("look", "within", "together"), [(BLUE, 300.0, 2), (RED, 300.0, 3), (RED, 30.0, 2)])
def test_parts_that_go_soon_after_each_other_are_one_thing(look: tuple, within: float, together: int) -> None:
    """Those of one colour also later: a thing is looked at from one side, then from the other."""
    tombstones = Tombstones(moved_within=within)
    for gone, x, colour in ((9, 0.0, RED), (12, 0.2, RED), (60, 0.4, look)):
        tombstones.bury(seen(3 * S, box(x, 0.0), colour), gone * S, never)
    assert [len(thing.keys) for thing in tombstones.gone] == ([12] if together == 3 else [8, 4])
    assert tombstones.gone[-1].gone_ns == 60 * S


def test_what_moved_is_linked_to_what_it_is_now() -> None:
    tombstones = Tombstones(moved_within=100.0)
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 20 * S, never)
    tombstones.greet(seen(25 * S, box(4.0, 0.0), BLUE), 25 * S)
    tombstones.link(MEAN)
    assert tombstones.gone[0].moved_to is None
    tombstones.greet(seen(26 * S, box(4.0, 2.0), RED), 26 * S)
    tombstones.link(MEAN)
    (thing,) = tombstones.gone
    assert thing.moved_to == pytest.approx((4.0, 2.0, 0.3), abs=1e-6)
    assert thing.confidence == pytest.approx(1 / (1 + np.exp(-(0.3 + 1.0 + 1.1 * np.log10(4)))))


@pytest.mark.parametrize(("appeared", "within"), [(2, 100.0), (200, 100.0), (25, 0.0)])
def test_what_appeared_before_it_went_or_much_later_is_another_thing(appeared: int, within: float) -> None:
    tombstones = Tombstones(moved_within=within)
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 20 * S, never)
    tombstones.greet(seen(appeared * S, box(4.0, 2.0)), appeared * S)
    tombstones.link(MEAN)
    assert tombstones.gone[0].moved_to is None


def test_what_has_gone_moves_with_the_views_of_its_time() -> None:
    """A quarter turn and 2 m along x for what was seen until 6 s; what came later stays where it was."""
    T = np.array([[0, -1, 0, 2.0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    tombstones, token_map = Tombstones(), TokenMap(0.2)
    tombstones.bury(seen(3 * S, box(1.0, 0.5)), 9 * S, never)
    tombstones.greet(seen(12 * S, box(0.0, 3.0)), 12 * S)
    tombstones.bury(seen(4 * S, box(5.0, 0.0), BLUE), 9 * S, never)
    tombstones.link(MEAN)
    before = tombstones.gone
    assert before[0].moved_to == pytest.approx((0.0, 3.0, 0.3)) and before[1].moved_to is None
    tombstones.move(lambda ns: T if ns <= 6 * S else np.eye(4), token_map.keys_at)
    one, other = tombstones.gone
    np.testing.assert_allclose([*one.low, *one.high], [1.5, 1.0, 0.0, 1.5, 1.0, 0.6], atol=1e-6)
    np.testing.assert_allclose(other.place, [2.0, 5.0, 0.3], atol=1e-6)
    assert one.moved_to == pytest.approx((0.0, 3.0, 0.3)), "that came later"
    assert one.keys.tolist() == token_map.keys_at(one.xyz).tolist() == sorted(one.keys.tolist())
    assert one.look().tolist() == list(RED) and (one.first_ns, one.gone_ns) == (3 * S, 9 * S)
    tombstones.move(lambda ns: T, token_map.keys_at)
    assert tombstones.gone[0].moved_to == pytest.approx((-1.0, 0.0, 0.3))
    np.testing.assert_allclose(tombstones.appeared[0].place, (-1.0, 0.0, 0.3), atol=1e-6)
    # Turned a little again and again, a box does not grow.
    thing = things(seen(3 * S, [[x, y, 0.0] for x in (0.0, 0.2, 0.4) for y in (0.0, 0.2)]), 9 * S)[0]
    c, s = np.cos(np.pi / 180), np.sin(np.pi / 180)
    turned = np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    for _ in range(360):
        thing = thing.moved(turned, token_map.keys_at)
    np.testing.assert_allclose(thing.high - thing.low, [0.4, 0.2, 0.0], atol=1e-3)


def test_what_stands_where_it_was_has_not_gone() -> None:
    tombstones = Tombstones()
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 20 * S, never)
    tombstones.greet(seen(25 * S, box(0.1, 0.0)), 25 * S)
    tombstones.link(MEAN)
    assert tombstones.gone == []


def test_likeness_goes_down_with_look_and_height() -> None:
    (a,), (b,), (high,) = things(seen(S, box(0, 0))), things(seen(S, box(1, 0), BLUE)), things(seen(S, box(2, 0, 12)))
    ((same, other, higher),) = likeness([a], [a, b, high], MEAN)
    assert same > ALIKE > other and higher < ALIKE
    logit = 0.3 + 1.0 + 1.1 * np.log10(12) - 8.0 * 1.6  # it reaches 1.6 m higher
    assert higher == pytest.approx(1 / (1 + np.exp(-logit)), abs=1e-6)
    np.testing.assert_allclose(likeness([b, a], [a], MEAN)[:, 0], [likeness([b], [a], MEAN)[0, 0], same])
    (wide,) = things(seen(S, [[0.2 * k, 0.0, 0.6] for k in range(4)]))  # as many measurements, 0.6 m wider
    odds = np.log([value / (1 - value) for value in (same, likeness([a], [wide], MEAN)[0, 0])])
    assert odds[0] - odds[1] == pytest.approx(0.6, abs=1e-5)


def test_what_comes_up_again_where_something_had_come_up_is_that_again() -> None:
    tombstones = Tombstones()
    tombstones.greet(seen(2 * S, box(4.0, 0.0)), 2 * S)
    tombstones.greet(seen(25 * S, box(4.0, 0.0), (0.9, 0.3, 0.0)), 25 * S)
    assert [thing.first_ns // S for thing in tombstones.appeared] == [2, 25]
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 20 * S, never)
    tombstones.link(MEAN)
    assert tombstones.gone[0].moved_to is None


def test_each_is_linked_to_one_the_surest_first() -> None:
    tombstones = Tombstones()
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 20 * S, never)
    tombstones.bury(seen(3 * S, box(9.0, 0.0, 5)), 20 * S, never)  # 0.2 m higher
    tombstones.greet(seen(25 * S, box(4.0, 0.0)), 25 * S)
    tombstones.link(MEAN)
    assert [thing.moved_to is not None for thing in tombstones.gone] == [True, False]
    tombstones.greet(seen(26 * S, box(4.0, 9.0, 5)), 26 * S)
    tombstones.link(MEAN)
    assert [thing.moved_to for thing in tombstones.gone] == [
        pytest.approx((4.0, 0.0, 0.3), abs=1e-6),
        pytest.approx((4.0, 9.0, 0.4), abs=1e-6),
    ]


def test_what_is_like_it_more_takes_over_what_a_thing_was_linked_to() -> None:
    """A thing that is found gone later may be the one that moved; the link of the other one was wrong."""
    tombstones = Tombstones()
    tombstones.bury(seen(3 * S, box(9.0, 0.0, 5)), 20 * S, never)  # 0.2 m higher
    tombstones.greet(seen(25 * S, box(4.0, 0.0)), 25 * S)
    tombstones.link(MEAN)
    assert tombstones.gone[0].moved_to is not None
    tombstones.bury(seen(3 * S, box(0.0, 0.0)), 30 * S, never)
    tombstones.link(MEAN)
    first, second = tombstones.gone
    assert (first.moved_to, first.confidence) == (None, 0.0) and second.moved_to == pytest.approx((4.0, 0.0, 0.3))
    tombstones.appeared.clear()  # what is not known any more says nothing against a link
    tombstones.link(MEAN)
    assert tombstones.gone[1].moved_to is not None


def test_a_flood_is_bounded_in_number_and_age() -> None:
    tombstones = Tombstones(most=5, max_age=100.0)
    for n in range(300):
        tombstones.bury(seen(n * S, box(float(n), 0.0)), (n + 20) * S, never)
        tombstones.greet(seen(n * S + 1, box(float(n), 9.0)), n * S + 1)
    assert [thing.gone_ns // S for thing in tombstones.gone] == [315, 316, 317, 318, 319]
    assert len(tombstones.appeared) == 64 and tombstones.nbytes < 69 * 4 * 100
    tombstones.forget(417 * S)
    assert len(tombstones.gone) == 3
    while tombstones.shrink():
        pass
    assert tombstones.nbytes == 0


def test_within_a_box_the_newest_is_first() -> None:
    tombstones = Tombstones(moved_within=30.0)
    for gone, x in ((9, 0.0), (60, 0.2), (61, 7.0)):
        tombstones.bury(seen(3 * S, box(x, 0.0)), gone * S, never)
    found: list[Thing] = list(tombstones.within(np.array([-0.5, -0.5, 0.0]), np.array([0.5, 0.5, 0.1])))
    assert [thing.gone_ns // S for thing in found] == [60, 9]
