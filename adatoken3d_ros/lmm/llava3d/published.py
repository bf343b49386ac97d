# SPDX-License-Identifier: Apache-2.0
"""From frames and a question to the language model's input with the numbers that LLaVA-3D was published with.

For parity with the original only: points, positions, sums and counts are bfloat16, rounded patch by patch; a missing
depth is 0 and puts its patch at the camera; too many tokens are drawn at random. The scene's memory does none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adatoken3d_ros.lmm.interface import Spliced
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.text_places import parse_clicks
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import crop_transform, nearest
from adatoken3d_ros.scene.voxels import group_equal, voxel_indices, voxel_keys

_LOW = torch.bfloat16


def published_points(frame: PosedFrame, image_size: int, grid: int) -> Tensor:
    """(grid * grid, 3) bfloat16 metres, the point of each patch's top-left pixel, row-major.

    The crop's offset is rounded half to even and cx is moved by the unrounded half, as the original does; its wrong cx
    of portrait images is not reproduced.
    """
    height, width = frame.depth.shape
    crop = crop_transform(width, height, image_size)
    shift_x, shift_y = (crop.resized_width - image_size) / 2, (crop.resized_height - image_size) / 2
    picked = np.arange(grid) * (image_size // grid)
    rows = nearest(height, crop.resized_height)[picked + round(shift_y)]
    cols = nearest(width, crop.resized_width)[picked + round(shift_x)]
    depth = frame.depth[np.ix_(rows, cols)]
    K = frame.K * np.array([[crop.scale_x], [crop.scale_y], [1.0]])
    K[:2, 2] -= shift_x, shift_y
    depth = np.where(np.isfinite(depth), depth, np.float32(0))
    z, k, pose, pixel = (torch.as_tensor(a).to(_LOW) for a in (depth, K, frame.T_world_camera, picked))
    x = (pixel[None, :] - k[0, 2]) * z / k[0, 0]
    y = (pixel[:, None] - k[1, 2]) * z / k[1, 1]
    world = torch.stack([x, y, z, torch.ones_like(z)], dim=-1) @ pose.T
    return (world[..., :3] / world[..., 3:]).reshape(-1, 3)


def published_embedding(position: PositionMLP, xyz: Tensor) -> Tensor:
    """(..., 3) metres -> (..., width) bfloat16, every step in bfloat16, whatever dtype the module has."""
    hidden = functional.linear(xyz.to(_LOW), position.lift.weight.to(_LOW), position.lift.bias.to(_LOW))
    norm = position.norm
    hidden = functional.layer_norm(hidden, norm.normalized_shape, norm.weight.to(_LOW), norm.bias.to(_LOW), norm.eps)
    return functional.linear(functional.relu(hidden), position.out.weight.to(_LOW), position.out.bias.to(_LOW))


@torch.inference_mode()
def published_tokens(model: Llava3D, frames: Sequence[PosedFrame], seed: int = 0) -> tuple[Tensor, Tensor]:
    """The scene that these views show: (M, C) float32 features with positions, and (M, 3) int64 voxels.

    In lexicographic order of the voxels, or, where the model takes fewer, as many of them as the seed draws.
    """
    sizes = model.sizes
    xyz = torch.cat([published_points(frame, model.config.image_size, model.config.grid) for frame in frames]).to(
        model.device
    )
    # One view at a time: a batch may differ in a last bit.
    features = torch.cat([model.encode_images([frame.rgb])[0] for frame in frames]).to(_LOW)
    features = features + published_embedding(model.position, xyz)
    keys, voxel = torch.unique(voxel_keys(xyz, sizes.voxel_size), return_inverse=True)
    mean, count = features.new_zeros(len(keys), features.shape[1]), features.new_zeros(len(keys))
    add_in_order(mean, voxel, features)
    add_in_order(count, voxel, torch.ones_like(features[:, 0]))
    mean /= count[:, None]
    if len(keys) > sizes.max_spatial_tokens:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(keys), generator=generator)[: sizes.max_spatial_tokens].to(keys.device)
        mean, keys = mean[drawn], keys[drawn]
    return mean.float(), voxel_indices(keys)


@torch.inference_mode()
def published_input(
    model: Llava3D, tokenizer: Any, question: str, frames: Sequence[PosedFrame], seed: int = 0
) -> Spliced:
    """The question about these views as the language model reads it; points in its text are [x, y, z] in metres."""
    text, points = parse_clicks(question)
    clicks = torch.tensor(points, dtype=torch.float32, device=model.device).reshape(-1, 3)
    spatial = model.project(published_tokens(model, frames, seed)[0])
    prompt = model.prompt(tokenizer, text, n_clicks=len(points))
    return model.splice(prompt, spatial, published_embedding(model.click, clicks))


def add_in_order(table: Tensor, rows: Tensor, values: Tensor) -> None:
    """table[rows[i]] += values[i] for i = 0, 1, ... with a rounding to the table's dtype at each step.

    index_add_ may keep wider sums. Here each pass takes the next value of every row.
    """
    order, group, _, count = group_equal(rows)
    turn = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[group]
    for i in range(int(count.max())):
        now = order[turn == i]
        table.index_add_(0, rows[now], values[now])
