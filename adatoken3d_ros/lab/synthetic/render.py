# SPDX-License-Identifier: Apache-2.0
"""What a pinhole RGB-D camera sees of a furnished room, by ray casting: colour, exact depth, instances."""

from __future__ import annotations

import math

import numpy as np
import open3d as o3d
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.camera import pixel_rays
from adatoken3d_ros.lab.synthetic.furnished import FurnishedRoom
from adatoken3d_ros.lab.synthetic.items import CEILING, FLOOR, WALL
from adatoken3d_ros.lab.synthetic.texture import Style, factors

_SUN = np.array([0.5, 0.3, 0.81], np.float32)


class Renderer:
    """Renders one furnished room; making it builds the bounding volumes once.

    Matte surfaces (Lambert) under a lamp below the ceiling that casts shadows, weak light from one side and an ambient
    part that is stronger from above.

    Args:
        styles: of the textures that surfaces get, see `texture`; none: all are plain.
    """

    def __init__(self, room: FurnishedRoom, styles: tuple[Style, ...] = ()) -> None:
        self.room, self._styles = room, styles
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
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.int16]]:
        """What each pixel sees, see `camera.pixel_rays` for where it looks.

        Args:
            K: (3, 3). T_world_camera: (4, 4), optical frame (x right, y down, z forward) to the room's frame.

        Returns:
            Colour (height, width, 3) uint8, depth (height, width) float32 in metres along the optical axis, and the
            instance (height, width) int16; NaN and -1 where nothing is hit.

        Raises:
            ValueError: for a size below one pixel.
        """
        rays, hits = self._cast(K, width, height, T_world_camera)
        depth = hits["t_hit"].numpy()
        missed = np.isinf(depth)
        face, ids = self._hit(hits, missed)
        distance = np.where(missed, np.float32(0), depth)
        points: NDArray[np.float32] = rays[..., :3] + distance[..., None].astype(np.float32) * rays[..., 3:]
        albedo = self._colours[face]
        self._paint_floor(albedo, points, ids == FLOOR)
        self._paint_walls(albedo, points, ids == WALL)
        if self._styles:
            rng = np.random.default_rng([self.room.seed, 3])  # the same for each view
            albedo *= factors(points.reshape(-1, 3), ids.ravel(), rng, self._styles).reshape(albedo.shape)
        light = self._shade(rays, hits, points, face, missed)
        rgb = np.clip(np.rint(albedo * light), 0, 255).astype(np.uint8)
        return rgb, np.where(missed, np.float32(np.nan), depth), ids

    def distance(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """(N,) metres from points (N, 3) of the room's frame to the nearest surface of the room or what is in it."""
        return self._scene.compute_distance(
            o3d.core.Tensor.from_numpy(np.ascontiguousarray(points, np.float32))
        ).numpy()

    def instances(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> NDArray[np.int16]:
        """The instance of each pixel alone, (height, width) int16: cheap, for choosing views."""
        _, hits = self._cast(K, width, height, T_world_camera)
        return self._hit(hits, np.isinf(hits["t_hit"].numpy()))[1]

    def _cast(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.float32], dict[str, o3d.core.Tensor]]:
        rays = pixel_rays(K, width, height, T_world_camera)
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
