# SPDX-License-Identifier: Apache-2.0
"""Views of a furnished room: where a camera goes, what its sensor makes of what is there, what the views show."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.camera import HEIGHT, WIDTH, intrinsics, look_at
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.items import FIRST_ITEM
from adatoken3d_ros.lab.synthetic.layout import TALL
from adatoken3d_ros.lab.synthetic.render import Renderer
from adatoken3d_ros.scene.frames import PosedFrame

_ORBIT_PERIOD = 40.0  # seconds
_POINTS = 64  # kept of each item's visible surface


@dataclass(frozen=True, eq=False)
class View:
    """A posed RGB-D frame with the instance of each pixel: ids (H, W) int16, see `items` for the values."""

    frame: PosedFrame
    ids: NDArray[np.int16]


@dataclass(frozen=True, eq=False)
class Sight:
    """How well some views show an item.

    Attributes:
        pixels: in the view that shows most of it, as if that were 320x240.
        low, high: (3,) float64 box of what was seen of it, world frame.
        points: (n, 3) float32 of its visible surface, world frame.
    """

    pixels: int
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    points: NDArray[np.float32]


def orbit(room: FurnishedRoom, t: float) -> NDArray[np.float64]:
    """Pose (4, 4) at time t (seconds) of a camera that circles in the room and looks across it, smooth and periodic.

    It flies at the height of the eyes and keeps off everything that is tall.
    """
    phase = 2 * math.pi * t / _ORBIT_PERIOD
    radius = float(np.interp(phase % (2 * math.pi), *_free_radius(room)))
    a, b = 0.36 * room.size[0] * radius, 0.36 * room.size[1] * radius
    eye = np.array([a * math.cos(phase), b * math.sin(phase), 1.55 + 0.1 * math.sin(3 * phase)])
    aim = phase + math.pi + 0.5 * math.sin(2 * phase)
    target = np.array([0.25 * room.size[0] * math.cos(aim), 0.25 * room.size[1] * math.sin(aim), 0.55])
    return look_at(eye, target)


@functools.lru_cache(maxsize=16)
def _free_radius(room: FurnishedRoom) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Phases (0..2 pi) and how much of the full ellipse is free of tall items there, smooth and periodic."""
    steps = 144
    phases = np.arange(steps) * 2 * math.pi / steps
    tall = [i.footprint for i in room.items if i.high[2] > TALL]
    free = np.ones(steps)
    for k, phase in enumerate(phases):
        for share in np.linspace(0.1, 1.0, 10):
            x, y = 0.36 * room.size[0] * share * math.cos(phase), 0.36 * room.size[1] * share * math.sin(phase)
            if any(box.distance(x, y) < 0.3 for box in tall):
                free[k] = share - 0.1
                break
    # The least within 30 degrees, then the mean over 30 degrees, which is never more than what is free at its middle.
    reach = steps // 24
    least = np.min([np.roll(free, s) for s in range(-2 * reach, 2 * reach + 1)], axis=0)
    smooth = np.mean([np.roll(least, s) for s in range(-2 * reach, 2 * reach + 1)], axis=0)
    return np.append(phases, 2 * math.pi), np.append(smooth, smooth[0])


def choose_views(
    renderer: Renderer, rng: np.random.Generator, count: int = 8, heights: tuple[float, float] = (1.0, 1.7)
) -> list[NDArray[np.float64]]:
    """Poses (4, 4) of `count` cameras at such heights, metres, that together show as many items as well as they can.

    Many candidates that look at things are rendered small; the best is taken again and again, where what has been shown
    already counts less.
    """
    room = renderer.room
    K = intrinsics(40, 30)
    poses: list[NDArray[np.float64]] = []
    gains: list[NDArray[np.float64]] = []
    for _ in range(400):
        pose = _candidate(room, rng, heights)
        if pose is None:
            continue
        ids = renderer.instances(K, 40, 30, pose)
        pixels = np.bincount(ids[ids >= 0].astype(np.int64), minlength=FIRST_ITEM + len(room.items)).astype(np.float64)
        if pixels.max() > 0.6 * ids.size and int(pixels.argmax()) >= FIRST_ITEM:
            continue  # one item fills the picture
        poses.append(pose)
        gains.append(pixels / ids.size)
        if len(poses) == 5 * count:
            break
    if not poses:
        raise ValueError(f"room {room.seed} ({room.split}) has no place for a camera")
    share = np.stack(gains)
    chosen: list[int] = []
    shown = np.zeros(share.shape[1])
    while len(chosen) < count:
        # Saturates at about 1 % of an image; floor and walls count a little, for the room's shape.
        value = 1 - np.exp(-(shown + share) / 0.01)
        score = value[:, FIRST_ITEM:].sum(axis=1) + 0.3 * (1 - np.exp(-(shown + share)[:, :FIRST_ITEM] / 0.5)).sum(
            axis=1
        )
        score += 0.15 * (share[:, FIRST_ITEM:] > 0.002).sum(axis=1)
        score[[c for c in chosen]] = -np.inf if len(chosen) < len(poses) else 0
        best = int(score.argmax())
        chosen.append(best)
        shown += share[best]
    return [poses[c] for c in chosen]


def _candidate(
    room: FurnishedRoom, rng: np.random.Generator, heights: tuple[float, float]
) -> NDArray[np.float64] | None:
    """A random camera in free space that looks at an item or across the room."""
    eye = np.array(
        [
            rng.uniform(-1, 1) * (room.size[0] / 2 - 0.3),
            rng.uniform(-1, 1) * (room.size[1] / 2 - 0.3),
            rng.uniform(*heights),
        ]
    )
    if any(i.high[2] > eye[2] - 0.3 and i.footprint.distance(eye[0], eye[1]) < 0.3 for i in room.items):
        return None
    if room.items and rng.random() < 0.8:
        target = room.items[int(rng.integers(len(room.items)))].centre + rng.normal(0, 0.15, 3)
    else:
        target = np.array([*(rng.uniform(-0.2, 0.2, 2) * room.size[:2]), 0.6])
    if not 0.7 < float(np.linalg.norm((target - eye)[:2])) < 4.5:
        return None
    return look_at(eye, target)


def render_views(
    room: FurnishedRoom,
    *,
    seed: int = 0,
    count: int = 8,
    width: int = WIDTH,
    height: int = HEIGHT,
    noise: bool = False,
    renderer: Renderer | None = None,
) -> list[View]:
    """`count` posed views of the room, chosen for coverage; the same arguments give the same bytes.

    Args:
        noise: depth as a sensor gives it (see `noisy_depth`), a little noise and exposure in the colours.
    """
    renderer = renderer or Renderer(room)
    rng = np.random.default_rng([seed, room.seed, len(room.split)])
    K = intrinsics(width, height)
    views = []
    for k, T in enumerate(choose_views(renderer, rng, count)):
        rgb, depth, ids = renderer.render(K, width, height, T)
        if noise:
            depth = noisy_depth(depth, rng)
            rgb = noisy_colour(rgb, rng)
        views.append(View(PosedFrame(rgb, depth, K, T, stamp_ns=k * 100_000_000), ids))
    return views


def noisy_depth(
    depth: NDArray[np.float32], rng: np.random.Generator, max_range: float = 8.0, dropout: float = 0.6
) -> NDArray[np.float32]:
    """Depth (H, W), metres, as a structured-light camera measures it.

    Axial noise of 1.2 mm + 1.9 mm/m^2 (z - 0.4 m)^2 (Nguyen, Izadi, Lovell 2012), rounded to millimetres; pixels at
    depth edges are lost with probability `dropout`, others rarely; nothing is measured beyond `max_range`.
    """
    height, width = depth.shape
    deviation = 0.0012 + 0.0019 * (np.nan_to_num(depth) - 0.4) ** 2
    noisy = depth + rng.standard_normal(depth.shape, dtype=np.float32) * deviation
    measured = (np.rint(noisy * 1000) / 1000).astype(np.float32)
    edge = np.zeros((height, width), bool)
    for axis in (0, 1):
        jump = np.abs(np.diff(depth, axis=axis)) > 0.03 + 0.03 * np.minimum(
            np.take(depth, range(depth.shape[axis] - 1), axis), np.take(depth, range(1, depth.shape[axis]), axis)
        )
        if axis == 0:
            edge[1:] |= jump
            edge[:-1] |= jump
        else:
            edge[:, 1:] |= jump
            edge[:, :-1] |= jump
    chance = np.where(edge, dropout, 0.002)
    lost = (rng.random(depth.shape, dtype=np.float32) < chance) | ~(measured <= max_range) | (measured <= 0.1)
    return np.where(lost, np.float32(np.nan), measured)


def noisy_colour(rgb: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Colours (H, W, 3) with an exposure off by up to 8 % and noise of two levels."""
    noisy = rgb * rng.uniform(0.92, 1.08) + rng.standard_normal(rgb.shape, dtype=np.float32) * 2
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def sights(views: Sequence[View], rng: np.random.Generator) -> Mapping[int, Sight]:
    """What the views together show of each item, by instance; items that no view shows are missing."""
    pixels: dict[int, int] = {}
    found: dict[int, list[NDArray[np.float32]]] = {}
    for view in views:
        depth, K, T = view.frame.depth, view.frame.K, view.frame.T_world_camera
        scale = WIDTH * HEIGHT / view.ids.size
        order = np.argsort(view.ids.ravel(), kind="stable")
        values, starts = np.unique(view.ids.ravel()[order], return_index=True)
        for value, index in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
            if value < FIRST_ITEM:
                continue
            index = index[np.isfinite(depth.ravel()[index])]
            if not len(index):
                continue
            pixels[value] = max(pixels.get(value, 0), round(len(index) * scale))
            v, u = np.divmod(index, view.ids.shape[1])
            camera = np.linalg.inv(K) @ np.stack([u, v, np.ones(len(index))]) * depth.ravel()[index]
            world = T[:3, :3] @ camera + T[:3, 3:]
            found.setdefault(value, []).append(world.T.astype(np.float32))
    result: dict[int, Sight] = {}
    for instance in sorted(found):
        points = np.concatenate(found[instance])
        chosen = np.sort(rng.choice(len(points), min(_POINTS, len(points)), replace=False))
        result[instance] = Sight(
            pixels[instance],
            points.min(axis=0).astype(np.float64),
            points.max(axis=0).astype(np.float64),
            points[chosen],
        )
    return result
