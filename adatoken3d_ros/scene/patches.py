# SPDX-License-Identifier: Apache-2.0
"""From a posed RGB-D frame to one point per image patch, and the slow way that it must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import (
    PatchGeometry,
    backproject,
    crop_transform,
    cropped_intrinsics,
    sample_pixels,
)
from adatoken3d_ros.settings import DEFAULTS


@dataclass(frozen=True)
class PatchConfig:
    """How patches are sampled.

    Attributes:
        geometry: which pixels of a picture its patches stand for.
        max_depth: metres; a patch that is farther away is not valid.
        upstream_numerics: reproduce LLaVA-3D's published numbers: geometry in bfloat16, no depth refused, a missing
            depth is 0 and lands on the camera centre.
    """

    geometry: PatchGeometry = PatchGeometry.square(336, 24)
    max_depth: float = DEFAULTS["scene.max_depth"]
    upstream_numerics: bool = False

    def __post_init__(self) -> None:
        if not self.max_depth > 0:
            raise ValueError(f"max_depth {self.max_depth} m must be positive")


@dataclass(frozen=True, eq=False)
class PatchPoints:
    """One sample per patch, row-major, P = rows * columns.

    Attributes:
        xyz: (P, 3) float32, scene frame, metres; NaN where not valid.
        valid: (P,) bool, whether the patch has a usable depth.
        rgb: (P, 3) uint8, colour of the sampled pixel.
    """

    xyz: NDArray[np.float32]
    valid: NDArray[np.bool_]
    rgb: NDArray[np.uint8]


def patch_points(frame: PosedFrame, config: PatchConfig | None = None) -> PatchPoints:
    """The point of each patch's top-left pixel; touches only P pixels of the frame."""
    config = config or PatchConfig()
    geometry = config.geometry
    height, width = frame.depth.shape
    compat = config.upstream_numerics
    rows, cols = sample_pixels(width, height, geometry, upstream_numerics=compat)
    depth = frame.depth[np.ix_(rows, cols)]
    rgb = frame.rgb[np.ix_(rows, cols)].reshape(-1, 3)
    K = cropped_intrinsics(frame.K, geometry.transform(width, height, upstream_numerics=compat))
    down, right = geometry.corners()
    if compat:
        depth = np.where(np.isfinite(depth), depth, np.float32(0))
        xyz = _backproject_bf16(depth, down, right, K, frame.T_world_camera)
        return PatchPoints(xyz.reshape(-1, 3), np.ones(depth.size, dtype=bool), rgb)
    valid = valid_depth(depth, config.max_depth)
    depth = np.where(valid, depth, np.float32(np.nan))
    xyz = backproject(depth, right[None, :], down[:, None], K, frame.T_world_camera)
    return PatchPoints(xyz.reshape(-1, 3), valid.reshape(-1), rgb)


def valid_depth(depth: NDArray[np.float32], max_depth: float) -> NDArray[np.bool_]:
    """Whether each depth is finite, positive and at most `max_depth` metres (no comparison with NaN is true)."""
    return (depth > 0) & (depth <= min(max_depth, float(np.finfo(np.float32).max)))


def _backproject_bf16(
    depth: NDArray[np.float32],
    down: NDArray[np.int64],
    right: NDArray[np.int64],
    K: NDArray[np.float64],
    T: NDArray[np.float64],
) -> NDArray[np.float32]:
    """(rows, columns, 3) points in bfloat16 arithmetic from bfloat16 inputs, widened to float32 without loss."""
    z, k, pose = (torch.as_tensor(a).to(torch.bfloat16) for a in (depth, K, T))
    v, u = (torch.as_tensor(a).to(torch.bfloat16) for a in (down, right))
    x = (u[None, :] - k[0, 2]) * z / k[0, 0]
    y = (v[:, None] - k[1, 2]) * z / k[1, 1]
    camera = torch.stack([x, y, z, torch.ones_like(z)], dim=-1)
    world = camera @ pose.T
    return (world[..., :3] / world[..., 3:]).float().numpy()


def patch_points_upstream(
    depths: Sequence[NDArray[np.float32]],
    Ks: Sequence[NDArray[np.float64]],
    Ts: Sequence[NDArray[np.float64]],
    image_size: int = 336,
    grid: int = 24,
) -> tuple[Tensor, Tensor]:
    """The published data flow in float32: resize and crop each depth image, back-project every pixel, then pick.

    The oracle of `patch_points` and the other side of `benchmarks.tokens`.

    Args:
        depths: V images (H, W), metres. Ks: V pinhole matrices (3, 3). Ts: V poses (4, 4), camera to world.

    Returns:
        xyz (V, grid, grid, 3) float32 and the depth it came from, (V, grid, grid) float32.
    """
    crops, intrinsics = [], []
    for depth, K in zip(depths, Ks, strict=True):
        crop = crop_transform(depth.shape[1], depth.shape[0], image_size)
        resized = Image.fromarray(depth).resize((crop.resized_width, crop.resized_height), Image.Resampling.NEAREST)
        box = (crop.x0, crop.y0, crop.x0 + image_size, crop.y0 + image_size)
        crops.append(torch.from_numpy(np.array(resized.crop(box))))
        intrinsics.append(torch.from_numpy(cropped_intrinsics(K, crop)))
    z = torch.stack(crops)
    k = torch.stack(intrinsics).float()[:, :, :, None, None]
    poses = torch.from_numpy(np.stack(list(Ts))).float()

    pixel = torch.arange(image_size, dtype=torch.float32)
    v, u = torch.meshgrid(pixel, pixel, indexing="ij")
    x = (u - k[:, 0, 2]) * z / k[:, 0, 0]
    y = (v - k[:, 1, 2]) * z / k[:, 1, 1]
    camera = torch.stack([x, y, z, torch.ones_like(z)], dim=-1)
    world = torch.matmul(camera.flatten(1, 2), poses.transpose(1, 2))
    xyz = (world[..., :3] / world[..., 3:]).unflatten(1, (image_size, image_size)).permute(0, 3, 1, 2)
    picked = torch.nn.functional.interpolate(xyz, size=(grid, grid), mode="nearest")
    picked_depth = torch.nn.functional.interpolate(z[:, None], size=(grid, grid), mode="nearest")[:, 0]
    return picked.permute(0, 2, 3, 1), picked_depth
