# SPDX-License-Identifier: Apache-2.0
"""Free, occupied and unseen voxels: a wall by hand, then a room whose depth is exact."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.occupancy import CELLS, SIDE, VOXEL, Occupancy, State
from tests.scene.room import CUPBOARD, ROOM, TABLE, view, walk

K = np.array([[50.0, 0, 31.5], [0, 50.0, 23.5], [0, 0, 1]])
# At the origin, it looks along x.
AHEAD = np.array([[0.0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
ON_THE_AXIS = np.array([[0.6, 0, 0], [2.0, 0, 0], [3.0, 0, 0], [-1.0, 0, 0]])


def wall(metres: float, stamp: int) -> PosedFrame:
    depth = np.full((48, 64), metres, np.float32)
    return PosedFrame(np.zeros((48, 64, 3), np.uint8), depth, K, AHEAD, stamp)


def test_a_wall_is_occupied_what_is_before_it_free_and_what_is_behind_it_unseen() -> None:
    occupancy = Occupancy()
    assert occupancy.states(ON_THE_AXIS).tolist() == [State.UNSEEN] * 4 and occupancy.extent() is None
    occupancy.look(wall(2.0, 7))
    assert occupancy.states(ON_THE_AXIS).tolist() == [State.FREE, State.OCCUPIED, State.UNSEEN, State.UNSEEN]
    hit = occupancy.look_numbers(ON_THE_AXIS, "hit")
    assert hit.tolist() == [0, 1, 0, 0] and occupancy.stamp_of(1) == 7 and occupancy.stamp_of(0) == 0
    low, high = occupancy.extent() or (np.zeros(3), np.zeros(3))
    assert (low[0], high[0]) == pytest.approx((1.9, 2.1))


def test_the_newest_look_counts() -> None:
    occupancy = Occupancy()
    for stamp, metres in enumerate((2.0, 4.0, 2.0), start=1):
        occupancy.look(wall(metres, stamp))
        assert occupancy.states(ON_THE_AXIS[1:2])[0] == (State.FREE if stamp == 2 else State.OCCUPIED)
    # It was free in between: what is there now came with the third look.
    assert occupancy.look_numbers(ON_THE_AXIS[1:2], "first").tolist() == [3]


def test_nothing_measured_is_nothing_seen() -> None:
    occupancy = Occupancy()
    occupancy.look(wall(np.nan, 1))
    assert occupancy.looks == 1 and not occupancy.blocks
    occupancy.look(wall(2.0, 2), max_depth=1.0)
    assert occupancy.states(ON_THE_AXIS).tolist() == [State.FREE] + [State.UNSEEN] * 3


def test_a_box_is_what_its_voxels_are() -> None:
    occupancy = Occupancy((0.05, 0.0, 0.1))
    for stamp, pose in enumerate(walk(6), start=1):
        occupancy.look(view(stamp, pose))
    state, corner = occupancy.box((-1.3, -0.7, 0.2), (1.5, 1.1, 1.9))
    grid = np.stack(np.meshgrid(*map(np.arange, state.shape), indexing="ij"), axis=-1) * VOXEL + corner
    np.testing.assert_array_equal(occupancy.states(grid.reshape(-1, 3)), state.reshape(-1))
    assert set(np.unique(state)) >= {State.UNSEEN, State.FREE, State.OCCUPIED}


def test_a_room() -> None:
    """What is free lies in the room and not in its furniture; what is occupied lies on a surface."""
    occupancy = Occupancy()
    for stamp, pose in enumerate(walk(12), start=1):
        occupancy.look(view(stamp, pose))
    free, occupied = occupancy.where(State.FREE), occupancy.where(State.OCCUPIED)
    assert len(free) > 500 and len(occupied) > 100
    np.testing.assert_allclose(
        occupancy.extent() or (), (occupied.min(axis=0) - VOXEL / 2, occupied.max(axis=0) + VOXEL / 2)
    )
    assert ((free > ROOM[0] - VOXEL / 2) & (free < ROOM[1] + VOXEL / 2)).all()
    for box in (CUPBOARD, TABLE):
        assert not ((free > box[0]) & (free < box[1])).all(axis=1).any()
    near = VOXEL * 0.5001
    on = (np.abs(occupied - ROOM[0]) <= near).any(axis=1) | (np.abs(occupied - ROOM[1]) <= near).any(axis=1)
    for low, high in (CUPBOARD, TABLE):
        inside = ((occupied >= low - near) & (occupied <= high + near)).all(axis=1)
        on |= inside & ((np.abs(occupied - low) <= near) | (np.abs(occupied - high) <= near)).any(axis=1)
    assert on.all()


def test_blocks_are_bounded_and_the_far_ones_go() -> None:
    occupancy = Occupancy(most_blocks=8)
    for step in range(10):
        frame = wall(2.0, step + 1)
        pose = AHEAD.copy()
        pose[1, 3] = 3.0 * step
        occupancy.look(PosedFrame(frame.rgb, frame.depth, K, pose, frame.stamp_ns))
        assert len(occupancy.blocks) <= 8 + 12  # what one look may add
    edge = SIDE * VOXEL
    assert all(abs((j + 0.5) * edge - 27.0) < 8.0 for _, j, _ in occupancy.blocks)
    assert occupancy.nbytes <= 30 * CELLS * 16 + 80
    assert occupancy.states(np.array([[2.0, 0.0, 0.0]]))[0] == State.UNSEEN
