# SPDX-License-Identifier: Apache-2.0
"""What a pinhole RGB-D camera sees of a room, by ray casting."""

from __future__ import annotations

import math

import numpy as np
import open3d as o3d
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.rooms import MAX_OBJECT_HEIGHT, Room, Thing

_LIGHT = np.array([0.35, -0.25, 0.9], dtype=np.float32) / np.float32(np.linalg.norm([0.35, -0.25, 0.9]))
_AMBIENT = np.float32(0.45)
_ORBIT_PERIOD = 40.0  # seconds


class Renderer:
    """Renders one room; making it builds the scene's bounding volumes once.

    Surfaces are matte (Lambert) under one distant light with an ambient part and cast no shadow.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self._scene = o3d.t.geometry.RaycastingScene()
        colours: dict[int, tuple[int, int, int]] = {}
        self._floor = self._scene.add_triangles(*_quad(*_floor_corners(room)))
        for corners in _wall_corners(room):
            colours[self._scene.add_triangles(*_quad(*corners))] = room.wall_colour
        for thing in room.things:
            colours[self._scene.add_triangles(_mesh(thing))] = thing.colour
        # Colour of each geometry; the last row is what rays see that hit nothing.
        self._colours = np.array([colours.get(i, room.wall_colour) for i in range(max(colours) + 2)], dtype=np.float32)

    def render(
        self, K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Colour (height, width, 3) uint8 and depth (height, width) float32, metres along the optical axis.

        Pixel (u, v) sees along K^-1 (u, v, 1): pixel centres have integer coordinates. Depth is NaN and the colour that
        of the walls where nothing is hit.

        Args:
            K: (3, 3). T_world_camera: (4, 4), optical frame (x right, y down, z forward) to the room's frame.

        Raises:
            ValueError: for a size below one pixel.
        """
        if width < 1 or height < 1:
            raise ValueError(f"cannot render {width}x{height} pixels")
        u, v = np.arange(width)[None, :], np.arange(height)[:, None]
        # z = 1 in the camera frame: the ray parameter of the hit is the depth along the optical axis.
        directions = np.asarray(T_world_camera, dtype=np.float64)[:3, :3] @ np.linalg.inv(K)
        rays = np.empty((height, width, 6), dtype=np.float32)
        for axis in range(3):
            rays[..., axis] = T_world_camera[axis, 3]
            rays[..., 3 + axis] = directions[axis, 0] * u + (directions[axis, 1] * v + directions[axis, 2])
        hits = self._scene.cast_rays(o3d.core.Tensor.from_numpy(rays))
        depth = hits["t_hit"].numpy()
        missed = np.isinf(depth)

        geometry = hits["geometry_ids"].numpy().astype(np.int64)
        geometry[missed] = len(self._colours) - 1
        albedo = self._colours[geometry]
        on_floor = geometry == self._floor
        albedo[on_floor] = self._tiles(rays[on_floor, :2] + depth[on_floor, None] * rays[on_floor, 3:5])

        normals = hits["primitive_normals"].numpy()
        facing = np.einsum("hwc,hwc->hw", normals, rays[..., 3:]) < 0
        lambert = np.maximum(np.where(facing, 1, -1) * (normals @ _LIGHT), 0)
        shade = np.where(missed, np.float32(1.0), _AMBIENT + (1 - _AMBIENT) * lambert)
        rgb = np.rint(albedo * shade[..., None]).astype(np.uint8)
        return rgb, np.where(missed, np.float32(np.nan), depth)

    def _tiles(self, xy: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, 3) colours of points (n, 2) of the floor."""
        odd = np.floor(xy / self.room.tile).astype(np.int64).sum(axis=-1) % 2
        return np.array(self.room.floor_colours, dtype=np.float32)[odd]


def orbit(room: Room, t: float) -> NDArray[np.float64]:
    """Pose (4, 4) at time t (seconds) of a camera that circles in the room and looks across it, smooth and periodic.

    The camera stays between the walls and above everything that stands in the room.
    """
    phase = 2 * math.pi * t / _ORBIT_PERIOD
    a, b = 0.36 * room.size[0], 0.36 * room.size[1]
    eye = np.array([a * math.cos(phase), b * math.sin(phase), MAX_OBJECT_HEIGHT + 0.3 + 0.1 * math.sin(3 * phase)])
    aim = phase + math.pi + 0.5 * math.sin(2 * phase)
    target = np.array([0.5 * a * math.cos(aim), 0.5 * b * math.sin(aim), 0.45])
    return look_at(eye, target)


def look_at(eye: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pose (4, 4), optical frame to world, of a camera at `eye` that sees `target` in the centre and z upwards.

    Raises:
        ValueError: if the camera would look straight up or down, or has no direction.
    """
    forward = np.asarray(target, dtype=np.float64) - np.asarray(eye, dtype=np.float64)
    right = np.cross(forward, (0.0, 0.0, 1.0))
    if np.linalg.norm(right) < 1e-9:
        raise ValueError(f"a camera at {eye} that looks at {target} has no upward direction")
    forward /= np.linalg.norm(forward)
    right /= np.linalg.norm(right)
    T = np.eye(4)
    T[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    T[:3, 3] = eye
    return T


Corner = tuple[float, float, float]


def _floor_corners(room: Room) -> tuple[Corner, Corner, Corner, Corner]:
    x, y = room.size[0] / 2, room.size[1] / 2
    return (-x, -y, 0.0), (x, -y, 0.0), (x, y, 0.0), (-x, y, 0.0)


def _wall_corners(room: Room) -> list[tuple[Corner, Corner, Corner, Corner]]:
    base, height = _floor_corners(room), room.size[2]
    return [(a, b, (b[0], b[1], height), (a[0], a[1], height)) for a, b in zip(base, base[1:] + base[:1], strict=True)]


def _quad(*corners: Corner) -> tuple[o3d.core.Tensor, o3d.core.Tensor]:
    """Vertices (4, 3) float32 and triangles (2, 3) uint32."""
    triangles = np.array([[0, 1, 2], [0, 2, 3]], dtype=np.uint32)
    return o3d.core.Tensor.from_numpy(np.array(corners, dtype=np.float32)), o3d.core.Tensor.from_numpy(triangles)


def _mesh(thing: Thing) -> o3d.t.geometry.TriangleMesh:
    if thing.shape == "sphere":
        mesh = o3d.geometry.TriangleMesh.create_sphere(radius=thing.size[0] / 2, resolution=24)
        mesh.translate(thing.centre)
    else:
        mesh = o3d.geometry.TriangleMesh.create_box(*thing.size)
        mesh.translate(np.array(thing.centre) - np.array(thing.size) / 2)
    return o3d.t.geometry.TriangleMesh.from_legacy(mesh)
