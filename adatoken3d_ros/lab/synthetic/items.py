# SPDX-License-Identifier: Apache-2.0
"""A piece of furniture where it stands: its pose, box and footprint in the room's frame.

World frame: metres, z up, the floor at z = 0, the origin at the floor's centre.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furniture import COLOURS, Model

# Values of the instance image; items count upwards from FIRST_ITEM.
FLOOR, WALL, CEILING, FIRST_ITEM = 0, 1, 2, 3


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
        hx, hy, _ = extent(self.model, self.scale)
        return Footprint(self.position[0], self.position[1], hx, hy, self.yaw, self.low[2], self.high[2])


def placed(
    instance: int,
    model: Model,
    colour: str | None,
    rgb: tuple[int, int, int] | None,
    position: tuple[float, float, float],
    yaw: float,
    scale: tuple[float, float, float],
    supported_by: int,
) -> Item:
    """A model where it stands; `rgb` is the shade of the named colour, None for the name's own."""
    vertices = _to_world(model, position, yaw, scale)
    palette = model.palette if colour is None else model.tinted(rgb or COLOURS[colour])
    looks = model.look(palette) if colour is None else frozenset({colour})
    low, high = vertices.min(axis=0).tolist(), vertices.max(axis=0).tolist()
    return Item(
        instance, model.kind, model, colour, looks, palette, position, yaw, scale, supported_by, tuple(low), tuple(high)
    )


def extent(model: Model, scale: tuple[float, float, float]) -> tuple[float, float, float]:
    """Half its depth, half its width and its height, metres."""
    return model.size[0] * scale[0] / 2, model.size[1] * scale[1] / 2, model.size[2] * scale[2]


def _to_world(
    model: Model, position: tuple[float, float, float], yaw: float, scale: tuple[float, float, float]
) -> NDArray[np.float32]:
    c, s = math.cos(yaw), math.sin(yaw)
    rotation = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return ((model.vertices * np.array(scale)) @ rotation.T + np.array(position)).astype(np.float32)


def to_rgb(colour: NDArray[np.float64]) -> tuple[int, int, int]:
    """A colour (3,) rounded and cut to what a pixel can hold."""
    r, g, b = np.clip(np.rint(colour), 0, 255).astype(int).tolist()
    return r, g, b
