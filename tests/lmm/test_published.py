# SPDX-License-Identifier: Apache-2.0
"""From frames and a question to embeddings against the published data flow, computed the slow way: every pixel, loops,
bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.published import add_in_order, published_input, published_points, published_tokens
from adatoken3d_ros.lmm.llava3d.tiny import write_tiny_checkpoint
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.token_map import TokenMap

BF16 = torch.bfloat16
VOXEL = 0.2  # metres


def points_of_all_pixels(frame: PosedFrame, size: int, grid: int) -> torch.Tensor:
    """(grid * grid, 3) bfloat16 of a landscape image: resize, crop, cast, back-project all, take one a patch."""
    height, width = frame.depth.shape
    wide = int(size * width / height)
    margin = (wide - size) / 2
    depth = Image.fromarray(np.nan_to_num(frame.depth, nan=0.0)).resize((wide, size), Image.Resampling.NEAREST)
    # The picture's crop rounds the margin (Pillow: half to even), the intrinsics' does not.
    z = torch.from_numpy(np.array(depth.crop((margin, 0, margin + size, size)))).to(BF16)
    K = frame.K.copy()
    K[0] *= wide / width
    K[1] *= size / height
    K[0, 2] -= margin
    k, pose = torch.from_numpy(K).to(BF16), torch.from_numpy(frame.T_world_camera).to(BF16)
    v, u = torch.meshgrid(torch.arange(size).to(BF16), torch.arange(size).to(BF16), indexing="ij")
    camera = torch.stack([(u - k[0, 2]) * z / k[0, 0], (v - k[1, 2]) * z / k[1, 1], z, torch.ones_like(z)], dim=-1)
    world = camera.reshape(-1, 4) @ pose.T
    xyz = (world[:, :3] / world[:, 3:]).reshape(size, size, 3)
    return xyz[:: size // grid, :: size // grid].reshape(-1, 3)


def embedding_in_a_row(mlp: Any, xyz: torch.Tensor) -> torch.Tensor:
    """The four layers in a row, all cast to bfloat16, as the original runs them."""
    return torch.nn.Sequential(*copy.deepcopy([mlp.lift, mlp.norm, torch.nn.ReLU(), mlp.out])).to(BF16)(xyz.to(BF16))


def pooled_in_loops(features: torch.Tensor, xyz: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Voxel -> mean, added up patch by patch in bfloat16 with bfloat16 counts; voxels in lexicographic order."""
    sums: dict[tuple[int, ...], torch.Tensor] = {}
    counts: dict[tuple[int, ...], torch.Tensor] = {}
    for feature, point in zip(features.to(BF16), xyz, strict=True):
        voxel = tuple(int(i) for i in torch.round(point / VOXEL))
        sums[voxel] = sums.get(voxel, torch.zeros_like(feature)) + feature
        counts[voxel] = counts.get(voxel, torch.zeros((), dtype=BF16)) + torch.ones((), dtype=BF16)
    return {voxel: sums[voxel] / counts[voxel] for voxel in sorted(sums)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Llava3D, Any]:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(directory)
    model, tokenizer, _ = checkpoint.load(directory)
    return model, tokenizer


@pytest.fixture(scope="module")
def frames() -> list[PosedFrame]:
    """Slanted walls, a third of whose depth is missing."""
    found = []
    for i in range(4):
        T = np.eye(4)
        T[:3, :3] = [[0, 0, 1], [-1, 0, 0], [0, -1, 0]]
        T[:3, 3] = 0.62 * i, 0.4 - 0.58 * i, 1.2
        rgb = np.random.default_rng(i).integers(0, 256, (120, 160, 3), dtype=np.uint8)
        rows, cols = np.indices((120, 160))
        depth = (1.5 + 0.01 * cols + 0.003 * rows + 0.1 * i).astype(np.float32)
        depth[:40] = np.nan
        K = np.array([[138.0, 0, 79.5], [0, 138.0, 59.5], [0, 0, 1]])
        found.append(PosedFrame(rgb, depth, K, T, (i + 1) * 10**8))
    return found


def slowly(model: Llava3D, frames: list[PosedFrame]) -> dict[tuple[int, ...], torch.Tensor]:
    xyz = [points_of_all_pixels(frame, model.config.image_size, model.config.grid) for frame in frames]
    with torch.inference_mode():
        features = [
            model.encode_images([frame.rgb])[0].to(BF16) + embedding_in_a_row(model.position, points)
            for frame, points in zip(frames, xyz, strict=True)
        ]
    return pooled_in_loops(torch.cat(features), torch.cat(xyz))


@pytest.mark.parametrize("width", range(56, 90, 3))
def test_points_are_those_of_every_pixel(width: int, frames: list[PosedFrame]) -> None:
    """Margins of every parity, halves among them."""
    frame = frames[0]
    depth = frame.depth[40:96, :width].copy()
    depth[:14] = np.nan
    cut = replace(frame, rgb=frame.rgb[40:96, :width], depth=depth)
    assert torch.equal(published_points(cut, 56, 4), points_of_all_pixels(cut, 56, 4))
    exact = torch.from_numpy(patch_points(cut, PatchConfig(PatchGeometry.square(56, 4))).xyz)
    error = (published_points(cut, 56, 4).float() - exact)[4:].abs()
    assert 1e-4 < error.mean() < 0.03, "bfloat16 keeps 8 bits: up to centimetres off at metres"


def test_sums_and_counts_round_at_each_step() -> None:
    table, ones = torch.zeros(2, dtype=BF16), torch.ones(301, dtype=BF16)
    add_in_order(table, torch.tensor([0] * 300 + [1]), ones)
    assert table.tolist() == [256, 1], "257 is not a bfloat16 number"


def test_tokens_are_those_of_the_published_way(tiny: tuple[Llava3D, Any], frames: list[PosedFrame]) -> None:
    model, _ = tiny
    features, voxel = published_tokens(model, frames)
    expected = slowly(model, frames)
    assert [tuple(v) for v in voxel.tolist()] == list(expected)
    assert torch.equal(features, torch.stack(list(expected.values())).float())
    # What has no depth is a token at the camera, and makes the tokens others than ours.
    cameras = {tuple(np.round(frame.T_world_camera[:3, 3] / VOXEL).astype(int).tolist()) for frame in frames}
    assert cameras <= set(expected)
    ours = TokenMap(VOXEL)
    for frame in frames:
        points = patch_points(frame, PatchConfig(model.sizes.patches))
        with torch.inference_mode():
            seen = model.encode_images([frame.rgb])[0]
        ours.add_view(frame.stamp_ns, seen, points.xyz, points.rgb, points.valid)
    assert not cameras & {tuple(v) for v in ours.tokens().voxel.tolist()}


def test_a_question_is_embedded_in_the_published_way(tiny: tuple[Llava3D, Any], frames: list[PosedFrame]) -> None:
    model, tokenizer = tiny
    spliced = published_input(model, tokenizer, "What is at [1.003, 2.017, 0.509]?", frames)
    with torch.inference_mode():
        point = torch.tensor([[1.003, 2.017, 0.509]])
        expected = embedding_in_a_row(model.click, point).float()
        ours = model.embed_clicks(point)
        spatial = model.project(torch.stack(list(slowly(model, frames).values())).float())
    rows = spliced.embeds[0]
    assert (rows == expected).all(-1).any() and not (rows == ours).all(-1).any()
    assert torch.equal(rows[spliced.spatial_start : spliced.spatial_start + spliced.n_spatial], spatial)


def test_too_many_tokens_are_drawn_at_random_from_the_seed(
    tiny: tuple[Llava3D, Any], frames: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = tiny
    monkeypatch.setattr(model, "sizes", replace(model.sizes, max_spatial_tokens=20))
    voxels = list(slowly(model, frames))
    drawn = torch.randperm(len(voxels), generator=torch.Generator().manual_seed(3))[:20].tolist()
    assert [tuple(v) for v in published_tokens(model, frames, seed=3)[1].tolist()] == [voxels[i] for i in drawn]
    assert published_tokens(model, frames, seed=4)[1].tolist() != published_tokens(model, frames, seed=3)[1].tolist()
