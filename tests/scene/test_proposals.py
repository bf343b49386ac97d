# SPDX-License-Identifier: Apache-2.0
"""Boxes around clusters above the floor: by hand, whatever the order of the points, and slowly beside."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
from numpy.typing import NDArray

from adatoken3d_ros.scene import proposals
from adatoken3d_ros.scene.proposals import clusters, on_largest_plane, propose

Points = NDArray[np.float64]


def surface(low: tuple[float, float, float], high: tuple[float, float, float], step: float = 0.08) -> Points:
    """Points on the six sides of a box; of a flat one, on it."""
    axes = [np.linspace(a, b, max(1, round((b - a) / step)) + (b > a)) for a, b in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    return grid[((grid == low) | (grid == high)).any(axis=1)]


FLOOR = surface((-2.5, -2.5, 0), (2.5, 2.5, 0))
STOOL = surface((-1.0, -1.0, 0), (-0.6, -0.6, 0.5))
SHELF = surface((0.5, -0.2, 0), (1.1, 0.2, 1.8))


def assert_first(found: Points, *expected: tuple[tuple[float, ...], tuple[float, ...]]) -> None:
    """These boxes are there, from corner to corner, that of most points first; others are parts of them."""
    assert len(found) and len(np.unique(found, axis=0)) == len(found)
    for k, (low, high) in enumerate(expected):
        # The lowest layer goes with the floor.
        near = (np.abs(found[:, :3] - found[:, 3:] / 2 - low) < 0.11).all(axis=1)
        fits = near & (np.abs(found[:, :3] + found[:, 3:] / 2 - high) < 1e-9).all(axis=1)
        assert fits.any() and (k > 0 or fits[0])
    lows, highs = np.array(expected)[:, 0], np.array(expected)[:, 1]
    for box in found:
        inside = (box[:3] - box[3:] / 2 > lows - 1e-9) & (box[:3] + box[3:] / 2 < highs + 1e-9)
        assert inside.all(axis=1).any()


def test_things_on_a_floor_are_boxes_and_the_fullest_is_first() -> None:
    found = propose(np.concatenate([FLOOR, STOOL, SHELF]), 0.0)
    assert_first(found, ((0.5, -0.2, 0.1), (1.1, 0.2, 1.8)), ((-1.0, -1.0, 0.1), (-0.6, -0.6, 0.5)))
    # Points from 0.1 m above the floor on: those of the shelf are 0.08 m apart.
    assert 0.1 < found[0, 2] - found[0, 5] / 2 <= 0.19


def test_without_a_floor_the_largest_plane_is_it() -> None:
    found = propose(np.concatenate([FLOOR, STOOL, SHELF]), None)
    assert_first(found, ((0.5, -0.2, 0.08), (1.1, 0.2, 1.8)), ((-1.0, -1.0, 0.08), (-0.6, -0.6, 0.5)))


@pytest.mark.parametrize("degrees", [0, 30, 100])
def test_a_thing_at_a_wall_is_not_the_wall(degrees: float) -> None:
    wall, cupboard = surface((-2, 1, 0.1), (2, 1, 2.4)), surface((-0.4, 0.5, 0.2), (0.4, 1.0, 1.2))
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    points = np.concatenate([wall, cupboard]) @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
    found = propose(points, 0.0)
    back = found[0, :3] @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    # All of the cupboard but what is within 0.08 m of the wall, and nothing of the wall.
    np.testing.assert_allclose(back, [0, (0.5 + 0.92) / 2, 0.7], atol=0.06)
    assert found[0, 5] == pytest.approx(1.0) and len(found) < 8
    low, high = found[:, 2] - found[:, 5] / 2, found[:, 2] + found[:, 5] / 2
    assert low.min() > 0.19 and high.max() < 1.21


def test_what_is_too_small_or_too_large_is_no_thing() -> None:
    line = np.array([[0.05 * k, 0, 1.0] for k in range(61)])
    assert len(propose(line[:3], 0.0)) == 0 and len(propose(line[:4], 0.0)) == 1
    assert_first(propose(line, 0.0), ((0, 0, 1), (3.0, 0, 1)))
    assert len(propose(np.concatenate([line, [[3.05, 0, 1.0]]]), 0.0)) == 0  # a plane takes all of it
    for nothing in (np.zeros((0, 3)), FLOOR):
        assert propose(nothing, 0.0).shape == (0, 6)


def test_what_stands_on_a_table_is_a_thing_too() -> None:
    table, vase = surface((-0.6, -0.4, 0.7), (0.6, 0.4, 0.74), 0.06), surface((0.1, 0.1, 0.76), (0.2, 0.2, 1.1), 0.05)
    found = propose(np.concatenate([table, vase]), 0.0)
    assert_first(found, ((-0.6, -0.4, 0.7), (0.6, 0.4, 1.1)))
    # What of the vase is more than 0.08 m above the middle of the table's points.
    alone = found[np.abs(found[:, :2] - 0.15).max(axis=1) < 1e-6]
    assert (
        len(alone) and alone[:, 3:5].max() == pytest.approx(0.1) and alone[0, 2] + alone[0, 5] / 2 == pytest.approx(1.1)
    )


def test_from_afar_a_thing_still_hangs_together() -> None:
    sparse = surface((0, 0, 0.5), (0.9, 0, 1.4), 0.18)
    assert_first(propose(sparse, 0.0), ((0, 0, 0.5), (0.9, 0, 1.4)))


def test_there_are_no_more_than_so_many() -> None:
    four = np.array([[0.0, 0, 1], [0.01, 0, 1], [0, 0.01, 1], [0.01, 0.01, 1]])
    many = np.concatenate([four + (k % 10, k // 10, 0) for k in range(80)] + [[[7.02, 7, 1]]])
    found = propose(many, 0.0)
    assert len(found) == proposals.MOST
    assert found[0, 0] == pytest.approx(7.01) and found[0, 1] == pytest.approx(7.005)
    # Then by x, y and z.
    expected = [(k // 8, k % 8) for k in range(proposals.MOST) if k != 63][: proposals.MOST - 1]
    np.testing.assert_allclose(found[1:, :2] - 0.005, expected, atol=1e-9)


def test_far_apart_is_no_harm() -> None:
    far = propose(np.concatenate([STOOL + 1e6, STOOL, STOOL - 1e6]), None)
    assert np.ptp(far[:, 0]) == pytest.approx(2e6) and np.abs(far[:, 3:] - far[0, 3:]).max() < 0.3
    assert {round(x / 1e6) for x in far[:, 0]} == {-1, 0, 1}


def test_bad_points_are_named() -> None:
    with pytest.raises(ValueError, match="point 1 is not finite"):
        propose(np.array([[0, 0, 0], [0, np.nan, 0]]), 0.0)
    with pytest.raises(ValueError, match=r"points must be \(P, 3\), got \(4, 2\)"):
        propose(np.zeros((4, 2)), 0.0)


# --- slowly and obviously ---------------------------------------------------------------------------------------------


def slow_clusters(voxels: NDArray[np.int64]) -> set[frozenset[int]]:
    rows = defaultdict(list)
    for row, voxel in enumerate(voxels.tolist()):
        rows[tuple(voxel)].append(row)
    found = set()
    while rows:
        waiting, members = [next(iter(rows))], []
        while waiting:
            cell = waiting.pop()
            if cell in rows:
                members += rows.pop(cell)
                waiting += [tuple(np.add(cell, step) - 1) for step in np.ndindex(3, 3, 3)]
        found.add(frozenset(members))
    return found


def slow_plane(points: Points, voxels: NDArray[np.int64]) -> set[int]:
    best: tuple[int, Points, list[int]] = (0, np.zeros(3), [])
    for k in range(-1, proposals.ANGLES):
        angle = math.pi * k / proposals.ANGLES
        normal = np.array([0, 0, 1.0]) if k < 0 else np.array([math.cos(angle), math.sin(angle), 0])
        held = defaultdict(list)
        for row, voxel in enumerate(voxels):
            held[round(round(float((normal * voxel).sum()), 6))].append(row)
        for offset in sorted(held):
            size = len({tuple(voxels[row]) for row in held[offset]})
            if size > best[0]:
                best = (size, normal, held[offset])
    _, normal, rows = best
    if not normal[2]:  # turned as its points lie: the direction in which they are least apart
        x, y = (points[rows] - points[rows].mean(axis=0))[:, :2].T
        along = math.atan2(2 * float((x * y).sum()), float((x * x - y * y).sum())) / 2
        turned = np.array([-math.sin(along), math.cos(along), 0])
        normal = turned if turned @ normal >= 0 else -turned
    offsets = sorted(float(points[row] @ normal) for row in rows)
    middle = offsets[(len(offsets) - 1) // 2]
    return {row for row, point in enumerate(points) if abs(float(point @ normal) - middle) <= proposals.THICK}


@pytest.mark.parametrize("seed", range(8))
def test_clusters_and_planes_as_slowly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    voxels = rng.integers(0, 9 + seed, (120, 3)) + rng.integers(-1000, 1000, 3)
    found = clusters(voxels)
    assert {frozenset(part.tolist()) for part in found} == slow_clusters(voxels)
    assert [len(part) for part in found] == sorted(len(part) for part in found)
    points = (voxels + rng.random((120, 3))) * 0.1
    assert set(np.flatnonzero(on_largest_plane(points, voxels)).tolist()) == slow_plane(points, voxels)


@pytest.mark.parametrize("seed", range(5))
def test_boxes_do_not_depend_on_the_order_and_hold_points_of_the_scene(seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [FLOOR, surface((-2.5, 2.5, 0), (2.5, 2.5, 2.4))]
    for _ in range(6):
        low = rng.uniform((-2, -2, 0), (2, 2.2, 0.4))
        parts.append(surface(tuple(low), tuple(low + rng.uniform(0.2, 1.2, 3))))
    points = np.concatenate(parts) + rng.normal(0, 0.005, (sum(map(len, parts)), 3))
    for floor in (0.0, None):
        found = propose(points, floor)
        assert 0 < len(found) <= proposals.MOST
        np.testing.assert_array_equal(propose(points[rng.permutation(len(points))], floor), found)
        low, high = found[:, :3] - found[:, 3:] / 2, found[:, :3] + found[:, 3:] / 2
        assert (found[:, 3:] >= 0).all() and found[:, 3:].max() <= proposals.LARGEST
        held = ((low[:, None] - 1e-9 <= points) & (points <= high[:, None] + 1e-9)).all(axis=2)
        assert (held.sum(axis=1) >= proposals.FEWEST).all()
        assert floor is None or (low[:, 2] > proposals.CLEARANCE - 1e-9).all()
