# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from adatoken3d_ros.scene.carving import CarvingConfig, emptied, looked_past, seen_through
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.token_map import TokenMap

K = np.array([[100.0, 0, 50], [0, 100.0, 40], [0, 0, 1]])


def looking(depth: np.ndarray | float, T: np.ndarray | None = None) -> PosedFrame:
    """A camera at the origin of a world whose axes are the camera's; a wall where depth is a number."""
    metres = np.full((81, 101), depth, np.float32) if np.isscalar(depth) else np.asarray(depth, np.float32)
    return PosedFrame(np.zeros((*metres.shape, 3), np.uint8), metres, K, np.eye(4) if T is None else T, 1)


@pytest.mark.parametrize(
    ("wall", "z", "gone"),
    [
        (3.0, 2.0, True),
        # Far side at 2.1, margin 0.1 + 0.02 * 2.
        (2.25, 2.0, True),
        (2.23, 2.0, False),
        (2.0, 2.0, False),
        (1.0, 2.0, False),
        (3.0, -2.0, False),
        (3.0, 0.1, False),
        (math.nan, 2.0, False),
        (math.inf, 2.0, True),
    ],
)
def test_a_voxel_on_the_axis_before_a_wall(wall: float, z: float, gone: bool) -> None:
    assert seen_through(looking(wall), np.array([[0, 0, z]]), 0.2).tolist() == [gone]


def test_a_voxel_that_is_partly_outside_of_the_picture_is_not_judged() -> None:
    # At 2 m, half a box is 0.1 * 100 / 1.9 = 5.3 pixels: columns 0 to 100 hold x up to 0.5 * 1.9 - 0.1 = 0.85.
    x = np.array([-0.86, -0.84, 0.0, 0.84, 0.86])
    centres = np.stack([x, 0 * x, 0 * x + 2.0], axis=1)
    assert seen_through(looking(5.0), centres, 0.2).tolist() == [False, True, True, True, False]


def test_something_thin_in_the_voxel_keeps_it() -> None:
    # The picture is 11 columns and rows around (50, 40); a pole of one pixel stands between two lookups.
    for column in range(45, 56):
        depth = np.full((81, 101), 5.0, np.float32)
        depth[:, column] = 2.0
        assert not seen_through(looking(depth), np.array([[0, 0, 2.0]]), 0.2)[0], column
    depth = np.full((81, 101), 5.0, np.float32)
    depth[:, 60] = 2.0
    assert seen_through(looking(depth), np.array([[0, 0, 2.0]]), 0.2)[0]


def test_too_few_measurements_prove_nothing() -> None:
    depth = np.full((81, 101), 5.0, np.float32)
    depth[40:48, 40:60] = np.nan
    depth[40, 50] = 5.0
    centre = np.array([[0, 0, 2.0]])
    assert not seen_through(looking(depth), centre, 0.2)[0]
    assert seen_through(looking(depth), centre, 0.2, CarvingConfig(measured=0.3))[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_nothing_that_the_frame_itself_measures_is_empty(seed: int) -> None:
    rng = np.random.default_rng(seed)
    T = np.eye(4)
    T[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    T[:3, 3] = rng.uniform(-5, 5, 3)
    depth = np.repeat(np.repeat(rng.uniform(0.5, 4, (9, 11)), 9, axis=0), 10, axis=1)[:81, :101].astype(np.float32)
    depth[rng.random(depth.shape) < 0.05] = np.nan
    frame = looking(depth, T)
    v, u = np.nonzero(depth > 0)
    rays = np.stack([(u - 50) / 100, (v - 40) / 100, np.ones_like(u)], axis=1) * depth[v, u, None]
    points = rays @ T[:3, :3].T + T[:3, 3]
    centres = np.unique(np.round(points / 0.2), axis=0) * 0.2
    assert not seen_through(frame, centres, 0.2).any()


def test_turned_cameras_and_boxes() -> None:
    """Turned by 45 degrees about the vertical a box reaches sqrt(2) times as far along the axis."""
    T = np.eye(4)
    T[:3, :3] = Rotation.from_euler("y", 45, degrees=True).as_matrix()
    centre = (T[:3, :3] @ np.array([0, 0, 2.0]))[None]
    far = 2.0 + 0.1 * math.sqrt(2) + 0.1 + 0.04
    assert seen_through(looking(far + 0.01, T), centre, 0.2)[0]
    assert not seen_through(looking(far - 0.01, T), centre, 0.2)[0]


@pytest.mark.parametrize(
    ("wall", "z", "past", "silent"),
    [
        (3.0, 2.0, True, False),
        (2.15, 2.0, True, False),  # margin 0.1 + 0.02 * 2
        (2.13, 2.0, False, False),
        (1.0, 2.0, False, False),
        (3.0, -2.0, False, False),
        (math.nan, 2.0, False, True),
    ],
)
def test_a_point_on_the_axis_before_a_wall(wall: float, z: float, past: bool, silent: bool) -> None:
    found = looked_past(looking(wall), np.array([[0, 0, z]]))
    assert [values.tolist() for values in found] == [[past], [silent]]


def measured_at_two_metres(times: int) -> TokenMap:
    token_map = TokenMap(0.2)
    points = np.tile([[0.0, 0.0, 2.0]], (times, 1))
    token_map.add_view(0, torch.ones(times, 3), points, np.zeros((times, 3), np.uint8))
    return token_map


@pytest.mark.parametrize(
    ("measured", "walls", "gone"),
    [  # a wall at 2.2 m is behind the points, but not clearly behind the whole voxel
        (2, [2.2], True),
        (1, [2.2], False),
        (1, [2.2, 2.2], True),
        (1, [2.2, 2.0, 2.2], False),
        (1, [2.2, math.nan, 2.2], True),
        (2, [2.0], False),
    ],
)
def test_what_was_measured_once_goes_when_two_frames_look_past_it(
    measured: int, walls: list[float], gone: bool
) -> None:
    token_map, doubted = measured_at_two_metres(measured), {}
    for stamp, wall in enumerate(walls, 1):
        frame = replace(looking(wall), stamp_ns=stamp)
        assert not seen_through(frame, token_map.centres(), 0.2).any()
        found = emptied(token_map, frame, None, stamp, doubted)
    assert found.tolist() == token_map.occupied_keys.tolist() * gone


def test_one_frame_looks_once() -> None:
    token_map, doubted = measured_at_two_metres(1), {}
    for _ in range(2):
        assert not len(emptied(token_map, looking(2.2), None, 2, doubted))
    assert list(doubted) == token_map.occupied_keys.tolist()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_what_is_emptied_is_what_each_point_of_a_voxel_says(seed: int) -> None:
    """The plain way: each voxel by itself, all points of all older views in it."""
    rng = np.random.default_rng(seed)
    token_map, doubted, expected = TokenMap(0.2), {}, {}
    for view in range(4):
        points = rng.uniform((-0.6, -0.5, 1.5), (0.6, 0.5, 2.5), (int(rng.integers(1, 80)), 3)).astype(np.float32)
        token_map.add_view(view, torch.ones(len(points), 2), points, np.zeros((len(points), 3), np.uint8))
    for stamp in (2, 3, 9):  # views of an order from the stamp on are not older
        depth = rng.choice([1.8, 2.2, 3.0, math.nan], (9, 11)).repeat(9, axis=0).repeat(10, axis=1)
        frame = replace(looking(depth[:81, :101]), stamp_ns=stamp)
        through = seen_through(frame, token_map.centres(), 0.2)
        still, gone = {}, []
        for key, whole in zip(token_map.occupied_keys.tolist(), through, strict=True):
            held = [v.rows(v.keys == key).points for v in token_map.contributions().values() if v.order < stamp]
            past, silent = looked_past(frame, torch.cat(held).numpy())
            past_all = past.any() and (past | silent).all() and past.sum() >= 0.8 * len(past)
            if len(past) and silent.all() and key in expected:
                still[key] = expected[key]
            if past_all and past.sum() == 1:
                still[key] = expected.get(key, stamp)
            if whole or (past_all and (past.sum() > 1 or still[key] != stamp)):
                gone.append(key)
        expected = still
        assert emptied(token_map, frame, None, stamp, doubted).tolist() == gone and doubted == expected


def test_something_thin_beside_a_point_keeps_it() -> None:
    for column, past in ((47, True), (48, False), (50, False), (52, False), (53, True)):
        depth = np.full((81, 101), 5.0, np.float32)
        depth[:, column] = 2.0
        assert looked_past(looking(depth), np.array([[0, 0, 2.0]]))[0].tolist() == [past], column
    assert not looked_past(looking(5.0), np.array([[0.99, 0, 2.0]]))[0].any()  # at the picture's edge


def test_empty_input_and_bad_options() -> None:
    assert seen_through(looking(1.0), np.zeros((0, 3)), 0.2).shape == (0,)
    for bad in ({"margin": -1.0}, {"relative_margin": math.nan}, {"measured": 0.0}):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            CarvingConfig(**bad)
