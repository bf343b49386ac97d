# SPDX-License-Identifier: Apache-2.0
"""Procedural textures: how bright each point of a surface is beside its plain colour, and how tinted."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.items import CEILING

Style = Literal["mottled", "grained", "striped"]
TRAINED: tuple[Style, ...] = ("mottled", "grained")  # "striped" is for rooms that show how much a look matters
_LATTICE = np.array([73856093, 19349663, 83492791], np.int64)  # Teschner et al. 2003


def value_noise(points: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """(N,) smooth noise from -1 to 1 at points (N, 3): random values on a lattice of edge 1, interpolated between."""
    cell = np.floor(points).astype(np.int64)
    part = points - cell
    part = part * part * (3 - 2 * part)
    total = np.zeros(len(points), np.float32)
    for corner in range(8):
        side = np.array([corner >> axis & 1 for axis in range(3)])
        hashed = np.bitwise_xor.reduce((cell + side) * _LATTICE, axis=1) ^ (seed * 2654435761 & 0x7FFFFFFF)
        hashed = (hashed * 1103515245 + 12345) & 0x7FFFFFFF
        value = ((hashed ^ hashed >> 15) & 0xFFFF).astype(np.float32) / 32767.5 - 1
        total += value * np.where(side, part, 1 - part).prod(axis=1)
    return total


def factors(
    points: NDArray[np.float32], ids: NDArray[np.int16], rng: np.random.Generator, styles: tuple[Style, ...] = TRAINED
) -> NDArray[np.float32]:
    """(N, 3) factors of the colours of points (N, 3), metres: each surface, told by its id (N,), has its own texture.

    A third of the surfaces stay plain; the mean of each stays about 1, so that colours keep their names.
    """
    found = np.ones((len(points), 3), np.float32)
    for number in range(int(ids.max(initial=CEILING)) + 1):
        plain = rng.random() < 1 / 3
        style = styles[int(rng.integers(len(styles)))]
        scale, amplitude = float(np.exp(rng.uniform(np.log(4), np.log(40)))), float(rng.uniform(0.04, 0.22))
        axis, seed = int(rng.integers(3)), int(rng.integers(1 << 30))
        tint = rng.normal(0, 0.25, 3).astype(np.float32)
        own = np.flatnonzero(ids == number)
        if plain or not len(own):
            continue
        at = points[own] * np.float32(scale)
        if style == "striped":
            pattern = np.sign(np.sin(at[:, axis] + 0.5 * at[:, axis - 1])).astype(np.float32)
        else:
            if style == "grained":
                at[:, axis] /= 8
            pattern = value_noise(at, seed) + np.float32(0.5) * value_noise(3 * at, seed + 1)
        found[own] = 1 + np.float32(amplitude) * pattern[:, None] * (1 + tint)
    return np.maximum(found, 0)
