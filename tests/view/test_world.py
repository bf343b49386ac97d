# SPDX-License-Identifier: Apache-2.0
"""Key frames in the view: they stand where they are now, are dark where nothing was left, and stay hidden."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("viser", reason="viser is not installed")

from adatoken3d_ros.engine.pictures import Left, Picture, Voxels, encoded
from adatoken3d_ros.view.server import start, stop
from adatoken3d_ros.view.world import World

VOXELS = Voxels((0.0, 0.0, 0.0), 1.0)
JPEG, SIZE = encoded(np.full((60, 80, 3), 200, np.uint8))


@pytest.fixture
def server() -> Iterator[Any]:
    made = start("127.0.0.1", 0, "0123456789abcdef")
    yield made
    stop(made)


def picture(stamp_ns: int) -> Picture:
    """Of two patches: the left one at the origin, the right one 5 m along x."""
    places = np.array([[0, 0, 0], [5, 0, 0]], np.float32)
    return Picture(stamp_ns, JPEG, SIZE, np.eye(4), 1.0, (1, 2), places=places)


def answered(*points: tuple[float, float, float]) -> Any:
    return SimpleNamespace(answer=SimpleNamespace(left=Left.of(VOXELS, np.array(points, np.float32))))


def brightness(world: World, stamp_ns: int) -> list[int]:
    """Of the halves of the image that a frustum has."""
    image = np.asarray(world._cameras[stamp_ns][0]._image)
    return [int(half.mean()) for half in np.split(image, 2, axis=1)]


def test_a_picture_of_which_nothing_was_left_is_dark(server: Any) -> None:
    world, one = World(server), picture(1)
    world.cameras((one,), None)
    assert min(brightness(world, 1)) > 190
    world.cameras((one,), answered((9, 9, 9)))
    assert max(brightness(world, 1)) < 60
    world.cameras((one,), answered((5, 0, 0)))
    left, right = brightness(world, 1)
    assert left < 60 and right > 190
    world.cameras((one,), None)
    assert min(brightness(world, 1)) > 190


def test_a_key_frame_that_turns_out_to_be_elsewhere_goes_there(server: Any) -> None:
    world, one, pose = World(server), picture(1), np.eye(4)
    world.cameras((one,), None)
    frustum = world._cameras[1][0]
    world.cameras((one,), None)
    assert world._cameras[1][0] is frustum  # what has not changed is not sent again
    pose[:3, 3] = 1, 2, 3
    world.cameras((one.at(pose),), None)
    assert tuple(world._cameras[1][0].position) == (1, 2, 3)


def test_what_an_answer_lit_stays_lit_where_the_key_frame_turns_out_to_be_elsewhere(server: Any) -> None:
    world, one, pose, first = World(server), picture(1), np.eye(4), answered((5, 0, 0))
    world.cameras((one,), first)
    before = brightness(world, 1)
    pose[:3, 3] = 1, 2, 3
    world.cameras((one.at(pose),), first)
    assert brightness(world, 1) == before and before[0] < 60 < before[1]
    world.cameras((one.at(pose),), answered((6, 2, 3)))  # of the next question, who knows where they are now
    assert brightness(world, 1) == before


def test_key_frames_that_come_while_none_are_shown_are_hidden(server: Any) -> None:
    world, one = World(server), picture(1)
    world.cameras((one,), None)
    world.show_cameras(False)
    world.cameras((one, picture(2)), answered((0, 0, 0)))
    assert [frustum.visible for frustum, *_ in world._cameras.values()] == [False, False]
    world.show_cameras(True)
    assert [frustum.visible for frustum, *_ in world._cameras.values()] == [True, True]
