# SPDX-License-Identifier: Apache-2.0
"""Where was looked at and when, as it is kept."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOOKS = ("seen", "free", "hit", "first")  # the tables of the number of the look in which a voxel last was, or first hit


@dataclass(frozen=True, eq=False)
class Looked:
    """Voxels in blocks (n, 3) int64, each once, and the looks in which each last was, or first hit: tables
    (n, len(LOOKS), CELLS) int32 of their numbers from 1 on, 0: never; stamps (m,) int64 of the looks 1 to m,
    nanoseconds; origin (3,), the centre of the voxel (0, 0, 0), scene frame, metres.
    """

    origin: NDArray[np.float64]
    blocks: NDArray[np.int64]
    tables: NDArray[np.int32]
    stamps: NDArray[np.int64]


def without_first(tables: NDArray[np.int32], forgotten: int) -> NDArray[np.int32]:
    """Tables (n, len(LOOKS), CELLS) of numbers from 1 on after the first looks were forgotten: what is older counts as
    that old, and what is free stays so."""
    later = np.maximum(tables - np.int32(forgotten), tables > 0)
    free, hit = LOOKS.index("free"), LOOKS.index("hit")
    later[:, free] += (tables[:, free] > tables[:, hit]) & (later[:, free] <= later[:, hit])
    return later
