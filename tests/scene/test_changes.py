# SPDX-License-Identifier: Apache-2.0
"""Changes that are smaller than a voxel of the token map, or than a few patches."""

from __future__ import annotations

import numpy as np
import torch

from adatoken3d_ros.scene.carving import carve_free_space, seen_through
from adatoken3d_ros.scene.keyframes import Verdict
from tests.scene.test_keyframes import SECOND, Memory, room


def test_a_thing_that_fills_no_voxel_goes_when_all_that_was_measured_of_it_has() -> None:
    """A board 0.25 m before the wall: a voxel's far side is too near to the wall to be seen through."""
    memory = Memory()
    board = room(1 * SECOND)
    board.depth[40:60, 40:60] = 2.75
    assert memory.see(board) == Verdict.KEY_FRAME

    def on_it() -> int:
        points = torch.cat([view.points for view in memory.map.contributions().values()])
        return int(((points[:, 0] > 2.7) & (points[:, 0] < 2.8)).sum())

    assert on_it() > 0
    empty = room(3 * SECOND)
    empty.T_world_camera[1, 3] = 0.2
    assert memory.see(empty) == Verdict.KEY_FRAME and on_it() <= 1
    again = room(5 * SECOND)  # of what was measured once
    again.T_world_camera[1, 3] = 0.2
    carve_free_space(memory.map, again, memory.selector.config.carving, doubted=memory.doubted)
    assert on_it() == 0
    assert not seen_through(empty, np.array([[2.75, 0.0, 1.0]]), 0.2).any()


def test_what_came_up_is_a_change_however_few_its_patches_are() -> None:
    memory = Memory(min_change=300)
    memory.selector._came_up = lambda frame: 100 * (frame.stamp_ns == 5 * SECOND)
    memory.see(room(1 * SECOND))
    assert memory.see(room(3 * SECOND, chair=0.0)) == Verdict.TOO_SIMILAR
    assert memory.see(room(5 * SECOND, chair=0.0)) == Verdict.KEY_FRAME
