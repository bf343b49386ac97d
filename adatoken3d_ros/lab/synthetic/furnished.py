# SPDX-License-Identifier: Apache-2.0
"""Rooms furnished with real models, with exact ground truth: what stands where, on what, in which colour.

Everything follows from the seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from adatoken3d_ros.lab.synthetic.furniture import Model
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, Item, placed, to_rgb
from adatoken3d_ros.lab.synthetic.layout import Layout

Split = Literal["train", "test", "test_unseen", "crowded"]
SPLITS: tuple[Split, ...] = ("train", "test", "test_unseen", "crowded")
SEEDS_PER_SPLIT = 10_000_000


@dataclass(frozen=True)
class Floor:
    """A floor's look: `unit` is the width of a plank or the side of a tile, metres; colours are sRGB."""

    pattern: Literal["plain", "planks", "tiles", "checks"]
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    unit: float


@dataclass(frozen=True)
class Light:
    """A lamp below the ceiling: position in metres, colour as factors of red, green and blue, strength of the rest."""

    position: tuple[float, float, float]
    colour: tuple[float, float, float]
    ambient: float


@dataclass(frozen=True, eq=False)
class FurnishedRoom:
    """A closed room and what is in it.

    Attributes:
        size: inner extent along x, y, z, metres.
        items: `items[k].instance` is `FIRST_ITEM + k`.
    """

    seed: int
    split: Split
    size: tuple[float, float, float]
    floor: Floor
    wall_colour: tuple[int, int, int]
    ceiling_colour: tuple[int, int, int]
    light: Light
    items: tuple[Item, ...]

    def item(self, instance: int) -> Item:
        """The item with this value in the instance image.

        Raises:
            ValueError: if there is none.
        """
        if not FIRST_ITEM <= instance < FIRST_ITEM + len(self.items):
            raise ValueError(f"no item has the instance {instance}; the room has {len(self.items)} from {FIRST_ITEM}")
        return self.items[instance - FIRST_ITEM]


def make_room(seed: int, split: Split = "train") -> FurnishedRoom:
    """A room of 3.2 to 6.5 m with 6 to 16 items; `seed` counts within the split, whose rooms no other split has.

    `train` and `test` use the same models, `test_unseen` only those that were held out. `crowded` is for training too:
    rooms of up to 31 items, many of them on others.

    Raises:
        ValueError: for an unknown split or a seed outside 0..SEEDS_PER_SPLIT - 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown, known: {', '.join(SPLITS)}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed} is not in 0..{SEEDS_PER_SPLIT - 1}")
    absolute = SPLITS.index(split) * SEEDS_PER_SPLIT + seed
    for attempt in range(20):
        layout = Layout(
            np.random.default_rng([absolute, attempt]), held_out=split == "test_unseen", crowded=split == "crowded"
        )
        layout.furnish()
        if len(layout.items) >= 6:
            break
    rng = layout.rng
    wall = _pale(rng)
    base = np.array([(150, 110, 75), (190, 155, 115), (120, 85, 60), (200, 195, 185), (160, 160, 160), (110, 105, 100)])
    colour = base[rng.integers(len(base))] * rng.uniform(0.85, 1.15) + rng.uniform(-8, 8, 3)
    second = colour * rng.uniform(0.8, 0.93)
    pattern: Literal["plain", "planks", "tiles", "checks"] = ("plain", "planks", "planks", "tiles", "checks")[
        int(rng.integers(5))
    ]
    unit = float(rng.uniform(0.09, 0.2) if pattern == "planks" else rng.uniform(0.25, 0.6))
    warm = float(rng.uniform(-0.05, 0.08))
    width, length, height = layout.size
    position = (
        float(rng.uniform(-0.3, 0.3) * width),
        float(rng.uniform(-0.3, 0.3) * length),
        height - float(rng.uniform(0.1, 0.35)),
    )
    strength = float(rng.uniform(0.85, 1.1))
    return FurnishedRoom(
        seed=seed,
        split=split,
        size=layout.size,
        floor=Floor(pattern, (to_rgb(colour), to_rgb(second)), unit),
        wall_colour=wall,
        ceiling_colour=to_rgb(np.array(wall) * 0.3 + 170),
        light=Light(position, (strength * (1 + warm), strength, strength * (1 - warm)), float(rng.uniform(0.42, 0.6))),
        items=tuple(layout.items),
    )


def assemble(
    size: tuple[float, float, float],
    contents: Sequence[tuple[Model, str | None, tuple[float, float, float], float, int]],
) -> FurnishedRoom:
    """A room made by hand: (model, colour name or None, position, yaw, supported_by) for each item, in its own size."""
    items: list[Item] = []
    for model, colour, position, yaw, supported_by in contents:
        items.append(placed(FIRST_ITEM + len(items), model, colour, None, position, yaw, (1.0, 1.0, 1.0), supported_by))
    return FurnishedRoom(
        seed=0,
        split="train",
        size=size,
        floor=Floor("plain", ((170, 140, 110), (150, 120, 90)), 0.2),
        wall_colour=(215, 212, 205),
        ceiling_colour=(235, 235, 235),
        light=Light((0.0, 0.0, size[2] - 0.2), (1.0, 1.0, 1.0), 0.5),
        items=tuple(items),
    )


def _pale(rng: np.random.Generator) -> tuple[int, int, int]:
    """A wall colour: light, with a little of one hue."""
    light = rng.uniform(185, 235)
    return to_rgb(light + rng.uniform(-1, 1, 3) * 14)
