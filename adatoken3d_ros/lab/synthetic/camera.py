# SPDX-License-Identifier: Apache-2.0
"""An ideal pinhole camera: its intrinsics, its pose, and the ray of each pixel."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 320, 240
FIELD_OF_VIEW = 69.0  # degrees across, as a RealSense colour camera or a phone sees


def intrinsics(width: int = WIDTH, height: int = HEIGHT, field_of_view: float = FIELD_OF_VIEW) -> NDArray[np.float64]:
    """K (3, 3) of an ideal camera with this horizontal field of view, degrees."""
    focal = width / 2 / math.tan(math.radians(field_of_view) / 2)
    return np.array([[focal, 0.0, (width - 1) / 2], [0.0, focal, (height - 1) / 2], [0.0, 0.0, 1.0]])


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


def pixel_rays(
    K: NDArray[np.float64], width: int, height: int, T_world_camera: NDArray[np.float64]
) -> NDArray[np.float32]:
    """(height, width, 6) origin and direction of each pixel's ray in the world.

    Pixel (u, v) sees along K^-1 (u, v, 1): pixel centres have integer coordinates, and the ray's parameter is the depth
    along the optical axis.

    Raises:
        ValueError: for a size below one pixel.
    """
    if width < 1 or height < 1:
        raise ValueError(f"cannot render {width}x{height} pixels")
    u, v = np.arange(width)[None, :], np.arange(height)[:, None]
    directions = np.asarray(T_world_camera, dtype=np.float64)[:3, :3] @ np.linalg.inv(K)
    rays = np.empty((height, width, 6), dtype=np.float32)
    for axis in range(3):
        rays[..., axis] = T_world_camera[axis, 3]
        rays[..., 3 + axis] = directions[axis, 0] * u + (directions[axis, 1] * v + directions[axis, 2])
    return rays
