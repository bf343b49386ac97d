# SPDX-License-Identifier: Apache-2.0
"""What is true of a furnished room and can be said without doubt: names that fit one thing, distances, sizes, sides."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furnished import SEEDS_PER_SPLIT, FurnishedRoom, Split, make_room
from adatoken3d_ros.lab.synthetic.furniture import KINDS, models_of
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, FLOOR, Item
from adatoken3d_ros.lab.synthetic.layout import draw_scale
from adatoken3d_ros.lab.synthetic.views import Sight

DIRECTIONS = ("front", "left", "behind", "right")  # counter-clockwise from where one faces
MIN_PIXELS = 120  # of 320 x 240, in the view that shows most of it


class Facts:
    """The items of a room that are seen well enough, what they can be called, and how far apart all are.

    Args:
        visible: what the views show of each item; None: everything is seen from all sides.

    Attributes:
        items: of the room. seen: those to ask about. named: those that have a name of their own.
        names: of each seen item by instance, those that fit it alone.
        kinds: how many of each class there are.
    """

    def __init__(self, room: FurnishedRoom, visible: Mapping[int, Sight] | None) -> None:
        self.room = room
        self.sights = visible
        self.items = room.items
        self.kinds = Counter(i.kind for i in room.items)
        self.seen = [i for i in room.items if self.is_seen(i)]
        self.names = {i.instance: self._references(i) for i in self.seen}
        self.named = [i for i in self.seen if self.names[i.instance]]
        self.held_out = room.split == "test_unseen"
        low = np.array([i.low for i in room.items]).reshape(-1, 3)
        high = np.array([i.high for i in room.items]).reshape(-1, 3)
        apart = np.maximum(np.maximum(low[:, None] - high[None], low[None] - high[:, None]), 0)
        self._gaps = np.linalg.norm(apart, axis=2).tolist()
        self._middles = np.linalg.norm((low + high)[:, None] / 2 - (low + high)[None] / 2, axis=2).tolist()

    @property
    def known(self) -> Mapping[str, float]:
        """In which part of the rooms each class is: counted when it is first asked for."""
        return presence(self.held_out)

    def is_seen(self, item: Item) -> bool:
        return self.sights is None or (item.instance in self.sights and self.sights[item.instance].pixels >= MIN_PIXELS)

    def is_seen_whole(self, item: Item) -> bool:
        """Whether the views show the item from end to end."""
        if self.sights is None:
            return True
        sight = self.sights[item.instance]
        return bool(((sight.high - sight.low) >= 0.75 * item.size - 0.02).all())

    def alike(self, item: Item) -> list[Item]:
        """What has the item's class or can be taken for it, the item included."""
        return [i for i in self.items if confusable(i.kind, item.kind)]

    def is_clear(self, kind: str) -> bool:
        """Whether nothing of another class can be taken for one of this."""
        return all(i.kind == kind or not confusable(i.kind, kind) for i in self.items)

    def _references(self, item: Item) -> list[str]:
        """The names that fit this item alone, without and then with its colour."""
        alike = self.alike(item)
        names = [f"the {item.kind}"] if len(alike) == 1 else []
        if item.colour is not None and sum(item.colour in i.looks for i in alike) == 1:
            names.append(f"the {item.colour} {item.kind}")
        return names

    def on(self, item: Item) -> list[Item]:
        """What stands on it."""
        return [i for i in self.items if i.supported_by == item.instance]

    def middle(self, a: Item, b: Item) -> float:
        """Between the middles of two items, metres."""
        return self._middles[a.instance - FIRST_ITEM][b.instance - FIRST_ITEM]

    def gap(self, a: Item, b: Item) -> float:
        """Between the boxes of two items, metres."""
        return self._gaps[a.instance - FIRST_ITEM][b.instance - FIRST_ITEM]

    def rarity(self, item: Item) -> float:
        """Weight that makes all classes as frequent over many rooms; several of a kind count once."""
        return 1 / self.known.get(item.kind, 1.0) / self.kinds[item.kind]

    def low_pieces(self) -> list[Item]:
        """What one can stand by."""
        return [i for i in self.named if i.supported_by == FLOOR and max(i.size[:2]) < 1.6]

    def point_on(self, item: Item, rng: np.random.Generator) -> NDArray[np.float64]:
        """A random point of its visible surface, metres with two decimals, off where it meets what it stands on."""
        above = self.on(item)
        for _ in range(20):
            point = self._any_point_on(item, rng)
            if point[2] < item.low[2] + min(0.01, 0.2 * item.size[2]):
                continue
            if not any(
                (point > np.array(i.low) - 0.02).all() and (point < np.array(i.high) + 0.02).all() for i in above
            ):
                break
        return point

    def _any_point_on(self, item: Item, rng: np.random.Generator) -> NDArray[np.float64]:
        if self.sights is not None:
            points = self.sights[item.instance].points
            return np.round(points[int(rng.integers(len(points)))].astype(np.float64), 2)
        share = np.cumsum(item.model.areas)
        face = item.model.faces[int(np.searchsorted(share, rng.random() * share[-1], side="right"))]
        a, b = np.sort(rng.random(2))
        corners = item.vertices[face].astype(np.float64)
        return np.round(corners[0] * a + corners[1] * (b - a) + corners[2] * (1 - b), 2)


def confusable(kind: str, other: str) -> bool:
    """Whether things of two classes can be taken for each other."""
    return kind == other or (KINDS[kind].group != "" and KINDS[kind].group == KINDS[other].group)


def touching(a: Item, b: Item) -> bool:
    """Whether one stands on the other."""
    return a.supported_by == b.instance or b.supported_by == a.instance


def side_of(spot: tuple[float, float], faced: Item, item: Item) -> str | None:
    """Where an item is for somebody at `spot` who faces another: one of DIRECTIONS, None where that is not clear."""
    x, y = spot
    facing = faced.centre[:2] - (x, y)
    if float(np.linalg.norm(facing)) < 0.6 or item.footprint.distance(x, y) < 0.25:
        return None
    heading = math.atan2(facing[1], facing[0])
    points = np.concatenate([item.footprint.corners(), item.centre[None, :2]]) - (x, y)
    angles = np.degrees(np.arctan2(points[:, 1], points[:, 0]) - heading)
    quarters = {round(float(a) / 90) % 4 for a in angles}
    if len(quarters) > 1:
        return None
    off = abs((float(angles[-1]) + 45) % 90 - 45)
    return DIRECTIONS[quarters.pop()] if off < 33 else None


@functools.lru_cache(maxsize=2)
def presence(held_out: bool) -> Mapping[str, float]:
    """In which part of the rooms each class is, by a sample of rooms from the end of the seeds (once, a second)."""
    split: Split = "test_unseen" if held_out else "train"
    rooms = 240
    counts: Counter[str] = Counter()
    for k in range(rooms):
        counts.update({i.kind for i in make_room(SEEDS_PER_SPLIT - 1 - k, split).items})
    return {kind: min(max(counts[kind], 1) / rooms, 0.9) for kind in KINDS if models_of(kind, held_out=held_out)}


def taller(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether things of sizes a (..., 3) are clearly taller than things of sizes b (..., 3)."""
    return a[..., 2] > 1.15 * b[..., 2] + 0.03


def larger(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether things of sizes a (..., 3) are larger than those of sizes b, by volume and by the longest side."""
    return (a.prod(axis=-1) > 1.5 * b.prod(axis=-1)) & (a.max(axis=-1) > 1.1 * b.max(axis=-1))


MEASURES = {"taller": taller, "larger": larger}


@functools.lru_cache(maxsize=200)
def _sizes(kind: str) -> NDArray[np.float64]:
    """(60, 3) sizes that things of the class have in training rooms."""
    rng = np.random.default_rng(0)
    models = models_of(kind, held_out=False)
    return np.array([np.array(models[k % len(models)].size) * draw_scale(kind, rng) for k in range(60)])


@functools.lru_cache(maxsize=20000)
def prior(measure: str, first: str, second: str) -> float:
    """How often something of the first class is the taller or larger one, where that is clear, in training rooms."""
    a, b = _sizes(first)[:, None], _sizes(second)[None]
    wins, losses = (float(MEASURES[measure](*pair).mean()) for pair in ((a, b), (b, a)))
    return wins / (wins + losses) if wins + losses > 0 else 0.5
