# SPDX-License-Identifier: Apache-2.0
"""Where was looked at and when, joined with what another scene knows of it, and confirmed where surfaces lie elsewhere
than was believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.scene.looked import LOOKS, Looked
from adatoken3d_ros.scene.occupancy import CELLS, OFFSETS, PACKING, SIDE, VOXEL

SEEN, FREE, HIT, FIRST = range(len(LOOKS))

Ways = Mapping[int, NDArray[np.float64]]


def in_one_grid(a: Looked, b: Looked) -> bool:
    """Whether the voxels of both are the same."""
    off = (a.origin - b.origin) / (VOXEL * SIDE)
    return bool((np.abs(off - np.rint(off)) <= 1e-6).all())


def joined(older: Looked, newer: Looked) -> Looked:
    """What both know, of one grid (`in_one_grid`), in that of the newer: its looks count as later ones."""
    step = np.rint((older.origin - newer.origin) / (VOXEL * SIDE)).astype(np.int64)
    both = np.concatenate([older.blocks + step, newer.blocks])
    _, at, rows = np.unique(both @ PACKING, return_index=True, return_inverse=True)
    rows = rows.reshape(-1)
    a, b = (np.zeros((len(at), len(LOOKS), CELLS), np.int32) for _ in range(2))
    a[rows[: len(older.blocks)]] = older.tables
    b[rows[len(older.blocks) :]] = np.where(newer.tables > 0, newer.tables + len(older.stamps), 0)
    tables = np.where(b > 0, b, a)
    # What was there and was not looked through since has been there all along.
    stays = (a[:, HIT] > 0) & (a[:, HIT] >= a[:, FREE]) & (b[:, FREE] == 0)
    tables[:, FIRST] = np.where(stays, a[:, FIRST], tables[:, FIRST])
    return Looked(newer.origin, both[at], tables, np.concatenate([older.stamps, newer.stamps]))


def confirmed(known: Looked, before: Looked, ways: Ways | None = None) -> Looked:
    """What is known, with the later times at which it was seen `before`, in voxels that lay elsewhere.

    Only times change: what is occupied there and was then, was hit then; what is free or unseen stays so.

    Args:
        ways: of views by their stamps, nanoseconds, what (4, 4) takes what they saw to where it is now, scene frame;
            what was seen at another time goes the way of the view next to it in time.
    """
    tables, stamps = known.tables.copy(), known.stamps
    for table, is_so, was_so in (
        (HIT, _occupied(known), _occupied(before)),
        (SEEN, known.tables[:, SEEN] > 0, before.tables[:, SEEN] > 0),
    ):
        rows, cells = np.nonzero(was_so)
        when = _times(before, table)[rows, cells]
        centres = (before.blocks[rows] * SIDE + OFFSETS[cells]) * VOXEL + before.origin
        at, cell = _found(known, _moved(centres, when, ways))
        later = at >= 0
        later[later] = is_so[at[later], cell[later]]
        later[later] = when[later] > _times(known, table)[at[later], cell[later]]
        order = np.flatnonzero(later)[np.argsort(when[later], kind="stable")]  # of several the last one stays
        new, number = np.unique(when[order], return_inverse=True)
        tables[at[order], table, cell[order]] = len(stamps) + 1 + number.reshape(-1)
        stamps = np.concatenate([stamps, new])
    return replace(known, tables=tables, stamps=stamps)


def _times(looked: Looked, table: int) -> NDArray[np.int64]:
    """(n, CELLS) acquisition times of the looks of a table, nanoseconds; 0: never."""
    return np.concatenate([[0], looked.stamps])[looked.tables[:, table]]


def _occupied(looked: Looked) -> NDArray[np.bool_]:
    """(n, CELLS) whether something was measured there when it was last looked at."""
    return np.asarray((looked.tables[:, HIT] > 0) & (looked.tables[:, HIT] >= looked.tables[:, FREE]))


def _moved(points: NDArray[np.float64], when: NDArray[np.int64], ways: Ways | None) -> NDArray[np.float64]:
    """Points (n, 3) that were seen at times (n,), where they are now."""
    if not ways or not len(points):
        return points
    stamps = np.array(sorted(ways), np.int64)
    T = np.stack([ways[stamp] for stamp in stamps.tolist()])
    right = np.searchsorted(stamps, when).clip(0, len(stamps) - 1)
    left = np.maximum(right - 1, 0)
    near = np.where(np.abs(when - stamps[left]) <= np.abs(stamps[right] - when), left, right)
    return np.asarray((T[near, :3, :3] @ points[:, :, None])[:, :, 0] + T[near, :3, 3])


def _found(known: Looked, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(n,) rows of the blocks that hold points (n, 3), -1 for none, and (n,) cells in them."""
    voxel = np.rint((points - known.origin) / VOXEL).astype(np.int64)
    block = voxel // SIDE
    rest = voxel - block * SIDE
    cells = (rest[:, 0] * SIDE + rest[:, 1]) * SIDE + rest[:, 2]
    if not len(known.blocks):
        return np.full(len(points), -1), cells
    numbers = known.blocks @ PACKING
    order = np.argsort(numbers)
    wanted = block @ PACKING
    at = np.minimum(np.searchsorted(numbers[order], wanted), len(order) - 1)
    return np.where(numbers[order][at] == wanted, order[at], -1), cells
