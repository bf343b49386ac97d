# SPDX-License-Identifier: Apache-2.0
"""A room whose depth is exact: what a camera sees in it, and a walk through it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.synthetic.camera import look_at
from adatoken3d_ros.scene.frames import PosedFrame

Pose = NDArray[np.float64]
SIZE = (48, 64)
K = np.array([[40.0, 0, 31.5], [0, 40, 23.5], [0, 0, 1]])
ROOM = np.array([[-3.0, -2.0, 0.0], [3.0, 2.0, 2.5]])
CUPBOARD = np.array([[-0.6, -1.9, 0.0], [0.4, -1.4, 1.6]])
TABLE = np.array([[0.6, 0.2, 0.0], [1.8, 1.2, 0.7]])
TO_BODY = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])  # a body's axes in the optical frame
Y_DOWN = np.array([[1, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])


def depth_of(pose: Pose, *boxes: NDArray[np.float64]) -> NDArray[np.float32]:
    """Depth of the room and of boxes in it, by the slab method."""
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones(SIZE)], axis=-1) @ pose[:3, :3].T
    with np.errstate(divide="ignore"):
        depth = np.maximum(*((ROOM - pose[:3, 3])[:, None, None] / rays)).min(axis=-1)  # out of the room
        for box in boxes:
            a, b = (box - pose[:3, 3])[:, None, None] / rays
            into, out = np.minimum(a, b).max(axis=-1), np.maximum(a, b).min(axis=-1)
            depth = np.where((into < out) & (into > 0), np.minimum(depth, into), depth)
    return depth.astype(np.float32)


def view(
    stamp: int, pose: Pose, *boxes: NDArray[np.float64], said: Pose | None = None, scale: float = 1.0
) -> PosedFrame:
    """What a camera at `pose` sees, with the pose and the scale of depth that are said of it."""
    depth = depth_of(pose, *(boxes or (CUPBOARD, TABLE))) * np.float32(scale)
    return PosedFrame(np.zeros((*SIZE, 3), np.uint8), depth, K, pose if said is None else said, stamp)


def walk(count: int) -> list[Pose]:
    """Cameras on the way through the room, all over it."""
    rng = np.random.default_rng(0)
    eyes = rng.uniform((-1.2, -0.8, 1.0), (1.2, 0.8, 1.6), (count, 3))
    angles = np.arange(count) * 0.7
    ahead = np.stack([np.cos(angles), np.sin(angles), np.full(count, -0.5)], axis=1)
    return [look_at(eye, eye + step) for eye, step in zip(eyes, ahead, strict=True)]
