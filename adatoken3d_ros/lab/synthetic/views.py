# SPDX-License-Identifier: Apache-2.0
"""What an RGB-D camera sees of a furnished room: colour, depth with a sensor's noise, instances; good viewpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import open3d as o3d
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.furnished import CEILING, FIRST_ITEM, FLOOR, TALL, WALL, FurnishedRoom
from adatoken3d_ros.lab.synthetic.render import look_at
from adatoken3d_ros.scene.frames import PosedFrame

WIDTH, HEIGHT = 320, 240
FIELD_OF_VIEW = 69.0  # degrees across, as a RealSense colour camera or a phone sees
_ORBIT_PERIOD = 40.0  # seconds
_SUN = np.array([0.5, 0.3, 0.81], np.float32)
_POINTS = 64  # kept of each item's visible surface


@dataclass(frozen=True, eq=False)
class View:
    """A posed RGB-D frame with the instance of each pixel: ids (H, W) int16, see `furnished` for the values."""

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


def intrinsics(width: int = WIDTH, height: int = HEIGHT, field_of_view: float = FIELD_OF_VIEW) -> NDArray[np.float64]:
    """K (3, 3) of an ideal camera with this horizontal field of view, degrees."""
    focal = width / 2 / math.tan(math.radians(field_of_view) / 2)
    return np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


class Renderer:
    """Renders one furnished room; making it builds the bounding volumes once.

    Matte surfaces (Lambert) under a lamp below the ceiling that casts shadows, weak light from one side and an ambient
    part that is stronger from above.
    """

    def __init__(self, room: FurnishedRoom) -> None:
        self.room = room
        self._scene = o3d.t.geometry.RaycastingScene()
        x, y, z = room.size[0] / 2, room.size[1] / 2, room.size[2]
        base = [(-x, -y), (x, -y), (x, y), (-x, y)]
        quads = [[(a, b, 0.0) for a, b in base], [(a, b, z) for a, b in base]]
        instances = [FLOOR, CEILING]
        for (ax, ay), (bx, by) in zip(base, base[1:] + base[:1], strict=True):
            quads.append([(ax, ay, 0.0), (bx, by, 0.0), (bx, by, z), (ax, ay, z)])
            instances.append(WALL)
        inward = np.array([(0, 0, 1), (0, 0, -1), (0, 1, 0), (-1, 0, 0), (0, -1, 0), (1, 0, 0)], np.float32)
        fill = {FLOOR: room.floor.colours[0], CEILING: room.ceiling_colour, WALL: room.wall_colour}
        colours, normals, offsets = [], [], []
        at = 0
        for quad, instance, normal in zip(quads, instances, inward, strict=True):
            self._add(np.array(quad, np.float32), np.array([[0, 1, 2], [0, 2, 3]], np.uint32))
            colours.append(np.tile(np.array(fill[instance], np.float32), (2, 1)))
            normals.append(np.tile(normal, (2, 3, 1)))
            offsets.append(at)
            at += 2
        for item in room.items:
            self._add(item.vertices, item.model.faces)
            colours.append(item.palette[item.model.colour].astype(np.float32))
            c, s = math.cos(item.yaw), math.sin(item.yaw)
            turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) / np.array(item.scale)[None]
            normals.append(item.model.corner_normals @ turn.T.astype(np.float32))
            offsets.append(at)
            at += len(item.model.faces)
            instances.append(item.instance)
        # One row more, for rays that hit nothing.
        self._colours = np.concatenate([*colours, np.array([room.wall_colour], np.float32)])
        self._normals = np.concatenate([*normals, np.zeros((1, 3, 3), np.float32)])
        self._offsets = np.array(offsets, np.int64)
        self._instances = np.array(instances, np.int16)

    def _add(self, vertices: NDArray[np.float32], faces: NDArray[np.uint32]) -> None:
        self._scene.add_triangles(o3d.core.Tensor.from_numpy(vertices), o3d.core.Tensor.from_numpy(faces))

    def render(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Colour (height, width, 3) uint8 and depth (height, width) float32, metres along the optical axis.

        Pixel (u, v) sees along K^-1 (u, v, 1): pixel centres have integer coordinates. Where nothing is hit, depth
        is NaN.

        Args:
            K: (3, 3). T_world_camera: (4, 4), optical frame (x right, y down, z forward) to the room's frame.

        Raises:
            ValueError: for a size below one pixel.
        """
        rgb, depth, _ = self.render_ids(K, width, height, T_world_camera)
        return rgb, depth

    def distance(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N,) metres from points (N, 3) of the room's frame to the nearest surface of the room or what is in it."""
        return self._scene.compute_distance(
            o3d.core.Tensor.from_numpy(np.ascontiguousarray(points, np.float32))
        ).numpy()

    def render_ids(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int16]]:
        """As `render`, and the instance of each pixel, (height, width) int16, -1 where nothing is hit."""
        rays, hits = self._cast(K, width, height, T_world_camera)
        depth = hits["t_hit"].numpy()
        missed = np.isinf(depth)
        face, ids = self._hit(hits, missed)
        distance = np.where(missed, np.float32(0), depth)
        points: NDArray[np.float32] = rays[..., :3] + distance[..., None].astype(np.float32) * rays[..., 3:]
        albedo = self._colours[face]
        self._paint_floor(albedo, points, ids == FLOOR)
        self._paint_walls(albedo, points, ids == WALL)
        light = self._shade(rays, hits, points, face, missed)
        rgb = np.clip(np.rint(albedo * light), 0, 255).astype(np.uint8)
        return rgb, np.where(missed, np.float32(np.nan), depth), ids

    def instances(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> NDArray[np.int16]:
        """The instance of each pixel alone, (height, width) int16: cheap, for choosing views."""
        _, hits = self._cast(K, width, height, T_world_camera)
        return self._hit(hits, np.isinf(hits["t_hit"].numpy()))[1]

    def _cast(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], dict[str, o3d.core.Tensor]]:
        if width < 1 or height < 1:
            raise ValueError(f"cannot render {width}x{height} pixels")
        u, v = np.arange(width)[None, :], np.arange(height)[:, None]
        # z = 1 in the camera frame: the ray parameter of the hit is the depth along the optical axis.
        directions = np.asarray(T_world_camera, dtype=np.float64)[:3, :3] @ np.linalg.inv(K)
        rays = np.empty((height, width, 6), dtype=np.float32)
        for axis in range(3):
            rays[..., axis] = T_world_camera[axis, 3]
            rays[..., 3 + axis] = directions[axis, 0] * u + (directions[axis, 1] * v + directions[axis, 2])
        return rays, self._scene.cast_rays(o3d.core.Tensor.from_numpy(rays))

    def _hit(
        self, hits: dict[str, o3d.core.Tensor], missed: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.int16]]:
        """The row of `_colours` and `_normals`, and the instance, of each pixel."""
        geometry = hits["geometry_ids"].numpy().astype(np.int64)
        geometry[missed] = 0
        face = self._offsets[geometry] + hits["primitive_ids"].numpy()
        face[missed] = len(self._colours) - 1
        return face, np.where(missed, np.int16(-1), self._instances[geometry])

    def _shade(
        self,
        rays: NDArray[np.float32],
        hits: dict[str, o3d.core.Tensor],
        points: NDArray[np.float32],
        face: NDArray[np.int64],
        missed: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """(H, W, 3) factors of the surfaces' colours."""
        light = self.room.light
        shape = missed.shape
        flat = np.ascontiguousarray(face).ravel()
        uv = hits["primitive_uvs"].numpy().reshape(-1, 2)
        corner = self._normals.reshape(len(self._normals), 9)[flat]
        u, v = uv[:, :1], uv[:, 1:]
        normal = corner[:, :3] * (1 - u - v)
        normal += corner[:, 3:6] * u
        normal += corner[:, 6:] * v
        # Models have their faces either way round: light the side that is seen.
        ray = rays.reshape(-1, 6)
        away = _dot(normal, ray[:, 3:]) > 0
        scale = np.where(away, np.float32(-1), np.float32(1)) / np.maximum(np.sqrt(_dot(normal, normal)), 1e-9)
        normal *= scale[:, None]
        to_lamp = np.array(light.position, np.float32) - points.reshape(-1, 3)
        distance = np.sqrt(_dot(to_lamp, to_lamp))
        lambert = np.maximum(_dot(normal, to_lamp) / np.maximum(distance, 1e-6), 0)
        # Shadow rays start off the surface and end before the lamp; what looks away from it needs none.
        lit = np.flatnonzero(lambert > 0)
        shadow = np.empty((len(lit), 6), np.float32)
        shadow[:, :3] = points.reshape(-1, 3)[lit] + np.float32(0.004) * normal[lit]
        shadow[:, 3:] = to_lamp[lit]
        blocked = self._scene.test_occlusions(o3d.core.Tensor.from_numpy(shadow), tnear=0.0, tfar=0.98).numpy()
        lambert[lit[blocked]] *= np.float32(0.15)
        lamp = lambert / (1 + (distance / np.float32(4.5)) ** 2)
        total = np.float32(light.ambient) * (np.float32(0.86) + np.float32(0.14) * normal[:, 2])
        total += np.float32(0.62) * lamp
        total += np.float32(0.12) * np.maximum(normal @ _SUN, 0)
        total[missed.ravel()] = 1
        return total.reshape(*shape, 1) * np.array(light.colour, np.float32)

    def _paint_floor(self, albedo: NDArray[np.float32], points: NDArray[np.float32], where: NDArray[np.bool_]) -> None:
        floor = self.room.floor
        if floor.pattern == "plain":
            return
        first, second = (np.array(c, np.float32) for c in floor.colours)
        x, y = points[where, 0] / floor.unit, points[where, 1] / floor.unit
        if floor.pattern == "planks":
            row = np.floor(y)
            tone = (np.sin(row * 12.9898 + np.floor(x / 7 + row * 0.37) * 78.233) * 43758.547) % 1
            seam = (y - row) < 0.04
            colour = first * (1 - tone)[:, None] + second * tone[:, None]
        else:
            odd = (np.floor(x) + np.floor(y)) % 2
            seam = ((x - np.floor(x)) < 0.02) | ((y - np.floor(y)) < 0.02)
            colour = np.where((odd == 1)[:, None] & (floor.pattern == "checks"), second, first)
        albedo[where] = np.where(seam[:, None], 0.7 * second, colour)

    def _paint_walls(self, albedo: NDArray[np.float32], points: NDArray[np.float32], where: NDArray[np.bool_]) -> None:
        """A skirting board."""
        board = where & (points[..., 2] < 0.08)
        albedo[board] = np.array(self.room.ceiling_colour, np.float32) * 0.93


def _dot(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """(N,) products of the rows (N, 3): much faster than einsum on so short an axis."""
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]


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


def choose_views(renderer: Renderer, rng: np.random.Generator, count: int = 8) -> list[NDArray[np.float64]]:
    """Poses (4, 4) of `count` cameras at 1 to 1.7 m that together show as many items as well as they can.

    Many candidates that look at things are rendered small; the best is taken again and again, where what has been shown
    already counts less.
    """
    room = renderer.room
    K = intrinsics(40, 30)
    poses: list[NDArray[np.float64]] = []
    gains: list[NDArray[np.float64]] = []
    for _ in range(400):
        pose = _candidate(room, rng)
        if pose is None:
            continue
        ids = renderer.instances(K, 40, 30, pose)
        pixels = np.bincount(ids[ids >= 0].astype(np.int64), minlength=FIRST_ITEM + len(room.items)).astype(np.float64)
        if pixels.max() > 0.6 * ids.size and int(pixels.argmax()) >= FIRST_ITEM:
            continue  # the nose against a wardrobe
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


def _candidate(room: FurnishedRoom, rng: np.random.Generator) -> NDArray[np.float64] | None:
    """A random camera in free space that looks at an item or across the room."""
    eye = np.array(
        [
            rng.uniform(-1, 1) * (room.size[0] / 2 - 0.3),
            rng.uniform(-1, 1) * (room.size[1] / 2 - 0.3),
            rng.uniform(1.0, 1.7),
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
        rgb, depth, ids = renderer.render_ids(K, width, height, T)
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
