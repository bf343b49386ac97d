# SPDX-License-Identifier: Apache-2.0
"""Image and camera geometry: what LLaVA-3D's resize and centre crop do to pixels and intrinsics, and back-projection.

Pixel coordinates are integers at the pixel's index (no half-pixel term), as the weights were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class GeometryError(ValueError):
    """Sizes that cannot be resized, cropped or sampled; the message names the offending value."""


@dataclass(frozen=True)
class CropTransform:
    """Resize to (`resized_width`, `resized_height`), then cut the square that begins at column `x0`, row `y0`.

    A source pixel coordinate (x, y) becomes (scale_x * x - x0, scale_y * y - y0).
    """

    scale_x: float
    scale_y: float
    x0: int
    y0: int
    resized_width: int
    resized_height: int


def crop_transform(width: int, height: int, size: int) -> CropTransform:
    """Short side to `size`, long side to int(size * long / short), centre crop of size x size pixels.

    The crop begins at (long - size) // 2, as CLIP's image preprocessing does, so that depth and colour are cut alike.

    Raises:
        GeometryError: for a size below 1.
    """
    if width < 1 or height < 1 or size < 1:
        raise GeometryError(f"cannot crop a {width}x{height} image to {size}x{size}")
    if width >= height:
        resized_width, resized_height = int(size * width / height), size
    else:
        resized_width, resized_height = size, int(size * height / width)
    return CropTransform(
        scale_x=resized_width / width,
        scale_y=resized_height / height,
        x0=(resized_width - size) // 2,
        y0=(resized_height - size) // 2,
        resized_width=resized_width,
        resized_height=resized_height,
    )


def cropped_intrinsics(K: NDArray[np.float64], crop: CropTransform) -> NDArray[np.float64]:
    """The (3, 3) pinhole matrix of the crop: f' = s f, c' = s c - offset, per axis, in both orientations."""
    cropped = np.array(K, dtype=np.float64)
    cropped[0] *= crop.scale_x
    cropped[1] *= crop.scale_y
    cropped[0, 2] -= crop.x0
    cropped[1, 2] -= crop.y0
    return cropped


@dataclass(frozen=True)
class PatchGeometry:
    """What a model's preprocessing makes of a picture, and which of its pixels each patch stands for.

    Attributes:
        height, width: of the image that the vision tower sees, pixels.
        rows, columns: of patches on it, row-major; they divide height and width, but for a `rest`.
        crop: the short side is scaled to the image's and the middle is cut out (square images only); else the whole
            picture is stretched to the image.
        rest: whole patches may leave pixels at the right and at the bottom, which belong to none.

    Raises:
        GeometryError: for sizes that do not go together.
    """

    height: int
    width: int
    rows: int
    columns: int
    crop: bool = True
    rest: bool = False

    def __post_init__(self) -> None:
        for size, patches in ((self.height, self.rows), (self.width, self.columns)):
            if patches < 1 or size < patches or (size % patches and not self.rest):
                raise GeometryError(f"an image of {size} pixels cannot be cut into {patches} patches of equal size")
        if self.crop and self.height != self.width:
            raise GeometryError(f"a crop of {self.width}x{self.height} pixels is no square")

    @classmethod
    def square(cls, size: int, grid: int) -> PatchGeometry:
        """grid x grid patches on the central square, scaled to size x size pixels."""
        return cls(size, size, grid, grid)

    @property
    def patches(self) -> int:
        """P, of a picture."""
        return self.rows * self.columns

    def transform(self, width: int, height: int) -> CropTransform:
        """Of a picture of width x height pixels; raises GeometryError for one without pixels."""
        if self.crop:
            return crop_transform(width, height, self.width)
        if width < 1 or height < 1:
            raise GeometryError(f"cannot stretch a {width}x{height} image to {self.width}x{self.height}")
        return CropTransform(self.width / width, self.height / height, 0, 0, self.width, self.height)

    def corners(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows (rows,) and columns (columns,) of the top-left pixel of each patch of the image."""
        return (
            np.arange(self.rows) * (self.height // self.rows),
            np.arange(self.columns) * (self.width // self.columns),
        )


@lru_cache(maxsize=64)
def sample_pixels(width: int, height: int, geometry: PatchGeometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Source rows (rows,) and columns (columns,) of the top-left pixel of each patch of a picture.

    Of a square crop patch (i, j) is sampled at pixel (i * size // grid, j * size // grid), which is what nearest
    interpolation from `size` to `grid` picks (14 * i for 336 and 24). The arrays are shared and read-only.
    """
    crop = geometry.transform(width, height)
    down, right = geometry.corners()
    rows = nearest(height, crop.resized_height)[down + crop.y0]
    cols = nearest(width, crop.resized_width)[right + crop.x0]
    rows.setflags(write=False)
    cols.setflags(write=False)
    return rows, cols


def nearest(source: int, resized: int) -> NDArray[np.int64]:
    """(resized,) source index of each pixel of Pillow's NEAREST resize: floor((x + 0.5) * source / resized).

    Pillow steps along the source by adding the scale, and where (x + 0.5) * scale is a whole number the rounding of
    that sum decides between two pixels; the same running sum gives the same pixel.
    """
    if resized == source:
        return np.arange(source)
    scale = source / resized
    return np.add.accumulate(np.r_[scale * 0.5, np.full(resized - 1, scale)]).astype(np.int64)


def backproject(
    depth: NDArray[np.floating],
    u: NDArray[np.number],
    v: NDArray[np.number],
    K: NDArray[np.float64],
    T: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Points of pixels (u, v), columns and rows, with z-depth `depth` (metres): T @ (K^-1 (u, v, 1) depth).

    Args:
        depth, u, v: broadcast to one shape (...).
        K: (3, 3) pinhole matrix. T: (4, 4) camera to world.

    Returns:
        (..., 3) float32, world metres, computed in float64; NaN where the depth is NaN.
    """
    K, T = np.asarray(K, dtype=np.float64), np.asarray(T, dtype=np.float64)
    rays = T[:3, :3] @ np.linalg.inv(K)
    z = np.asarray(depth, dtype=np.float64)
    xyz = [z * (rays[i, 0] * u + rays[i, 1] * v + rays[i, 2]) + T[i, 3] for i in range(3)]
    return np.stack(np.broadcast_arrays(*xyz), axis=-1).astype(np.float32)
