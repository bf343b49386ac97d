# SPDX-License-Identifier: Apache-2.0
"""What a scene's file holds of how its views agree: a sketch of each, so that the next frame is judged at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.scene.agreement import FARTHEST, GRID, SIDE, Sketch
from adatoken3d_ros.scene.frames import MAX_ASPECT, MAX_FOCAL

_MOST_PIXELS = int(SIDE * SIDE * MAX_ASPECT)
_MOST_POINTS = 2 * GRID[0] * GRID[1]
_NOTHING = np.zeros((0, 3), np.float32)
_NONE = Sketch(np.zeros((0, 0), np.float32), np.zeros((3, 3)), _NOTHING, _NOTHING, np.eye(4))

Shapes = dict[str, tuple[str, list[int], torch.dtype]]
SHAPES: Shapes = {  # as those of `view_storage.block_shapes`
    "sketch_cameras": ("stamps", [3, 3], torch.float64),
    "sketch_sizes": ("stamps", [4], torch.int64),
    "sketch_near": ("sketch_near", [], torch.float32),
    "sketch_points": ("sketch_points", [3], torch.float32),
    "sketch_normals": ("sketch_normals", [3], torch.float32),
}


class SketchError(ValueError):
    """Numbers in a file that are no sketches; the message says what is wrong with them."""


def sketch_parts(stamps: Sequence[int], sketches: Mapping[int, Sketch]) -> dict[str, list[Tensor]]:
    """The tensors of SHAPES, view by view; a view without a sketch has one of no size."""
    found = [sketches.get(stamp, _NONE) for stamp in stamps]
    sizes = [[*one.near.shape, len(one.xyz), len(one.normals)] for one in found]
    return {
        "sketch_cameras": [torch.from_numpy(np.stack([one.K for one in found]))],
        "sketch_sizes": [torch.tensor(sizes, dtype=torch.int64)],
        "sketch_near": [torch.from_numpy(one.near.reshape(-1)) for one in found],
        "sketch_points": [torch.from_numpy(one.xyz) for one in found],
        "sketch_normals": [torch.from_numpy(one.normals) for one in found],
    }


def read_sketches(tensors: Mapping[str, Tensor], poses: Mapping[int, NDArray[np.float64]]) -> dict[int, Sketch]:
    """The sketches of a file's views that have one.

    Args:
        tensors: those of SHAPES. poses: {stamp: T_world_camera} of the views, in their order.

    Raises:
        SketchError: for numbers that no view would have written.
    """
    sizes = tensors["sketch_sizes"].tolist()
    for height, width, points, normals in sizes:
        if not (0 <= height * width <= _MOST_PIXELS and min(height, width) >= 0):
            raise SketchError(f"a sketch of {width}x{height} pixels")
        if not (0 <= points <= _MOST_POINTS and 0 <= normals <= _MOST_POINTS):
            raise SketchError(f"a sketch of {points} points and {normals} normals")
    lengths = {
        "sketch_near": [height * width for height, width, _, _ in sizes],
        "sketch_points": [points for _, _, points, _ in sizes],
        "sketch_normals": [normals for _, _, _, normals in sizes],
    }
    for name, counts in lengths.items():
        if sum(counts) != len(tensors[name]):
            raise SketchError(f"{name} has {len(tensors[name])} rows, the views {sum(counts)}")
    near, points, normals = (tensors[name] for name in lengths)
    for name, numbers, most in (("points", points, 100 * FARTHEST), ("normals", normals, 1.01)):
        if not bool((numbers.abs() <= most).all()):
            raise SketchError(f"sketch_{name} holds a number that is not finite or more than {most:g}")
    if not bool((near > 0).all()):  # NaN is not
        raise SketchError("sketch_near holds a depth that is not positive")
    split = [torch.split(tensors[name], counts) for name, counts in lengths.items()]
    cameras = tensors["sketch_cameras"].numpy()
    found = {}
    for stamp, (height, width, _, _), K, *parts in zip(poses, sizes, cameras, *split, strict=True):
        if not height * width:
            continue
        if not (np.isfinite(K).all() and 0 < K[0, 0] <= MAX_FOCAL and 0 < K[1, 1] <= MAX_FOCAL):
            raise SketchError(f"the sketch at {stamp} ns has the camera {K.tolist()}")
        depth, xyz, faces = (part.clone().numpy() for part in parts)
        found[stamp] = Sketch(depth.reshape(height, width), K.copy(), xyz, faces, poses[stamp])
    return found
