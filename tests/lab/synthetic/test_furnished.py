# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.lab.synthetic.furnished import SEEDS_PER_SPLIT, SPLITS, FurnishedRoom, Split, assemble, make_room
from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS, load_pack
from adatoken3d_ros.lab.synthetic.items import CEILING, FIRST_ITEM, FLOOR, WALL, Footprint
from adatoken3d_ros.lab.synthetic.layout import MAX_ITEMS

rooms = st.builds(make_room, st.integers(0, SEEDS_PER_SPLIT - 1), st.sampled_from(SPLITS))


def contents(room: FurnishedRoom) -> tuple[object, ...]:
    """Everything of a room, to the bit."""
    items = tuple(
        (i.model.id, i.colour, i.palette.tobytes(), i.vertices.tobytes(), i.supported_by, i.low, i.high)
        for i in room.items
    )
    return room.size, room.floor, room.wall_colour, room.ceiling_colour, room.light, items


def test_same_seed_same_bytes() -> None:
    assert contents(make_room(4)) == contents(make_room(4))
    assert contents(make_room(4)) != contents(make_room(5))
    assert contents(make_room(4)) != contents(make_room(4, "test"))


@settings(max_examples=40, deadline=None)
@given(rooms)
def test_rooms_are_well_formed(room: FurnishedRoom) -> None:
    assert 6 <= len(room.items) <= (2 * MAX_ITEMS - 1 if room.split == "crowded" else MAX_ITEMS)
    half = np.array([room.size[0] / 2, room.size[1] / 2])
    for k, item in enumerate(room.items):
        assert item.instance == FIRST_ITEM + k and room.item(item.instance) is item
        np.testing.assert_allclose(item.vertices.min(axis=0), item.low, atol=1e-6)
        np.testing.assert_allclose(item.vertices.max(axis=0), item.high, atol=1e-6)
        assert (np.abs(np.array([item.low[:2], item.high[:2]])) < half + 1e-6).all(), f"{item.kind} is in the wall"
        assert item.low[2] >= -0.001 and item.high[2] < room.size[2]
        assert item.colour is None or (item.colour in COLOURS and KINDS[item.kind].tint)
        assert item.colour is None or item.looks == {item.colour}


@settings(max_examples=40, deadline=None)
@given(rooms)
def test_nothing_overlaps(room: FurnishedRoom) -> None:
    for a, b in combinations(room.items, 2):
        if b.supported_by == a.instance:
            continue  # a desk's shelves may be higher than the top that carries the thing
        assert not a.footprint.overlaps(b.footprint), f"{a.kind} and {b.kind}"


@settings(max_examples=40, deadline=None)
@given(rooms)
def test_everything_stands_on_something(room: FurnishedRoom) -> None:
    for item in room.items:
        if item.supported_by == FLOOR:
            assert item.low[2] == pytest.approx(0, abs=1e-3)
        elif item.supported_by == WALL:
            edge = min(room.size[0] / 2 - abs(item.position[0]), room.size[1] / 2 - abs(item.position[1]))
            assert edge < 0.3, f"{item.kind} hangs in the air"
        else:
            carrier = room.item(item.supported_by)
            surface = carrier.model.surface
            assert surface is not None
            assert item.low[2] == pytest.approx(carrier.position[2] + surface.height * carrier.scale[2], abs=2e-3)
            # All of its footprint is over the carrier's.
            c, s = math.cos(carrier.yaw), math.sin(carrier.yaw)
            local = (item.footprint.corners() - carrier.position[:2]) @ np.array([[c, -s], [s, c]])
            assert (np.abs(local) <= (carrier.footprint.hx + 0.01, carrier.footprint.hy + 0.01)).all()


@pytest.mark.parametrize("split", SPLITS)
def test_splits_share_no_room_and_unseen_rooms_no_model(split: Split) -> None:
    for seed in range(30):
        room = make_room(seed, split)
        assert all(i.model.held_out == (split == "test_unseen") for i in room.items)
    sizes = {s: {make_room(seed, s).size for seed in range(30)} for s in SPLITS}
    for a, b in combinations(SPLITS, 2):
        assert not sizes[a] & sizes[b]


def test_rooms_vary() -> None:
    many = [make_room(seed) for seed in range(200)]
    assert len({len(r.items) for r in many}) >= 8
    assert {i.kind for r in many for i in r.items} == set(KINDS)
    assert {i.colour for r in many for i in r.items} == {None, *COLOURS}
    assert len({r.floor.pattern for r in many}) == 4
    on_top = [i for r in many for i in r.items if i.supported_by >= FIRST_ITEM]
    assert len(on_top) > 200


def test_crowded_rooms_hold_more_and_more_of_it_on_others() -> None:
    many = [make_room(seed, "crowded") for seed in range(20)]
    assert max(len(r.items) for r in many) > 24 and all(len(r.items) >= 12 for r in many)
    on_others = [
        np.mean([i.supported_by >= FIRST_ITEM for r in group for i in r.items])
        for group in ([make_room(seed) for seed in range(20)], many)
    ]
    assert on_others[1] > on_others[0] + 0.05


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'valid'"):
        make_room(0, "valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="-1"):
        make_room(-1)
    with pytest.raises(ValueError, match=str(CEILING)):
        make_room(0).item(CEILING)


def test_overlap_by_hand() -> None:
    a = Footprint(0, 0, 1, 0.5, 0.0, 0, 1)
    assert a.overlaps(Footprint(1.9, 0, 1, 0.5, 0.0, 0, 1))
    assert not a.overlaps(Footprint(2.1, 0, 1, 0.5, 0.0, 0, 1))
    assert a.overlaps(Footprint(2.1, 0, 1, 0.5, 0.0, 0, 1), gap=0.2)
    assert not a.overlaps(Footprint(0, 0, 1, 0.5, 0.0, 1, 2))  # one on the other
    # Turned by 90 degrees it reaches only 0.5 along x; by 45 degrees its corner reaches (1 + 0.5) / sqrt(2) = 1.06.
    assert not a.overlaps(Footprint(1.6, 0, 1, 0.5, math.pi / 2, 0, 1))
    assert a.overlaps(Footprint(1.6, 0, 1, 0.5, math.pi / 4, 0, 1))
    # The boxes around them overlap, they do not.
    assert not Footprint(0, 0, 1, 0.1, math.pi / 4, 0, 1).overlaps(Footprint(0.5, -0.5, 1, 0.1, math.pi / 4, 0, 1))
    assert a.distance(3, 0) == 2 and a.distance(0, 1) == 0.5 and a.distance(0.5, 0.2) == 0
    assert a.distance(4, 4.5) == 5


@given(
    *(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.05, 1), st.floats(0.05, 1), st.floats(-4, 4)),
    *(st.floats(0.05, 1), st.floats(0.05, 1), st.floats(-4, 4)),
)
def test_overlap_against_points(  # the slow obvious way: a grid of points of one box in the other
    x: float, y: float, hx: float, hy: float, yaw: float, gx: float, gy: float, turn: float
) -> None:
    a, b = Footprint(0, 0, gx, gy, turn, 0, 1), Footprint(x, y, hx, hy, yaw, 0, 1)
    u, v = np.meshgrid(np.linspace(-hx, hx, 15), np.linspace(-hy, hy, 15))
    c, s = math.cos(yaw), math.sin(yaw)
    inside = any(
        a.distance(x + c * p - s * q, y + s * p + c * q) == 0 for p, q in zip(u.ravel(), v.ravel(), strict=True)
    )
    if inside:
        assert a.overlaps(b) and b.overlaps(a)
    assert a.overlaps(b) == b.overlaps(a)


def test_a_room_made_by_hand_has_the_boxes_of_its_models() -> None:
    table = load_pack()["Scopia/table4"]  # 0.9 deep, 1.4 wide, 0.75 high
    room = assemble((4, 4, 2.5), [(table, "red", (1.0, 0.0, 0.0), math.pi / 2, FLOOR)])
    np.testing.assert_allclose(room.items[0].centre, [1, 0, 0.375], atol=1e-3)
    np.testing.assert_allclose(room.items[0].size, [1.4, 0.9, 0.75], atol=1e-3)
