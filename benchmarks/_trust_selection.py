# SPDX-License-Identifier: Apache-2.0
"""Of what a camera has seen well, how much has no token because no frame that shows it was kept; and how far noise of a
stereo camera may be taken for a wrong pose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adatoken3d_ros.scene.agreement import Sketch, contradiction
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.keyframes import KeyFrameConfig, KeyFrameSelector, Verdict
from adatoken3d_ros.scene.patches import patch_points
from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.voxels import voxel_keys
from adatoken3d_ros.settings import DEFAULTS

WELL = 3  # frames in which a voxel that was seen well has patches
BASELINE, FOCAL_SHARE = 0.05, 0.9  # metres; focal length over the image's width, of a stereo camera
SUBPIXEL = (0.1, 0.25, 0.5)  # standard deviations of its disparities, pixels
VOXEL = 0.25  # metres
STRIDE = 4  # of the frames that are compared
PATCH = 8  # pixels over which errors of disparity go together


def measure(walk: Callable[[int], list[PosedFrame]], seeds: Iterable[int], limit: float) -> dict[str, Any]:
    """The figures over the rooms of these seeds.

    Args:
        walk: the frames of a camera on a slow way through the room of a seed. limit: of disagreement.
    """
    config = KeyFrameConfig(max_views=1000, min_gain=DEFAULTS["scene.min_gain"], max_disagreement=limit)
    lost, kept, shares = [], [], {sigma: list[float]() for sigma in SUBPIXEL}
    frames: list[PosedFrame] = []
    for seed in seeds:
        frames, rng = walk(seed), np.random.default_rng(seed)
        share, views = missing(frames, config, VOXEL)
        lost.append(share)
        kept.append(views)
        for sigma, found in shares.items():
            found += disagreement(frames[::STRIDE], sigma, rng)
    return {
        "seen_voxels_missing": float(np.mean(lost)),
        "frames_kept": float(np.mean(kept)) / len(frames),
        "stereo_disagreement_p99": {str(sigma): float(np.quantile(found, 0.99)) for sigma, found in shares.items()},
        "stereo_frames_doubted": {str(s): float(np.mean(np.array(found) > limit)) for s, found in shares.items()},
    }


def missing(frames: Sequence[PosedFrame], config: KeyFrameConfig, voxel_size: float) -> tuple[float, int]:
    """Share of the voxels that were seen well which no kept frame shows, and how many frames were kept."""
    token_map = TokenMap(voxel_size)
    selector, seen = KeyFrameSelector(config, token_map=token_map), Counter[int]()
    for frame in frames:
        points = patch_points(frame)
        xyz = torch.from_numpy(points.xyz[points.valid])
        seen.update(torch.unique(voxel_keys(xyz, voxel_size)).tolist())
        if selector.decide(frame) is Verdict.KEY_FRAME:
            selector.accepted(frame)
            token_map.add_view(frame.stamp_ns, torch.ones(len(points.valid), 1), points.xyz, points.rgb, points.valid)
    well = torch.tensor([key for key, count in seen.items() if count >= WELL])
    return float((~torch.isin(well, token_map.occupied_keys)).double().mean()), len(selector)


def stereo(depth: NDArray[np.float32], sigma: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A depth image, metres, with a stereo camera's error: of disparity, so it grows with the distance squared.

    Args:
        sigma: standard deviation of the disparity, pixels; neighbours err alike, as windows that are matched do.
    """
    height, width = depth.shape
    rough = rng.normal(0.0, sigma, (height // PATCH + 2, width // PATCH + 2))
    rows, cols = np.arange(height) / PATCH, np.arange(width) / PATCH
    down = np.stack([np.interp(rows, np.arange(len(rough)), column) for column in rough.T], axis=1)
    error = np.stack([np.interp(cols, np.arange(rough.shape[1]), row) for row in down])
    disparity = BASELINE * FOCAL_SHARE * width / depth + error
    with np.errstate(divide="ignore"):
        found = BASELINE * FOCAL_SHARE * width / disparity
    return np.where((disparity > 0.5) & np.isfinite(depth), found, np.nan).astype(np.float32)


def disagreement(frames: Sequence[PosedFrame], sigma: float, rng: np.random.Generator) -> list[float]:
    """What a right pose contradicts its neighbours by, of each pair of frames that can be compared."""
    sketches = [Sketch.of(replace(frame, depth=stereo(frame.depth, sigma, rng))) for frame in frames]
    found = [contradiction(a, b) for i, a in enumerate(sketches) for b in sketches[max(0, i - 6) : i]]
    return [value for value in found if not np.isnan(value)]
