# SPDX-License-Identifier: Apache-2.0
"""How a room is filled: pieces along the walls and in the middle, what belongs together, small things on top."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from adatoken3d_ros.lab.synthetic.furniture import COLOURS, KINDS, Model, models_of
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM, FLOOR, WALL, Footprint, Item, extent, placed, to_rgb

MAX_ITEMS = 16
TALL = 1.3  # what is taller keeps away from the room's centre, where a camera passes
_CROWD = (1, 2, 3, 5, 6, 7, 7, 8, 8, 8, 8)  # of a kind, in crowded rooms
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


class Layout:
    """Fills one room, item by item; whatever does not fit is left out.

    Args:
        held_out: with the models that training never sees. crowded: with more things, many of them on others.
    """

    def __init__(self, rng: np.random.Generator, *, held_out: bool, crowded: bool = False) -> None:
        self.rng = rng
        self.held_out = held_out
        self.crowded = crowded
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
        target = int(rng.integers(*((14, 2 * MAX_ITEMS) if self.crowded else (7, MAX_ITEMS + 1))))
        on_others = 0.65 if self.crowded else 0.4
        if rng.random() < 0.8:
            self.opening("door")
        for _ in range(int(rng.choice([0, 0, 1, 1, 2]))):
            self.opening("window")
        self.group(self.pick(_SUPPORTS), target)
        for _ in range(60):
            if len(self.items) >= target:
                break
            draw = rng.random()
            if draw < on_others:
                self.repeat(self.on_top, self.pick(self.top_kinds), target)
            elif draw < on_others + 0.15:
                self.group(self.pick(_SUPPORTS), target)
            else:
                self.group(self.pick(self.floor_kinds), target)

    def pick(self, kinds: Sequence[str]) -> str:
        available = [k for k in kinds if _models(k, self.held_out)]
        return available[int(self.rng.integers(len(available)))]

    def repeat(self, place: Callable[[str], Item | None], kind: str, target: int) -> None:
        """Place one of a kind, sometimes several, so that counting is not always one."""
        if not self.crowded:
            for _ in range(int(self.rng.choice([1, 1, 1, 2, 3, 4]))):
                if len(self.items) < target:
                    place(kind)
            return
        copies = int(self.rng.choice(_CROWD))
        for _ in range(3 * copies):  # what finds no place is tried again elsewhere, or high numbers hardly come about
            if len(self.items) < target and copies and place(kind) is not None:
                copies -= 1

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
            rgb = to_rgb(np.array(COLOURS[colour]) * rng.uniform(0.94, 1.06) + rng.uniform(-5, 5, 3))
        item = placed(FIRST_ITEM + len(self.items), model, colour, rgb, position, yaw, scale, supported_by)
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

    def standing(self, kind: str) -> Item | None:
        """One piece on the floor (or hung on a wall), where its kind belongs."""
        rng = self.rng
        model, scale = self.draw(kind)
        hx, hy, height = extent(model, scale)
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
                return self.add(model, scale, (x, y, base), yaw, FLOOR if base == 0 else WALL)
        return None

    def at_wall(self, hx: float, hy: float) -> tuple[float, float, float]:
        """(x, y, yaw) with the back to a random wall."""
        rng = self.rng
        side = int(rng.integers(4))
        yaw = side * math.pi / 2  # the wall's inward normal
        depth, width = (self.size[0], self.size[1]) if side % 2 == 0 else (self.size[1], self.size[0])
        back = depth / 2 - hx - float(rng.uniform(0.01, 0.05))
        along = float(rng.uniform(-1, 1)) * max(width / 2 - hy - 0.02, 0.0)
        if rng.random() < 0.3:  # into a corner
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
        hx, hy, height = extent(model, scale)
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
            if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, height), 0.01):
                item = self.add(model, scale, (x, y, 0.0), yaw, FLOOR, first if alike else None)
                first = first or item

    def beside(self, item: Item, kind: str, where: Literal["front", "before", "side"]) -> None:
        """A chair in front of a desk, a coffee table before a sofa, a nightstand beside a bed's head."""
        rng = self.rng
        if not _models(kind, self.held_out):
            return
        model, scale = self.draw(kind)
        hx, hy, height = extent(model, scale)
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
        if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, height), 0.02):
            self.add(model, scale, (x, y, 0.0), yaw, FLOOR)

    def on_top(self, kind: str, support: Item | None = None) -> Item | None:
        """A small thing on a free place of some surface; what is too large for that stands on the floor or hangs."""
        rng = self.rng
        model, scale = self.draw(kind)
        hx, hy, height = extent(model, scale)
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
        hx, hy, height = extent(model, scale)
        for _ in range(25):
            yaw = float(rng.uniform(-math.pi, math.pi))
            x = float(rng.uniform(-1, 1) * (self.size[0] / 2 - min(hx, hy)))
            y = float(rng.uniform(-1, 1) * (self.size[1] / 2 - min(hx, hy)))
            if self.fits(Footprint(x, y, hx, hy, yaw, 0.0, height), 0.08):
                return self.add(model, scale, (x, y, 0.0), yaw, FLOOR)
        return None

    def hanging(self, model: Model, scale: tuple[float, float, float]) -> Item | None:
        """A piece on a wall at its usual height."""
        hx, hy, height = extent(model, scale)
        for _ in range(12):
            x, y, yaw = self.at_wall(hx, hy)
            base = model.elevation + float(self.rng.uniform(-0.05, 0.2))
            if self.fits(Footprint(x, y, hx, hy, yaw, base, base + height)):
                return self.add(model, scale, (x, y, base), yaw, WALL)
        return None
