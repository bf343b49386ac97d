# SPDX-License-Identifier: Apache-2.0
"""What was looked at and when, kept and joined: as if both scenes' frames had been looked at in turn."""

from __future__ import annotations

import numpy as np
import pytest

from adatoken3d_ros.scene import occupancy as module
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.looked import LOOKS
from adatoken3d_ros.scene.looks import confirmed, in_one_grid, joined
from adatoken3d_ros.scene.occupancy import VOXEL, Occupancy, State
from tests.scene.room import CUPBOARD, TABLE, view, walk

FRAMES = [view(stamp, pose) for stamp, pose in enumerate(walk(6), start=1)]
EMPTY = [view(stamp, pose, CUPBOARD) for stamp, pose in enumerate(walk(6), start=11)]  # the table has gone
GRID = np.stack(np.meshgrid(*[np.arange(-2.0, 2.01, 0.1)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
AWAY, FAR = (np.array([[1, 0, 0, x], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) for x in (3.0, 50.0))


def looked_at(frames: list[PosedFrame], origin: tuple[float, float, float] = (0, 0, 0), most: int = 4096) -> Occupancy:
    occupancy = Occupancy(origin, most)
    for frame in frames:
        occupancy.look(frame)
    return occupancy


def said(occupancy: Occupancy) -> list[list[int]]:
    """When each point of the grid was last seen, free and hit, and first hit."""
    return [[occupancy.stamp_of(int(n)) for n in occupancy.look_numbers(GRID, name)] for name in LOOKS]


def test_it_is_known_again_and_lives_on() -> None:
    before, after = looked_at(FRAMES), Occupancy((1.0, 0.0, 0.05))
    after.restore(before.looked(), np.zeros(3))
    assert said(after) == said(before) and after.looks == 6 and before.nbytes >= after.nbytes
    for occupancy in (before, after):
        occupancy.look(EMPTY[0])
    assert said(after) == said(before)


@pytest.mark.parametrize("origin", [(0.0, 0.0, 0.0), (1.6, -3.2, 0.0)])
def test_what_is_joined_is_as_if_all_had_been_looked_at_in_turn(origin: tuple[float, float, float]) -> None:
    older, newer = looked_at(FRAMES, origin), looked_at(EMPTY[:4])
    assert in_one_grid(older.looked(), newer.looked())
    newer.restore(joined(older.looked(), newer.looked()), np.zeros(3))
    expected = looked_at([*FRAMES, *EMPTY[:4]])
    assert said(newer)[:3] == said(expected)[:3] and said(newer) != said(older)
    np.testing.assert_array_equal(newer.states(GRID), expected.states(GRID))
    still = newer.states(GRID) == State.OCCUPIED
    first, wanted = (np.array(said(one)[3]) for one in (newer, expected))
    assert (first[still] == wanted[still]).mean() > 0.99  # but where an edge was hit, and looked past, in one scene


@pytest.mark.parametrize(("x", "same"), [(3.2, True), (3.3, False), (80_000.0, True), (80_000.1, False)])
def test_voxels_are_the_same_however_far_apart_their_origins_are(x: float, same: bool) -> None:
    here, there = (Occupancy((metres, 0, 0)).looked() for metres in (0.0, x))
    assert in_one_grid(here, there) is same


def test_only_times_are_confirmed_where_voxels_lie_otherwise() -> None:
    before, known = looked_at([*FRAMES, *EMPTY]), looked_at(FRAMES, (0.05, 0.1, 0.0))
    assert not in_one_grid(before.looked(), known.looked())
    after = Occupancy()
    after.restore(confirmed(known.looked(), before.looked()), np.zeros(3))
    np.testing.assert_array_equal(after.states(GRID), known.states(GRID))
    times, earlier = (np.array(said(one)) for one in (after, known))
    assert (times >= earlier).all() and (times[1] == earlier[1]).all() and (times[3] == earlier[3]).all()
    wall = known.states(GRID) == State.OCCUPIED
    table = wall & ((TABLE[0] < GRID) & (TABLE[1] > GRID)).all(axis=1)
    assert (times[2][wall & ~table] > 10).mean() > 0.5
    assert (times[2][table] <= 10).mean() > 0.8  # it was not there any more


def test_what_lay_elsewhere_is_confirmed_where_it_is_now() -> None:
    before = looked_at([*FRAMES, *[view(20 + n, pose) for n, pose in enumerate(walk(6))]])
    moved = [PosedFrame(f.rgb, f.depth, f.K, AWAY @ f.T_world_camera, f.stamp_ns) for f in FRAMES]
    known = looked_at(moved)
    ways = {frame.stamp_ns: AWAY for frame in FRAMES}
    here, there = (confirmed(known.looked(), before.looked(), way) for way in (None, ways))
    assert there.stamps.max() == 25 and len(there.stamps) > len(here.stamps)
    after = Occupancy()
    after.restore(there, np.zeros(3))
    points = GRID[before.states(GRID) == State.OCCUPIED] + (3.0, 0.0, 0.0)
    hit = [after.stamp_of(int(n)) for n in after.look_numbers(points, "hit")]
    assert np.mean([stamp >= 20 for stamp in hit]) > 0.9


def test_bounds_hold_for_what_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = looked_at(FRAMES)
    camera = FRAMES[-1].T_world_camera[:3, 3]
    few = Occupancy(most_blocks=5)
    few.restore(whole.looked(), camera)
    assert len(few.blocks) == 5 and few.states(camera[None])[0] == whole.states(camera[None])[0] != State.UNSEEN
    monkeypatch.setattr(module, "REMEMBERED", 3)
    short = Occupancy()
    short.restore(whole.looked(), camera)
    assert short.looks == 3 and short.looked().stamps.tolist() == [4, 5, 6]
    assert short.stamp_of(1) == 4 and set(np.unique(said(short))) == {0, 4, 5, 6}
    nothing = Occupancy()
    nothing.restore(Occupancy((VOXEL, 0, 0)).looked(), camera)
    assert not nothing.blocks and nothing.looks == 0


def test_what_is_free_stays_free_when_its_looks_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was hit, looked through, and not looked at since, in what is kept and in what is restored."""
    far = [PosedFrame(f.rgb, f.depth, f.K, FAR @ f.T_world_camera, f.stamp_ns) for f in FRAMES]
    whole = looked_at([*FRAMES, *EMPTY, *far])
    monkeypatch.setattr(module, "REMEMBERED", 3)
    forgetful = looked_at([*FRAMES, *EMPTY, *far])
    assert forgetful.looked().stamps.tolist() == [4, 5, 6]
    for known in (whole, forgetful):
        again = Occupancy()
        again.restore(known.looked(), np.zeros(3))
        np.testing.assert_array_equal(again.states(GRID), whole.states(GRID))
    hit, free = again.look_numbers(GRID, "hit", "free")
    assert ((hit > 0) & (free > hit)).any()
