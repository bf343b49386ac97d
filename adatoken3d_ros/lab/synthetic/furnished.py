# SPDX-License-Identifier: Apache-2.0
"""Rooms furnished with real models, with exact ground truth: what stands where, on what, in which colour.

World frame: metres, z up, the floor at z = 0, the origin at the floor's centre. Everything follows from the seed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS, Model, models_of

Split = Literal["train", "test", "test_unseen"]
SPLITS: tuple[Split, ...] = ("train", "test", "test_unseen")
SEEDS_PER_SPLIT = 10_000_000
# Values of the instance image; items count upwards from FIRST_ITEM.
FLOOR, WALL, CEILING, FIRST_ITEM = 0, 1, 2, 3
MAX_ITEMS = 16
TALL = 1.3  # what is taller keeps away from the room's centre, where a camera passes
_GAP = 0.04  # between footprints, metres
_STRETCHY = {
    "table",
    "coffee table",
    "desk",
    "bookshelf",
    "cabinet",
    "wardrobe",
    "bench",
    "bed",
    "sofa",
    "box",
    "piano",
}
_SUPPORTS = ("table", "table", "desk", "desk", "coffee table", "cabinet", "nightstand", "tv stand", "bookshelf")
_COMMON = ("sofa", "bed", "wardrobe", "refrigerator", "armchair", "trash can", "box", "chair", "bookshelf")
_FACING = {"television", "laptop", "computer", "printer", "phone", "microwave", "toaster", "coffee maker", "radio"}


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
class Item:
    """One piece of furniture in a room.

    Attributes:
        instance: its value in instance images. kind: class.
        colour: its name, when the item was given one. looks: every colour name that could be said of it.
        palette: (P, 3) uint8, for the rows of `model.colour`.
        position: (3,) of the model's origin. yaw: of its front, radians from +x towards +y. scale: (3,), model frame.
        supported_by: FLOOR, WALL or another item's instance.
        low, high: (3,) axis-aligned box in the world.
    """

    instance: int
    kind: str
    model: Model
    colour: str | None
    looks: frozenset[str]
    palette: NDArray[np.uint8]
    position: tuple[float, float, float]
    yaw: float
    scale: tuple[float, float, float]
    supported_by: int
    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @functools.cached_property
    def vertices(self) -> NDArray[np.float32]:
        """(V, 3) float32, world frame."""
        return _to_world(self.model, self.position, self.yaw, self.scale)

    @functools.cached_property
    def centre(self) -> NDArray[np.float64]:
        """(3,) of the box."""
        return (np.array(self.low) + np.array(self.high)) / 2

    @functools.cached_property
    def size(self) -> NDArray[np.float64]:
        """(3,) of the box, along the world's axes."""
        return np.array(self.high) - np.array(self.low)

    @functools.cached_property
    def footprint(self) -> Footprint:
        """The oriented rectangle it covers, with its height span."""
        hx, hy = self.model.size[0] * self.scale[0] / 2, self.model.size[1] * self.scale[1] / 2
        return Footprint(self.position[0], self.position[1], hx, hy, self.yaw, self.low[2], self.high[2])


@dataclass(frozen=True)
class Footprint:
    """An upright oriented box: centre (x, y), half extents along its own axes, yaw, and from z0 to z1."""

    x: float
    y: float
    hx: float
    hy: float
    yaw: float
    z0: float
    z1: float

    def corners(self) -> NDArray[np.float64]:
        """(4, 2)."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        local = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (self.hx, self.hy)
        return local @ np.array([[c, s], [-s, c]]) + (self.x, self.y)

    def overlaps(self, other: Footprint, gap: float = 0.0) -> bool:
        """Whether the two boxes come closer than `gap` in the plane and meet in height (separating axis theorem)."""
        if self.z1 <= other.z0 or other.z1 <= self.z0:
            return False
        dx, dy = other.x - self.x, other.y - self.y
        radii = math.hypot(self.hx, self.hy) + math.hypot(other.hx, other.hy) + gap
        if dx * dx + dy * dy > radii * radii:
            return False
        turn = other.yaw - self.yaw
        c, s = abs(math.cos(turn)), abs(math.sin(turn))
        for box, far, sign in ((self, other, 1), (other, self, -1)):
            bc, bs = math.cos(box.yaw), math.sin(box.yaw)
            along, across = sign * (dx * bc + dy * bs), sign * (-dx * bs + dy * bc)
            if abs(along) > box.hx + far.hx * c + far.hy * s + gap:
                return False
            if abs(across) > box.hy + far.hx * s + far.hy * c + gap:
                return False
        return True

    def distance(self, x: float, y: float) -> float:
        """From a point to the rectangle in the plane; 0 inside."""
        c, s = math.cos(self.yaw), math.sin(self.yaw)
        dx, dy = x - self.x, y - self.y
        along, across = abs(dx * c + dy * s) - self.hx, abs(-dx * s + dy * c) - self.hy
        return math.hypot(max(along, 0.0), max(across, 0.0))


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

    `train` and `test` use the same models, `test_unseen` only those that were held out.

    Raises:
        ValueError: for an unknown split or a seed outside 0..SEEDS_PER_SPLIT - 1.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown, known: {', '.join(SPLITS)}")
    if not 0 <= seed < SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed} is not in 0..{SEEDS_PER_SPLIT - 1}")
    absolute = SPLITS.index(split) * SEEDS_PER_SPLIT + seed
    for attempt in range(20):
        layout = _Layout(np.random.default_rng([absolute, attempt]), held_out=split == "test_unseen")
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
        floor=Floor(pattern, (_rgb(colour), _rgb(second)), unit),
        wall_colour=wall,
        ceiling_colour=_rgb(np.array(wall) * 0.3 + 170),
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
        items.append(_item(FIRST_ITEM + len(items), model, colour, None, position, yaw, (1.0, 1.0, 1.0), supported_by))
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


def _to_world(
    model: Model, position: tuple[float, float, float], yaw: float, scale: tuple[float, float, float]
) -> NDArray[np.float32]:
    c, s = math.cos(yaw), math.sin(yaw)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return ((model.vertices * np.array(scale)) @ rotation.T + np.array(position)).astype(np.float32)


def _item(
    instance: int,
    model: Model,
    colour: str | None,
    rgb: tuple[int, int, int] | None,
    position: tuple[float, float, float],
    yaw: float,
    scale: tuple[float, float, float],
    supported_by: int,
) -> Item:
    vertices = _to_world(model, position, yaw, scale)
    palette = model.palette if colour is None else model.tinted(rgb or COLOURS[colour])
    looks = model.look(palette) if colour is None else frozenset({colour})
    low, high = vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()
    return Item(
        instance, model.kind, model, colour, looks, palette, position, yaw, scale, supported_by, tuple(low), tuple(high)
    )


def _rgb(colour: NDArray[np.float64]) -> tuple[int, int, int]:
    r, g, b = np.clip(np.rint(colour), 0, 255).astype(int).tolist()
    return r, g, b


def _pale(rng: np.random.Generator) -> tuple[int, int, int]:
    """A wall colour: light, with a little of one hue."""
    light = rng.uniform(185, 235)
    return _rgb(light + rng.uniform(-1, 1, 3) * 14)


def draw_scale(kind: str, rng: np.random.Generator) -> tuple[float, float, float]:
    """By how much a piece of the class is larger or smaller than its model, along the model's axes."""
    if kind in _STRETCHY:
        a, b, c = rng.uniform(0.86, 1.14, 3).tolist()
        return a, b, c
    spread = 0.05 if kind in ("person", "door", "bicycle") else 0.13
    factor = float(rng.uniform(1 - spread, 1 + spread))
    return factor, factor, factor


@functools.lru_cache(maxsize=256)
def _models(kind: str, held_out: bool) -> tuple[Model, ...]:
    return tuple(models_of(kind, held_out=held_out))


class _Layout:
    """Fills one room, item by item; whatever does not fit is left out."""

    def __init__(self, rng: np.random.Generator, *, held_out: bool) -> None:
        self.rng = rng
        self.held_out = held_out
        self.size = (float(rng.uniform(3.2, 6.5)), float(rng.uniform(3.2, 5.6)), float(rng.uniform(2.4, 2.9)))
        self.items: list[Item] = []
        self.blocked: list[Footprint] = []  # of items and of what must stay free (before doors)
        self.covered = 0.0  # square metres of floor
        # Kinds are drawn almost evenly, so that no class says much about the others in the room.
        kinds = [k for k, v in KINDS.items() if v.place in ("wall", "free") and _models(k, held_out)]
        self.floor_kinds = kinds + [k for k in _COMMON if k in kinds] * 2
        self.top_kinds = [k for k, v in KINDS.items() if v.place == "top" and _models(k, held_out)]

    # --- the plan ----------------------------------------------------------------------------------------------------

    def furnish(self) -> None:
        rng = self.rng
        target = int(rng.integers(7, MAX_ITEMS + 1))
        if rng.random() < 0.8:
            self.opening("door")
        for _ in range(int(rng.choice([0, 0, 1, 1, 2]))):
            self.opening("window")
        self.group(self.pick(_SUPPORTS), target)
        for _ in range(60):
            if len(self.items) >= target:
                break
            draw = rng.random()
            if draw < 0.4:
                self.repeat(self.on_top, self.pick(self.top_kinds), target)
            elif draw < 0.55:
                self.group(self.pick(_SUPPORTS), target)
            else:
                self.group(self.pick(self.floor_kinds), target)

    def pick(self, kinds: Sequence[str]) -> str:
        available = [k for k in kinds if _models(k, self.held_out)]
        return available[int(self.rng.integers(len(available)))]

    def repeat(self, place: Callable[[str], Item | None], kind: str, target: int) -> None:
        """Place one of a kind, sometimes several, so that counting is not always one."""
        copies = int(self.rng.choice([1, 1, 1, 2, 3, 4]))
        for _ in range(copies):
            if len(self.items) < target:
                place(kind)

    def group(self, kind: str, target: int) -> None:
        """A piece on the floor with what belongs to it."""
        rng = self.rng
        if KINDS[kind].place == "free" and kind not in ("table", "coffee table"):
            self.repeat(self.standing, kind, target)
            return
        item = self.standing(kind)
        if item is None:
            return
        free = target - len(self.items)
        if kind == "table" and rng.random() < 0.75:
            self.seats(item, min(free, int(rng.integers(1, 7))))
        elif kind == "desk" and free and rng.random() < 0.6:
            self.beside(item, self.pick(("office chair", "office chair", "chair", "stool")), "front")
        elif kind == "sofa" and free and rng.random() < 0.35:
            self.beside(item, "coffee table", "before")
        elif kind == "bed" and free and rng.random() < 0.4 and _models("nightstand", self.held_out):
            for _ in range(min(free, int(rng.integers(1, 3)))):
                self.beside(item, "nightstand", "side")
        if kind == "tv stand" and len(self.items) < target and rng.random() < 0.5:
            self.on_top("television", item)

    # --- single pieces -----------------------------------------------------------------------------------------------

    def draw(self, kind: str) -> tuple[Model, tuple[float, float, float]]:
        """A model of the class and its scale."""
        rng = self.rng
        models = _models(kind, self.held_out)
        model = models[int(rng.integers(len(models)))]
        return model, draw_scale(kind, rng)

    def add(
        self,
        model: Model,
        scale: tuple[float, float, float],
        position: tuple[float, float, float],
        yaw: float,
        supported_by: int,
        like: Item | None = None,
    ) -> Item:
        rng = self.rng
        colour, rgb = None, None
        if like is not None:
            colour = like.colour
        elif KINDS[model.kind].tint and rng.random() < 0.7:
            colour = list(COLOURS)[int(rng.integers(len(COLOURS)))]
        if colour is not None:
            rgb = _rgb(np.array(COLOURS[colour]) * rng.uniform(0.94, 1.06) + rng.uniform(-5, 5, 3))
        item = _item(FIRST_ITEM + len(self.items), model, colour, rgb, position, yaw, scale, supported_by)
        self.items.append(item)
        self.blocked.append(item.footprint)
        if supported_by == FLOOR:
            self.covered += 4 * item.footprint.hx * item.footprint.hy
        return item

    def fits(self, box: Footprint, gap: float = _GAP) -> bool:
        """Whether the box lies in the room, off every other, and out of the centre when it is tall."""
        corners = np.abs(box.corners())
        if (corners[:, 0] > self.size[0] / 2 - 0.005).any() or (corners[:, 1] > self.size[1] / 2 - 0.005).any():
            return False
        if box.z1 > self.size[2] - 0.02:
            return False
        if box.z1 > TALL and box.distance(0.0, 0.0) < 0.75:
            return False
        return not any(box.overlaps(other, gap) for other in self.blocked)

    def standing(self, kind: str, like: Item | None = None) -> Item | None:
        """One piece on the floor (or hung on a wall), where its kind belongs."""
        rng = self.rng
        model, scale = self.draw(kind)
        hx, hy, height = (model.size[k] * scale[k] for k in range(3))
        hx, hy = hx / 2, hy / 2
        if self.covered + 4 * hx * hy > 0.4 * self.size[0] * self.size[1]:
            return None
        at_wall = KINDS[kind].place == "wall" or (kind in ("ladder", "bicycle", "plant") and rng.random() < 0.5)
        base = model.elevation if kind == "radiator" else 0.0
        for _ in range(25):
            if at_wall:
                x, y, yaw = self.at_wall(hx, hy)
                gap = 0.02
            else:
                yaw = float(rng.integers(4)) * math.pi / 2 + float(rng.normal(0, 0.15))
                if kind not in ("table", "coffee table"):
                    yaw = float(rng.uniform(-math.pi, math.pi))
                x = float(rng.uniform(-1, 1) * (self.size[0] / 2 - min(hx, hy)))
                y = float(rng.uniform(-1, 1) * (self.size[1] / 2 - min(hx, hy)))
                gap = 0.08
            if self.fits(Footprint(x, y, hx, hy, yaw, base, base + height), gap):
                return self.add(model, scale, (x, y, base), yaw, FLOOR if base == 0 else WALL, like)
        return None

    def at_wall(self, hx: float, hy: float) -> tuple[float, float, float]:
        """(x, y, yaw) with the back to a random wall."""
        rng = self.rng
        side = int(rng.integers(4))
        yaw = side * math.pi / 2  # the wall's inward normal
        depth, width = (self.size[0], self.size[1]) if side % 2 == 0 else (self.size[1], self.size[0])
        back = depth / 2 - hx - float(rng.uniform(0.01, 0.05))
        along = float(rng.uniform(-1, 1)) * max(width / 2 - hy - 0.02, 0.0)
        if rng.random() < 0.3:  # people like corners
            along = math.copysign(max(width / 2 - hy - 0.03, 0.0), along)
        c, s = round(math.cos(yaw)), round(math.sin(yaw))
        return -back * c - along * s, -back * s + along * c, yaw

    def opening(self, kind: Literal["door", "window"]) -> None:
        """A door or a window, flat on a wall."""
        model, (factor, _, _) = self.draw(kind)
        thickness = 0.07
        scale = (thickness / model.size[0], factor, factor if kind == "door" else min(factor, 1.3 / model.size[2]))
        height = model.size[2] * scale[2]
        base = 0.0 if kind == "door" else float(self.rng.uniform(0.85, 1.0))
        if base + height > self.size[2] - 0.1:
            return
        hy = model.size[1] * scale[1] / 2
        for _ in range(12):
            x, y, yaw = self.at_wall(thickness / 2, hy)
            c, s = math.cos(yaw), math.sin(yaw)
            # Flush with the wall.
            half = self.size[0] / 2 if abs(c) > 0.5 else self.size[1] / 2
            shift = half - 0.006 - thickness / 2 - abs(x * c + y * s)
            x, y = x - shift * c, y - shift * s
            reach = 0.7 if kind == "door" else 0.0
            clear = Footprint(
                x + c * reach / 2, y + s * reach / 2, thickness / 2 + reach / 2, hy, yaw, base, base + height
            )
            if self.fits(clear, 0.02):
                self.add(model, scale, (x, y, base), yaw, WALL)
                if reach:
                    self.blocked.append(clear)
                return

    def seats(self, table: Item, count: int) -> None:
        """Chairs around a table, which they face."""
        rng = self.rng
        kind = self.pick(("chair", "chair", "chair", "stool", "armchair", "office chair"))
        model, scale = self.draw(kind)
        box = table.footprint
        hx, hy = model.size[0] * scale[0] / 2, model.size[1] * scale[1] / 2
        spots: list[tuple[float, float, float]] = []
        for side, (reach, width) in enumerate(((box.hx, box.hy), (box.hy, box.hx), (box.hx, box.hy), (box.hy, box.hx))):
            number = max(1, int(2 * width / (2 * hy + 0.15)))
            for k in range(number):
                spots.append((side * math.pi / 2, reach, ((k + 0.5) / number - 0.5) * 2 * width))
        alike = rng.random() < 0.45
        first: Item | None = None
        for index in rng.permutation(len(spots))[: max(count, 0)]:
            angle, reach, along = spots[int(index)]
            distance = reach + hx + float(rng.uniform(0.03, 0.2))
            direction = box.yaw + angle
            c, s = math.cos(direction), math.sin(direction)
            x, y = box.x + c * distance - s * along, box.y + s * distance + c * along
            yaw = direction + math.pi + float(rng.normal(0, 0.1))
            if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, model.size[2] * scale[2]), 0.01):
                item = self.add(model, scale, (x, y, 0.0), yaw, FLOOR, first if alike else None)
                first = first or item

    def beside(self, item: Item, kind: str, where: Literal["front", "before", "side"]) -> None:
        """A chair in front of a desk, a coffee table before a sofa, a nightstand beside a bed's head."""
        rng = self.rng
        if not _models(kind, self.held_out):
            return
        model, scale = self.draw(kind)
        hx, hy = model.size[0] * scale[0] / 2, model.size[1] * scale[1] / 2
        box = item.footprint
        c, s = math.cos(box.yaw), math.sin(box.yaw)
        if where == "side":
            along, across = -box.hx + hx, (box.hy + hy + 0.06) * float(rng.choice([-1, 1]))
            yaw = box.yaw
        else:
            gap = float(rng.uniform(0.05, 0.25) if where == "front" else rng.uniform(0.3, 0.5))
            along, across = box.hx + hx + gap, float(rng.uniform(-0.2, 0.2)) * box.hy
            yaw = box.yaw + (math.pi if where == "front" else 0.0)
        x, y = box.x + c * along - s * across, box.y + s * along + c * across
        if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, model.size[2] * scale[2]), 0.02):
            self.add(model, scale, (x, y, 0.0), yaw, FLOOR)

    def on_top(self, kind: str, support: Item | None = None) -> Item | None:
        """A small thing on a free place of some surface; what is too large for that stands on the floor or hangs."""
        rng = self.rng
        model, scale = self.draw(kind)
        hx, hy, height = (model.size[k] * scale[k] for k in range(3))
        hx, hy = hx / 2, hy / 2
        if model.elevation > 0.5:
            return self.hanging(model, scale)
        if (kind == "plant" and height > 0.6) or (kind == "lamp" and height > 1.0):
            return self.standing_model(model, scale)
        carriers = [support] if support else [i for i in self.items if i.model.surface and i.high[2] < 1.5]
        if not carriers:
            return None
        for _ in range(8):
            carrier = carriers[int(rng.integers(len(carriers)))]
            surface = carrier.model.surface
            assert surface is not None
            # The surface in the carrier's frame, scaled like the carrier, less half the thing's diagonal.
            turn = float(rng.normal(0, 0.25)) if kind in _FACING else float(rng.uniform(-math.pi, math.pi))
            c, s = abs(math.cos(turn)), abs(math.sin(turn))
            mx, my = hx * c + hy * s + 0.01, hx * s + hy * c + 0.01
            x0, x1 = surface.x0 * carrier.scale[0] + mx, surface.x1 * carrier.scale[0] - mx
            y0, y1 = surface.y0 * carrier.scale[1] + my, surface.y1 * carrier.scale[1] - my
            if x0 > x1 or y0 > y1:
                continue
            along, across = float(rng.uniform(x0, x1)), float(rng.uniform(y0, y1))
            c, s = math.cos(carrier.yaw), math.sin(carrier.yaw)
            x, y = carrier.position[0] + c * along - s * across, carrier.position[1] + s * along + c * across
            z = carrier.position[2] + surface.height * carrier.scale[2]
            box = Footprint(x, y, hx, hy, carrier.yaw + turn, z, z + height)
            others = [i.footprint for i in self.items if i is not carrier]
            if box.z1 < self.size[2] - 0.05 and not any(box.overlaps(other, 0.03) for other in others):
                return self.add(model, scale, (x, y, z), carrier.yaw + turn, carrier.instance)
        return None

    def standing_model(self, model: Model, scale: tuple[float, float, float]) -> Item | None:
        rng = self.rng
        hx, hy = model.size[0] * scale[0] / 2, model.size[1] * scale[1] / 2
        for _ in range(25):
            yaw = float(rng.uniform(-math.pi, math.pi))
            x = float(rng.uniform(-1, 1) * (self.size[0] / 2 - min(hx, hy)))
            y = float(rng.uniform(-1, 1) * (self.size[1] / 2 - min(hx, hy)))
            if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, model.size[2] * scale[2]), 0.08):
                return self.add(model, scale, (x, y, 0.0), yaw, FLOOR)
        return None

    def hanging(self, model: Model, scale: tuple[float, float, float]) -> Item | None:
        """A piece on a wall at its usual height."""
        hx, hy, height = model.size[0] * scale[0] / 2, model.size[1] * scale[1] / 2, model.size[2] * scale[2]
        for _ in range(12):
            x, y, yaw = self.at_wall(hx, hy)
            base = model.elevation + float(self.rng.uniform(-0.05, 0.2))
            if self.fits(Footprint(x, y, hx, hy, yaw, base, base + height)):
                return self.add(model, scale, (x, y, base), yaw, WALL)
        return None
