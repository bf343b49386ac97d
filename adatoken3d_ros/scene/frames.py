# SPDX-License-Identifier: Apache-2.0
"""A posed RGB-D frame: what every input (ROS topics, a bag, a folder, the renderer) is turned into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
        FrameError: for a wrong shape or dtype, a focal length that is not positive, or a pose that is not rigid.
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
        check_intrinsics(self.K)
        check_rigid(self.T_world_camera)


def check_intrinsics(K: NDArray[np.float64]) -> None:
    """Raises FrameError unless K (3, 3) is finite with positive focal lengths (all zeros means uncalibrated in ROS)."""
    if K.shape != (3, 3) or not np.isfinite(K).all():
        raise FrameError(f"K must be a finite 3x3 matrix, got {K.tolist()}")
    if K[0, 0] <= 0 or K[1, 1] <= 0:
        raise FrameError(f"the camera is not calibrated: focal lengths fx={K[0, 0]}, fy={K[1, 1]} must be positive")


def check_rigid(T: NDArray[np.float64], tolerance: float = 1e-3) -> None:
    """Raises FrameError unless T (4, 4) is finite and its rotation part is orthonormal with determinant +1."""
    if T.shape != (4, 4) or not np.isfinite(T).all():
        raise FrameError(f"the pose must be a finite 4x4 matrix, got {T.tolist()}")
    R = T[:3, :3]
    if np.abs(R @ R.T - np.eye(3)).max() > tolerance or np.linalg.det(R) < 0 or not np.allclose(T[3], (0, 0, 0, 1)):
        raise FrameError(f"the pose is not a rigid transform: {T.tolist()}")
