# SPDX-License-Identifier: Apache-2.0
"""A posed RGB-D frame: what every input (ROS topics, a bag, a folder, the renderer) is turned into, and its limits.

The limits are what a camera on a robot can be; beyond them a message of some bytes would cost minutes or gigabytes, or
points would lose their centimetres. They are checked before anything is decoded, and once more of every frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_SIDE = 8192  # pixels of an image's longer side
MAX_PIXELS = 2**24  # of an image: 4096 x 4096; a float of each is held several times while depth is brought to colour
MAX_ASPECT = 8.0  # longer over shorter side; the model sees the square in the middle, whose short side is scaled to it
MAX_TANGENT = 10.0  # a pixel looks no farther off the optical axis, 84 degrees: fx of a centred image >= 0.05 * width
MAX_FOCAL = 1e6  # pixels; a longer lens has parallel rays
MAX_SKEW = 0.1  # of the focal length, for axes of a sensor that are not quite at right angles
MAX_POSITION = 1e5  # metres from the origin along an axis; farther out float32 points are coarser than a centimetre


class FrameError(ValueError):
    """A frame that cannot be used; the message names the offending value."""


@dataclass(frozen=True, eq=False)
class PosedFrame:
    """One registered RGB-D image with its pinhole camera and pose.

    Attributes:
        rgb: (H, W, 3) uint8.
        depth: (H, W) float32, metres along the optical axis, NaN where there is no measurement (REP 117, REP 118).
        K: (3, 3) float64 pinhole matrix of both images, pixels; pixel centres have integer coordinates.
        T_world_camera: (4, 4) float64, camera optical frame (x right, y down, z forward) to the scene frame (z up).
        stamp_ns: acquisition time in nanoseconds.

    Raises:
        FrameError: for a wrong shape or dtype, a size, a camera or a pose beyond the limits, a focal length that is not
            positive, or a pose that is not rigid.
    """

    rgb: NDArray[np.uint8]
    depth: NDArray[np.float32]
    K: NDArray[np.float64]
    T_world_camera: NDArray[np.float64]
    stamp_ns: int

    def __post_init__(self) -> None:
        if self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or self.rgb.dtype != np.uint8:
            raise FrameError(f"colour must be (H, W, 3) uint8, got {self.rgb.shape} {self.rgb.dtype}")
        if self.depth.shape != self.rgb.shape[:2] or self.depth.dtype != np.float32:
            raise FrameError(
                f"depth must be float32 of the colour image's size {self.rgb.shape[:2]}, "
                f"got {self.depth.shape} {self.depth.dtype}"
            )
        height, width = self.depth.shape
        check_size(width, height)
        check_intrinsics(self.K, width, height)
        check_rigid(self.T_world_camera)
        check_position(self.T_world_camera[:3, 3])


def check_size(width: int, height: int) -> None:
    """Raises FrameError, naming the size, for an image that is empty, too large, or too long for its width."""
    if width < 1 or height < 1:
        raise FrameError(f"an image of {width}x{height} pixels is empty")
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise FrameError(
            f"an image of {width}x{height} pixels is too large: at most {MAX_SIDE} a side and {MAX_PIXELS} in all"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise FrameError(f"an image of {width}x{height} pixels is too narrow: at most 1:{MAX_ASPECT:g}")


def check_intrinsics(K: NDArray[np.float64], width: int, height: int) -> None:
    """Raises FrameError unless K (3, 3) is the pinhole matrix of a camera whose image has `width` x `height` pixels.

    It must be finite, upper triangular with focal lengths that are positive (all zeros means uncalibrated in ROS), and
    within MAX_TANGENT, MAX_FOCAL and MAX_SKEW; then it can be inverted.
    """
    if K.shape != (3, 3) or not np.isfinite(K).all():
        raise FrameError(f"K must be a finite 3x3 matrix, got {K.tolist()}")
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise FrameError(f"the camera is not calibrated: focal lengths fx={K[0, 0]}, fy={K[1, 1]} must be positive")
    if K[1, 0] != 0 or tuple(K[2]) != (0.0, 0.0, 1.0) or abs(K[0, 1]) > MAX_SKEW * K[0, 0]:
        raise FrameError(f"K = {K.tolist()} is not the matrix of a pinhole camera: fx s cx, 0 fy cy, 0 0 1")
    for axis, side in enumerate((width, height)):
        f, c = K[axis, axis], K[axis, 2]
        if f > MAX_FOCAL or max(abs(c + 0.5), abs(side - 0.5 - c)) > MAX_TANGENT * f:
            name = "xy"[axis]
            raise FrameError(
                f"no camera of {width}x{height} pixels has f{name}={f:g} and c{name}={c:g}: a focal length is at most "
                f"{MAX_FOCAL:g} pixels, and no pixel farther than {MAX_TANGENT:g} of them from the optical axis"
            )


def check_position(xyz: NDArray[np.float64] | Sequence[float]) -> None:
    """Raises FrameError for a point (3,), metres, that is not finite or farther than MAX_POSITION along an axis."""
    if not (np.abs(np.asarray(xyz, dtype=np.float64)) <= MAX_POSITION).all():
        x, y, z = (float(value) for value in xyz)
        raise FrameError(f"the position ({x:g}, {y:g}, {z:g}) m is not within {MAX_POSITION:g} m of the origin")


def check_rigid(T: NDArray[np.float64], tolerance: float = 1e-3) -> None:
    """Raises FrameError unless T (4, 4) is finite and its rotation part is orthonormal with determinant +1."""
    if T.shape != (4, 4) or not np.isfinite(T).all():
        raise FrameError(f"the pose must be a finite 4x4 matrix, got {T.tolist()}")
    R = T[:3, :3]
    if np.abs(R @ R.T - np.eye(3)).max() > tolerance or np.linalg.det(R) < 0 or not np.allclose(T[3], (0, 0, 0, 1)):
        raise FrameError(f"the pose is not a rigid transform: {T.tolist()}")
