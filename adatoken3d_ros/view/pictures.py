# SPDX-License-Identifier: Apache-2.0
"""Key frames as they are shown: a small picture, where it was taken from, the voxel that each of its patches is in."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame

SIDE = 320  # pixels of the longer side
QUALITY = 70  # of JPEG
_NO_VOXELS: NDArray[np.int64] = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Picture:
    """A key frame, small.

    Attributes:
        stamp_ns: acquisition time.
        rgb: (h, w, 3) uint8.
        pose: (4, 4) camera optical frame to the scene frame.
        fov: vertical field of view, radians.
        grid: rows and columns of the model's patches; (0, 0) where they are not known.
        area: left, top, right and bottom of the part of the picture that they cover, each from 0 to 1.
        voxel: (rows * columns,) int64 key of the voxel in which each patch lies, -1 for one without a place.
    """

    stamp_ns: int
    rgb: NDArray[np.uint8]
    pose: NDArray[np.float64]
    fov: float
    grid: tuple[int, int] = (0, 0)
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    voxel: NDArray[np.int64] = field(default_factory=lambda: _NO_VOXELS)

    @property
    def aspect(self) -> float:
        """Width over height."""
        return float(self.rgb.shape[1] / self.rgb.shape[0])

    def lit(self, voxels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers of the patches, row-major, that lie in one of these voxels, given by their keys."""
        found: NDArray[np.int64] = np.flatnonzero(np.isin(self.voxel, voxels) & (self.voxel >= 0))
        return found

    def jpeg(self) -> str:
        """The picture as a JPEG in base64."""
        buffer = io.BytesIO()
        Image.fromarray(self.rgb).save(buffer, "JPEG", quality=QUALITY, optimize=True)
        return base64.b64encode(buffer.getvalue()).decode("ascii")


def small(rgb: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.uint8]:
    """A picture (h, w, 3) whose longer side has at most so many pixels."""
    height, width = rgb.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))


def picture_of(frame: PosedFrame, scene: Scene) -> Picture:
    """A frame as a scene of this model sees it."""
    height, width = frame.depth.shape
    geometry, grid = scene.runtime.model.sizes.patches, scene.runtime.model.grid(height, width)
    area = (0.0, 0.0, 1.0, 1.0)
    if geometry.crop and grid == (geometry.rows, geometry.columns):
        cut = geometry.transform(width, height)
        left, top = cut.x0 / cut.resized_width, cut.y0 / cut.resized_height
        area = left, top, left + geometry.width / cut.resized_width, top + geometry.height / cut.resized_height
    points = scene.memory.patches(frame)
    voxel = np.full(len(points.valid), -1, np.int64)
    voxel[points.valid] = scene.memory.voxels(points.xyz[points.valid])
    fov = 2 * math.atan(height / 2 / float(frame.K[1, 1]))
    return Picture(frame.stamp_ns, small(frame.rgb), frame.T_world_camera, fov, grid, area, voxel)


class Pictures:
    """The pictures of a scene's key frames, as long as they are some. Used in the thread that owns the scene."""

    def __init__(self) -> None:
        self._by_stamp: dict[int, Picture] = {}

    def add(self, frame: PosedFrame, scene: Scene) -> None:
        """Keeps the picture of a frame that has become a view."""
        self._by_stamp[frame.stamp_ns] = picture_of(frame, scene)

    def of(self, stamps: Collection[int]) -> tuple[Picture, ...]:
        """Those of the views of these stamps, oldest first; all others are forgotten."""
        self._by_stamp = {stamp: one for stamp, one in sorted(self._by_stamp.items()) if stamp in stamps}
        return tuple(self._by_stamp.values())
