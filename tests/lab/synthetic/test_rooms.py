# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from itertools import combinations

import pytest

from adatoken3d_ros.lab.synthetic.rooms import MAX_OBJECT_HEIGHT, Room, Thing, make_room


def standing(room: Room) -> list[Thing]:
    """Everything but the tables' parts."""
    return [thing for thing in room.things if not thing.name.startswith("table")]


def test_same_seed_same_room() -> None:
    assert make_room(7) == make_room(7)
    assert make_room(7) != make_room(8)


@pytest.mark.parametrize("seed", range(60))
def test_rooms_are_well_formed(seed: int) -> None:
    room = make_room(seed)
    assert 6 <= len(standing(room)) <= 10
    assert len({thing.name for thing in room.things}) == len(room.things)
    for thing in room.things:
        for axis, half in enumerate((room.size[0] / 2, room.size[1] / 2)):
            assert abs(thing.centre[axis]) + thing.size[axis] / 2 < half, f"{thing.name} sticks out of the room"
        assert thing.centre[2] - thing.size[2] / 2 >= -1e-9, f"{thing.name} is under the floor"
        assert thing.centre[2] + thing.size[2] / 2 < MAX_OBJECT_HEIGHT


@pytest.mark.parametrize("seed", range(60))
def test_things_do_not_overlap(seed: int) -> None:
    for a, b in combinations(make_room(seed).things, 2):
        if a.name.split(" leg")[0] == b.name.split(" leg")[0]:
            continue  # a table's own parts touch
        gaps = [abs(a.centre[i] - b.centre[i]) - (a.size[i] + b.size[i]) / 2 for i in range(3)]
        assert max(gaps) > -1e-9, f"{a.name} overlaps {b.name}"


def test_things_on_tables_rest_on_the_top() -> None:
    room = make_room(0)
    tops = {round(t.centre[2] + t.size[2] / 2, 6) for t in room.things if t.name in ("table 1", "table 2")}
    bases = [round(t.centre[2] - t.size[2] / 2, 6) for t in standing(room)]
    assert sum(base in tops for base in bases) == 4
    assert all(base in tops or base == 0 for base in bases)
