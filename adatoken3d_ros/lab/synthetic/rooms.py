# SPDX-License-Identifier: Apache-2.0
"""Small rooms with named, coloured things in them: the scene of the demo and of the tests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (200, 40, 35),
    "green": (50, 150, 60),
    "blue": (45, 80, 190),
    "yellow": (230, 200, 50),
    "orange": (235, 130, 40),
    "purple": (130, 60, 160),
    "white": (235, 235, 230),
    "black": (40, 40, 42),
}
TABLE_COLOUR = (140, 100, 65)
# Nothing reaches this height, so a camera above it and within the walls is inside no object.
MAX_OBJECT_HEIGHT = 1.25


@dataclass(frozen=True)
class Thing:
    """A box or a sphere.

    Attributes:
        name: e.g. "red box"; unique in its room.
        shape: of the solid.
        centre: metres, scene frame. size: metres along x, y, z (a sphere's diameter three times).
        colour: RGB, 0..255.
    """

    name: str
    shape: Literal["box", "sphere"]
    centre: tuple[float, float, float]
    size: tuple[float, float, float]
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Room:
    """A floor at z = 0 and four walls around the origin, open at the top.

    Attributes:
        size: inner extent along x and y and height of the walls, metres.
        floor_colours: of the two kinds of tiles. wall_colour: also what is seen over the walls.
        tile: metres, side of a floor tile.
        things: what stands on the floor and the tables; table tops and legs are things too.
    """

    seed: int
    size: tuple[float, float, float]
    floor_colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    wall_colour: tuple[int, int, int]
    tile: float
    things: tuple[Thing, ...]


def make_room(seed: int) -> Room:
    """A room of about 5 m x 4 m with two tables and 6 to 10 boxes and spheres, apart from each other; seeded."""
    rng = np.random.default_rng(seed)
    size = (float(rng.uniform(4.6, 6.0)), float(rng.uniform(3.8, 4.8)), float(rng.uniform(2.3, 2.7)))
    shade = int(rng.integers(0, 25))
    names = [f"{colour} {shape}" for shape in ("box", "sphere") for colour in COLOURS]
    rng.shuffle(names)

    things: list[Thing] = []
    taken: list[tuple[float, float, float]] = []  # x, y, radius of what stands on the floor
    surfaces: list[tuple[float, float, float, float, float]] = []  # x, y, length, width, height of the table tops
    for number in (1, 2):
        length, width, height = rng.uniform(0.9, 1.4), rng.uniform(0.55, 0.8), rng.uniform(0.66, 0.8)
        x, y = _place(rng, size, math.hypot(length, width) / 2, taken)
        things += _table(f"table {number}", x, y, length, width, height)
        surfaces.append((x, y, length, width, height))

    for index in range(int(rng.integers(6, 11))):
        colour, _, shape = names[index].partition(" ")
        if index < 2 * len(surfaces):  # two on each table, one on each half
            x, y, length, width, base = surfaces[index // 2]
            largest = 0.9 * min(length / 2, width)
            extent = rng.uniform(0.12, min(0.4, largest / math.sqrt(2)), 3)
            x += (0.25 if index % 2 else -0.25) * length
        else:
            base = 0.0
            extent = rng.uniform(0.2, 0.65, 3)
            x, y = _place(rng, size, math.hypot(extent[0], extent[1]) / 2, taken)
        dx, dy, dz = (float(extent.min()),) * 3 if shape == "sphere" else map(float, extent)
        kind: Literal["box", "sphere"] = "sphere" if shape == "sphere" else "box"
        things.append(Thing(names[index], kind, (float(x), float(y), base + dz / 2), (dx, dy, dz), COLOURS[colour]))
    return Room(
        seed=seed,
        size=size,
        floor_colours=((150 + shade, 140 + shade, 125 + shade), (120 + shade, 108 + shade, 95 + shade)),
        wall_colour=(185 + shade, 190 + shade, 200 + shade),
        tile=0.5,
        things=tuple(things),
    )


def _table(name: str, x: float, y: float, length: float, width: float, height: float) -> list[Thing]:
    top, leg = 0.04, 0.05
    parts = [Thing(name, "box", (x, y, height - top / 2), (length, width, top), TABLE_COLOUR)]
    for number, (sx, sy) in enumerate(((-1, -1), (-1, 1), (1, -1), (1, 1)), start=1):
        centre = (x + sx * (length - leg) / 2, y + sy * (width - leg) / 2, (height - top) / 2)
        parts.append(Thing(f"{name} leg {number}", "box", centre, (leg, leg, height - top), TABLE_COLOUR))
    return parts


def _place(
    rng: np.random.Generator, size: tuple[float, float, float], radius: float, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """A free place on the floor for a thing of this radius, metres; it is taken then.

    A crowded room is given up after many tries for the place that overlaps least, which at these sizes is free too.
    """
    best, best_gap = (0.0, 0.0), -math.inf
    for _ in range(200):
        x = float(rng.uniform(-1, 1) * (size[0] / 2 - radius - 0.05))
        y = float(rng.uniform(-1, 1) * (size[1] / 2 - radius - 0.05))
        gap = min((math.hypot(x - a, y - b) - r - radius for a, b, r in taken), default=math.inf)
        if gap > best_gap:
            best, best_gap = (x, y), gap
        if best_gap > 0.1:
            break
    taken.append((*best, radius))
    return best
