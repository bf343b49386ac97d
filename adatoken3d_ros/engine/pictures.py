# SPDX-License-Identifier: Apache-2.0
"""Key frames as they are shown: a small picture, where it was taken from, and where each of its patches lies."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from adatoken3d_ros.engine.scene import Scene
    from adatoken3d_ros.scene.frames import PosedFrame

SIDE = 320  # pixels of the longer side
QUALITY = 70  # of JPEG
MOST_KEPT = 200  # newest key frames that have a picture: 5 MB
MOST_SHOWN = 40  # newest that are shown in the view
MOST_BYTES, MOST_PATCHES = 2**20, 2**16  # of a picture that comes from elsewhere
_NOWHERE: NDArray[np.float32] = np.zeros((0, 3), np.float32)
_BITS = 21  # of a voxel's index along an axis


class PictureError(ValueError):
    """A picture from elsewhere that cannot be shown; the message says why."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A key frame, small.

    Attributes:
        stamp_ns: acquisition time.
        jpeg: its longer side has at most SIDE pixels. size: width and height.
        pose: (4, 4) camera optical frame to the scene frame.
        fov: vertical field of view, radians.
        grid: rows and columns of the model's patches.
        area: left, top, right and bottom of the part of the picture that they cover, each from 0 to 1.
        places: (rows * columns, 3) float32 where each patch lies, row-major, scene frame, metres; NaN for one that has
            no place.
    """

    stamp_ns: int
    jpeg: bytes
    size: tuple[int, int]
    pose: NDArray[np.float64]
    fov: float
    grid: tuple[int, int] = (0, 0)
    area: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    places: NDArray[np.float32] = field(default_factory=lambda: _NOWHERE)

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.size[0] / self.size[1]

    @property
    def rgb(self) -> NDArray[np.uint8]:
        """(h, w, 3) uint8."""
        return np.asarray(Image.open(io.BytesIO(self.jpeg)).convert("RGB"))

    @property
    def base64(self) -> str:
        """The JPEG for a page."""
        return base64.b64encode(self.jpeg).decode("ascii")

    def at(self, pose: NDArray[np.float64]) -> Picture:
        """The picture as taken from (4, 4), where that turned out to be elsewhere: its patches come along."""
        if np.array_equal(pose, self.pose):
            return self
        moved = pose @ np.linalg.inv(self.pose)
        places = (self.places.astype(np.float64) @ moved[:3, :3].T + moved[:3, 3]).astype(np.float32)
        return replace(self, pose=pose, places=places)

    def lit(self, left: Left) -> NDArray[np.int64]:
        """Numbers of the patches, row-major, that lie in the voxel of a token that was left."""
        found: NDArray[np.int64] = np.flatnonzero(np.isin(left.voxels.of(self.places), left.keys))
        return found


@dataclass(frozen=True)
class Voxels:
    """The grid whose cells a scene's tokens stand for.

    Attributes:
        origin: centre of the voxel (0, 0, 0), scene frame, metres. size: edge, metres.
    """

    origin: tuple[float, float, float]
    size: float

    def of(self, points: NDArray[np.floating]) -> NDArray[np.int64]:
        """(n,) a number for the voxel of each point (n, 3), as `TokenMap.keys_at` finds it, without torch.

        -1 for a point that is not finite or too far away for a voxel.
        """
        with np.errstate(invalid="ignore", over="ignore"):
            local = (points.astype(np.float64) - np.asarray(self.origin)).astype(np.float32)
            index = np.rint(local / np.float32(self.size))
            inside = (np.abs(index) < 1 << (_BITS - 1)).all(axis=1)
        x, y, z = np.where(inside[:, None], index, 0).astype(np.int64).T + (1 << (_BITS - 1))
        return np.where(inside, x << (2 * _BITS) | y << _BITS | z, -1)


@dataclass(frozen=True, eq=False)
class Left:
    """The voxels of the tokens that an answer was left with.

    Attributes:
        voxels: the scene's. keys: (n,) of `Voxels.of`.
    """

    voxels: Voxels
    keys: NDArray[np.int64]

    @staticmethod
    def of(voxels: Voxels, points: NDArray[np.floating]) -> Left:
        """Of tokens at points (n, 3), scene frame, metres."""
        keys = np.unique(voxels.of(points))
        return Left(voxels, keys[keys >= 0])


def small(rgb: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.uint8]:
    """A picture (h, w, 3) whose longer side has at most so many pixels."""
    height, width = rgb.shape[:2]
    scale = min(1.0, side / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BILINEAR))


def encoded(rgb: NDArray[np.uint8]) -> tuple[bytes, tuple[int, int]]:
    """A small JPEG of a picture (h, w, 3), and its width and height."""
    image, buffer = Image.fromarray(small(rgb)), io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY, optimize=True)
    return buffer.getvalue(), image.size


def received(
    stamp_ns: int,
    jpeg: bytes,
    pose: NDArray[np.float64],
    fov: float,
    grid: tuple[int, int],
    area: Sequence[float],
    places: NDArray[np.float32],
) -> Picture:
    """A picture as another process sent it, see `Picture`; places are (rows * columns * 3,).

    Raises:
        PictureError: if it is no small JPEG, or its numbers do not go together.
    """
    rows, columns = grid
    if rows * columns > MOST_PATCHES or len(places) != 3 * rows * columns:
        raise PictureError(f"{len(places)} numbers are not the places of {rows} x {columns} patches")
    left, top, right, bottom = (float(edge) for edge in area)
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1 and 0 < fov < math.pi and np.isfinite(pose).all()):
        raise PictureError(f"no picture has the area {list(area)}, {fov} rad high, at {pose.tolist()}")
    if len(jpeg) > MOST_BYTES:
        raise PictureError(f"a picture of {len(jpeg)} bytes is larger than {MOST_BYTES}")
    try:
        size = Image.open(io.BytesIO(jpeg), formats=["JPEG"]).size
    except Exception as error:  # pillow lets many kinds through
        raise PictureError(f"a picture is no JPEG that can be shown: {type(error).__name__}") from error
    if max(size) > 4 * SIDE:
        raise PictureError(f"a picture of {size[0]}x{size[1]} pixels is larger than {4 * SIDE}")
    where = np.asarray(places, dtype=np.float32).reshape(-1, 3)
    return Picture(stamp_ns, jpeg, size, pose, fov, (rows, columns), (left, top, right, bottom), where)


def voxels_of(scene: Scene) -> Voxels:
    """The grid of a scene as it is now."""
    x, y, z = (float(v) for v in scene.memory.voxel_origin)
    return Voxels((x, y, z), scene.memory.voxel_size)


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
    places = np.where(points.valid[:, None], points.xyz, np.float32(np.nan)).astype(np.float32)
    fov = 2 * math.atan(height / 2 / float(frame.K[1, 1]))
    return Picture(frame.stamp_ns, *encoded(frame.rgb), frame.T_world_camera, fov, grid, area, places)


class Pictures:
    """The pictures of a scene's key frames, as long as they are some. Used in the thread that owns the scene."""

    def __init__(self) -> None:
        self._by_stamp: dict[int, Picture] = {}

    def add(self, frame: PosedFrame, scene: Scene) -> None:
        """Keeps the picture of a frame that has become a view, or waits to be encoded as one.

        Where there are too many, the oldest goes that is of no view any more, or else the oldest.
        """
        self._by_stamp[frame.stamp_ns] = picture_of(frame, scene)
        while len(self._by_stamp) > MOST_KEPT:
            others = self._by_stamp.keys() - {frame.stamp_ns}
            known = scene.poses.keys() | {waits.stamp_ns for waits in scene.memory.pending}
            del self._by_stamp[min(others - known or others)]

    def of(self, scene: Scene) -> tuple[Picture, ...]:
        """Those of the scene's views, oldest first, where they are now; what is neither view nor waits is forgotten."""
        poses, waiting = scene.poses, {frame.stamp_ns for frame in scene.memory.pending}
        kept = {stamp: one for stamp, one in sorted(self._by_stamp.items()) if stamp in poses or stamp in waiting}
        self._by_stamp = {stamp: one.at(poses.get(stamp, one.pose)) for stamp, one in kept.items()}
        return tuple(one for stamp, one in self._by_stamp.items() if stamp in poses)
