# SPDX-License-Identifier: Apache-2.0
"""What a scene's file holds of what has gone from it, and of what has appeared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from adatoken3d_ros.scene.tombstones import MOST_VOXELS, Thing

MOST_METRES = 1e6
MOST_FEATURE = 1e9
MOST_STAMP = 2**31 * 10**9  # nanoseconds
_OF_VOXELS = ("keys", "features", "xyz", "rgb", "count")

Shapes = dict[str, tuple[str, list[int], torch.dtype]]


class ThingError(ValueError):
    """Numbers in a file that are no things; the message says what is wrong with them."""


def thing_shapes(channels: int) -> Shapes:
    """As `view_storage.block_shapes`."""
    return {
        "thing_boxes": ("thing_boxes", [6], torch.float64),
        "thing_moves": ("thing_boxes", [4], torch.float64),
        "thing_times": ("thing_boxes", [5], torch.int64),
        "thing_keys": ("thing_keys", [], torch.int64),
        "thing_features": ("thing_keys", [channels], torch.float32),
        "thing_xyz": ("thing_keys", [3], torch.float32),
        "thing_rgb": ("thing_keys", [3], torch.uint8),
        "thing_count": ("thing_keys", [], torch.int64),
    }


def thing_parts(things: Sequence[Thing], channels: int) -> dict[str, list[Tensor]]:
    """The tensors of `thing_shapes`: boxes are lower and upper corner; moves where to and how sure, NaN where nowhere;
    times first and last seen, found gone (0: it is there), views, voxels."""
    nowhere = (float("nan"),) * 3
    boxes = [[*thing.low.tolist(), *thing.high.tolist()] for thing in things]
    moves = [[*(thing.moved_to or nowhere), thing.confidence] for thing in things]
    times = [[one.first_ns, one.last_ns, one.gone_ns, one.views, len(one.keys)] for one in things]
    kinds = {name: (shape, kind) for name, (_, shape, kind) in thing_shapes(channels).items()}
    return {
        "thing_boxes": [torch.tensor(boxes, dtype=torch.float64).reshape(-1, 6)],
        "thing_moves": [torch.tensor(moves, dtype=torch.float64).reshape(-1, 4)],
        "thing_times": [torch.tensor(times, dtype=torch.int64).reshape(-1, 5)],
        **{
            f"thing_{name}": [
                torch.zeros(0, *kinds[f"thing_{name}"][0], dtype=kinds[f"thing_{name}"][1]),
                *[getattr(thing, name).to(kinds[f"thing_{name}"][1]) for thing in things],
            ]
            for name in _OF_VOXELS
        },
    }


def read_things(tensors: Mapping[str, Tensor]) -> list[Thing]:
    """The things of a file, in its order.

    Args:
        tensors: those of `thing_shapes`.

    Raises:
        ThingError: for numbers that no scene would have written.
    """
    times, moves = tensors["thing_times"], tensors["thing_moves"]
    rows = times[:, 4].tolist()
    if any(not 0 < n <= MOST_VOXELS for n in rows) or sum(rows) != len(tensors["thing_keys"]):
        raise ThingError(f"things of {rows[:20]} voxels, there are {len(tensors['thing_keys'])}")
    if len(times) and (int(times.min()) < 0 or int(times[:, :3].max()) > MOST_STAMP):
        raise ThingError(f"a thing at {int(times.min())} to {int(times[:, :3].max())} ns, not 0 to {MOST_STAMP}")
    there = moves[:, :3].isfinite().all(dim=1)
    for name, numbers, most in (
        ("thing_boxes", tensors["thing_boxes"], MOST_METRES),
        ("thing_moves", moves[there], MOST_METRES),
        ("thing_xyz", tensors["thing_xyz"], MOST_METRES),
        ("thing_features", tensors["thing_features"], MOST_FEATURE),
        ("the confidence of a thing", moves[:, 3], 1.0),
    ):
        if not bool((numbers.abs() <= most).all()):
            raise ThingError(f"{name} holds a number that is not finite or more than {most:g}")
    if bool((tensors["thing_keys"] < 0).any()) or bool((tensors["thing_count"] < 1).any()):
        raise ThingError("a thing has a voxel that is none, or one of no patch")
    parts = zip(*(torch.split(tensors[f"thing_{name}"], rows) for name in _OF_VOXELS), strict=True)
    found = []
    for i, (keys, features, xyz, rgb, count) in enumerate(parts):
        box = tensors["thing_boxes"][i].numpy().copy()
        first, last, gone, views, _ = times[i].tolist()
        x, y, z, sure = moves[i].tolist()
        found.append(
            Thing(
                box[:3],
                box[3:],
                keys.clone(),
                features.clone(),
                xyz.clone(),
                rgb.clone(),
                count.clone(),
                first,
                last,
                views,
                gone,
                (x, y, z) if bool(there[i]) else None,
                sure,
            )
        )
    return found
