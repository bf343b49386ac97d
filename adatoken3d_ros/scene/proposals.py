# SPDX-License-Identifier: Apache-2.0
"""Boxes around what may be things: clusters of occupied voxels above the floor, without walls.

Voxels that touch, also at an edge or a corner, belong together. Whatever stands at a wall hangs together with it, and
so with the whole room; a cluster that is too large for a thing therefore loses the largest plane in it, upright or
level, and falls apart into what that held together. What stands on a table hangs together with that: what is left of a
thing without its largest plane may be things, too. Fine voxels part what stands close, coarse ones hold together what
was seen from afar: boxes come of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Points = NDArray[np.float64]

VOXELS = (0.1, 0.2)  # metres, their edges
CLEARANCE = 0.1  # metres above the floor within which a point belongs to it
LARGEST = 3.0  # metres, the longest edge of a thing
FEWEST = 4  # points of a thing
MOST = 64  # boxes
THICK = 0.08  # metres on both sides of a plane that goes with it
ANGLES = 60  # directions of upright planes that are tried
MOST_PLANES = 64  # that are taken away of what is too large; what is so still is no thing

# (13, 3): of each two neighbours among the 26 around a voxel the one that comes later.
_LATER = np.array([step for step in np.ndindex(3, 3, 3) if step > (1, 1, 1)]) - 1


def propose(places: NDArray[np.floating], floor: float | None) -> Points:
    """Axis-aligned boxes (N, 6) of at most `MOST` clusters: centre and size, metres, in the frame of the places.

    Args:
        places: (P, 3) of surfaces, metres, z up; the order does not matter.
        floor: its height; None where none was found, then it is one of the planes that hold a cluster together.

    Returns:
        The clusters of most points first, of equal ones that with the lower corner, x before y before z; each box once.

    Raises:
        ValueError: for another shape or a point that is not finite.
    """
    points: Points = np.asarray(places, dtype=np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be (P, 3), got {points.shape}")
    if not np.isfinite(points).all():
        raise ValueError(f"point {int(np.flatnonzero(~np.isfinite(points).all(axis=1))[0])} is not finite")
    if floor is not None:
        points = points[points[:, 2] > floor + CLEARANCE]
    most: dict[tuple[float, ...], int] = {}  # points of a box, by its corners
    for edge in VOXELS:
        for count, box in _things(points, np.floor(points / edge).astype(np.int64)):
            most[box] = max(count, most.get(box, 0))
    corners = np.array(sorted((-count, *box) for box, count in most.items())[:MOST]).reshape(-1, 7)
    low, high = corners[:, 1:4], corners[:, 4:]
    return np.concatenate([(low + high) / 2, high - low], axis=1)


def _things(points: Points, voxels: NDArray[np.int64]) -> Iterator[tuple[int, tuple[float, ...]]]:
    """Of each cluster that may be a thing how many of the points (P, 3) it has, and its lower and upper corner."""
    planes = 0
    waiting = [(rows, True) for rows in clusters(voxels)]
    while waiting:
        rows, whole = waiting.pop()
        if len(rows) < FEWEST:
            continue
        low, high = points[rows].min(axis=0), points[rows].max(axis=0)
        fits = bool((high - low).max() <= LARGEST)
        if fits:
            yield len(rows), (*low.tolist(), *high.tolist())
        planes += not fits
        if whole if fits else planes <= MOST_PLANES:
            rest = rows[~on_largest_plane(points[rows], voxels[rows])]
            waiting += [(rest[part], not fits) for part in clusters(voxels[rest])]


def clusters(voxels: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows of the points whose voxels (P, 3) hang together, the largest cluster last."""
    if not len(voxels):
        return []
    cells, at = np.unique(voxels, axis=0, return_inverse=True)
    at = at.reshape(-1)
    # One number a cell, in the order of the cells; a border of one so that no neighbour is taken for another.
    close = np.stack([_without_gaps(axis) for axis in cells.T], axis=1) + 1
    span = close.max(axis=0) + 2
    weight = np.array([span[1] * span[2], span[2], 1])
    keys = close @ weight
    wanted = keys[:, None] + _LATER @ weight
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    one, other = np.nonzero(keys[place] == wanted)
    pairs = coo_array((np.ones(len(one), bool), (one, place[one, other])), shape=(len(keys), len(keys)))
    count, label = connected_components(pairs, directed=False)
    label = label[at]
    order = np.argsort(label, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(label, minlength=count))[:-1])
    return sorted(parts, key=len)


def _without_gaps(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Values (n,) of which neighbours stay neighbours, however far apart the others were: their products are small."""
    different, at = np.unique(values, return_inverse=True)
    place: NDArray[np.int64] = np.append(0, np.minimum(np.diff(different), 2).cumsum())[at.reshape(-1)]
    return place


def on_largest_plane(points: Points, voxels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(P,) which points of a cluster lie on the plane, level or upright, that holds most of the occupied voxels.

    Voxels count once, so that what is near a camera does not count more. Of equal planes the level ones are first, then
    the smaller angles, then those nearer to the origin's side.
    """
    cells, at = np.unique(voxels, axis=0, return_inverse=True)
    angles = np.arange(ANGLES) * math.pi / ANGLES
    normals = np.array([(0.0, 0.0, 1.0), *zip(np.cos(angles), np.sin(angles), np.zeros(ANGLES), strict=True)])
    # Rounded twice: a half is one on each machine.
    away = np.rint((cells @ normals.T).round(6)).astype(np.int64)
    first = away.min(axis=0)
    support = [np.bincount(one) for one in (away - first).T]
    best = int(np.argmax([one.max() for one in support]))
    offset = int(support[best].argmax()) + first[best]
    # The voxels say which plane, their points how it is turned and where it is.
    held = (away[:, best] == offset)[at.reshape(-1)]
    normal = normals[best]
    if best:
        flat = points[held, :2] - points[held, :2].mean(axis=0)
        turned = np.append(np.linalg.eigh(flat.T @ flat)[1][:, 0], 0.0)
        normal = turned if turned @ normal >= 0 else -turned
    distance = points @ normal
    middle = np.sort(distance[held])[(np.count_nonzero(held) - 1) // 2]
    taken: NDArray[np.bool_] = np.abs(distance - middle) <= THICK
    return taken
