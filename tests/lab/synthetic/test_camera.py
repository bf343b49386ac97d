# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math

import numpy as np
import pytest

from adatoken3d_ros.lab.synthetic.camera import intrinsics, look_at, pixel_rays
from adatoken3d_ros.scene.geometry import backproject


def test_intrinsics_by_hand() -> None:
    np.testing.assert_allclose(
        intrinsics(320, 240, 90.0), [[160, 0, 159.5], [0, 160, 119.5], [0, 0, 1]]
    )  # tan 45 degrees = 1
    assert math.degrees(2 * math.atan(160 / intrinsics()[0, 0])) == pytest.approx(69)


def test_look_at_is_an_upright_optical_frame() -> None:
    T = look_at(np.array([0.0, 0, 1]), np.array([1.0, 0, 1]))
    np.testing.assert_allclose(T[:3, :3], [[0, 0, 1], [-1, 0, 0], [0, -1, 0]], atol=1e-12)
    with pytest.raises(ValueError, match="upward"):
        look_at(np.zeros(3), np.array([0.0, 0, 1]))


def test_a_rays_parameter_is_the_depth_along_the_optical_axis() -> None:
    K, T = intrinsics(8, 6), look_at(np.array([0.3, -0.2, 1.1]), np.array([1.0, 2.0, 0.4]))
    rays = pixel_rays(K, 8, 6, T)
    v, u = np.mgrid[0:6, 0:8]
    there = backproject(np.full((6, 8), 2.5, np.float32), u, v, K, T)
    np.testing.assert_allclose(rays[..., :3] + 2.5 * rays[..., 3:], there, atol=1e-5)
    with pytest.raises(ValueError, match="0x4"):
        pixel_rays(K, 0, 4, T)
