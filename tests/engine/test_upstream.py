# SPDX-License-Identifier: Apache-2.0
"""The compatibility switch against the published data flow, computed the slow way: every pixel, loops, bfloat16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig

BF16 = torch.bfloat16
VOXEL = 0.2  # metres


def published_points(frame: PosedFrame, size: int, grid: int) -> torch.Tensor:
    """(grid * grid, 3) bfloat16 of a landscape image: resize, crop, cast, back-project all, take one a patch."""
    height, width = frame.depth.shape
    wide = int(size * width / height)
    margin = (wide - size) / 2
    depth = Image.fromarray(np.nan_to_num(frame.depth, nan=0.0)).resize((wide, size), Image.Resampling.NEAREST)
    # The picture's crop rounds the margin (half to even), the intrinsics' does not.
    z = torch.from_numpy(np.array(depth.crop((round(margin), 0, round(margin) + size, size)))).to(BF16)
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


def published_embedding(mlp: Any, xyz: torch.Tensor) -> torch.Tensor:
    """The four layers in a row, all cast to bfloat16, as the original runs them."""
    return torch.nn.Sequential(*copy.deepcopy([mlp.lift, mlp.norm, torch.nn.ReLU(), mlp.out])).to(BF16)(xyz.to(BF16))


def published_pooling(features: torch.Tensor, xyz: torch.Tensor) -> dict[tuple[int, ...], torch.Tensor]:
    """Voxel -> mean, added up patch by patch in bfloat16 with bfloat16 counts; voxels in lexicographic order."""
    sums: dict[tuple[int, ...], torch.Tensor] = {}
    counts: dict[tuple[int, ...], torch.Tensor] = {}
    for feature, point in zip(features.to(BF16), xyz, strict=True):
        voxel = tuple(int(i) for i in torch.round(point / VOXEL))
        sums[voxel] = sums.get(voxel, torch.zeros_like(feature)) + feature
        counts[voxel] = counts.get(voxel, torch.zeros((), dtype=BF16)) + torch.ones((), dtype=BF16)
    return {voxel: sums[voxel] / counts[voxel] for voxel in sorted(sums)}


@pytest.fixture
def holed(frames: list[PosedFrame]) -> list[PosedFrame]:
    """Slanted walls, a third of whose depth is missing."""
    found = []
    for i, frame in enumerate(frames):
        rows, cols = np.indices(frame.depth.shape)
        depth = (1.5 + 0.01 * cols + 0.003 * rows + 0.1 * i).astype(np.float32)
        depth[:40] = np.nan
        found.append(replace(frame, depth=depth))
    return found


def published(session: Scene, frames: list[PosedFrame]) -> dict[tuple[int, ...], torch.Tensor]:
    config = session.runtime.model.config
    xyz = [published_points(frame, config.image_size, config.grid) for frame in frames]
    with torch.inference_mode():
        # One view at a time, as the session saw them: a batch may differ in a last bit.
        features = [
            session.runtime.model.published_features([frame.rgb], points.float()[None])[0]
            for frame, points in zip(frames, xyz, strict=True)
        ]
    return published_pooling(torch.cat(features), torch.cat(xyz))


def looked(session: Scene, frames: list[PosedFrame]) -> Scene:
    for frame in frames:
        session.observe(frame)
        session.encode_pending()
    assert len(session.poses) == len(frames)
    return session


def test_tokens_are_those_of_the_published_way(make_session: Callable[..., Scene], holed: list[PosedFrame]) -> None:
    session = looked(make_session(SessionConfig(upstream_numerics=True)), holed)
    tokens = session.tokens()
    assert tokens is not None
    expected = published(session, holed)
    assert [tuple(v) for v in tokens.voxel.tolist()] == list(expected)
    assert torch.equal(tokens.features, torch.stack(list(expected.values())).float())
    # What has no depth is a token at the camera, and makes the tokens others than ours.
    cameras = {tuple(np.round(frame.T_world_camera[:3, 3] / VOXEL).astype(int).tolist()) for frame in holed}
    assert cameras <= set(expected)
    ours = looked(make_session(), holed).tokens()
    assert ours is not None and not cameras & {tuple(v) for v in ours.voxel.tolist()}


def test_clicks_are_embedded_in_the_published_way(make_session: Callable[..., Scene], holed: list[PosedFrame]) -> None:
    question = Question("What is at [1.003, 2.017, 0.509]?")
    session = looked(make_session(SessionConfig(upstream_numerics=True)), holed)
    ours = looked(make_session(), holed)
    with torch.inference_mode():
        expected = published_embedding(session.runtime.model.click, torch.tensor([[1.003, 2.017, 0.509]])).float()
        rows, others = (one.spliced(question)[0].embeds[0] for one in (session, ours))
    assert (rows == expected).all(-1).any() and not (others == expected).all(-1).any()


def test_too_many_tokens_are_drawn_at_random_from_the_seed(
    make_session: Callable[..., Scene], holed: list[PosedFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(seed: int) -> tuple[Any, list[tuple[int, ...]]]:
        session = make_session(SessionConfig(KeyFrameConfig(), upstream_numerics=True, seed=seed))
        monkeypatch.setattr(session.runtime.model, "sizes", replace(session.runtime.model.sizes, max_spatial_tokens=20))
        looked(session, holed)
        _, block = session.spliced(Question("What is there?"))
        return block.tokens, list(published(session, holed))

    tokens, voxels = asked(3)
    drawn = torch.randperm(len(voxels), generator=torch.Generator().manual_seed(3))[:20].tolist()
    assert [tuple(v) for v in tokens.voxel.tolist()] == [voxels[i] for i in drawn]
    assert not torch.equal(asked(4)[0].voxel, tokens.voxel)
