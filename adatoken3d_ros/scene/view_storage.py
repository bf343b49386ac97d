# SPDX-License-Identifier: Apache-2.0
"""What a scene's file holds beside the voxels where tokens are those of views: the blocks of the views."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adatoken3d_ros.scene.token_map import TokenMap
from adatoken3d_ros.scene.view_blocks import Block, ViewTokenMap
from adatoken3d_ros.scene.voxels import TokenMapError, voxel_keys

MOST_SIDE = 4096  # rows or columns of a view's tokens
MOST_METRES = 1e6
MOST_FEATURE = 1e9

# Name in the file -> by which its length is known, the shape of a row, and its kind.
Shapes = dict[str, tuple[str, list[int], torch.dtype]]


class BlockError(ValueError):
    """Blocks in a file that are none; the message says what is wrong with them."""


def block_shapes(token_map: TokenMap, channels: int) -> Shapes:
    """What the file of such a map holds beside the rest; nothing for a map of voxels."""
    if not isinstance(token_map, ViewTokenMap):
        return {}
    parts: Shapes = {"block_parts": ("block_cells", [token_map.parts, 3], torch.float32)}
    return {
        **(parts if token_map.parts else {}),
        "block_features": ("block_cells", [channels], torch.float32),
        "block_points": ("block_cells", [3], torch.float32),
        "block_cells": ("block_cells", [], torch.int64),
        "block_rows": ("stamps", [], torch.int64),
        "block_grids": ("stamps", [2], torch.int64),
        "block_colours": ("block_cells", [3], torch.uint8),
    }


def block_parts(token_map: TokenMap) -> dict[str, list[Tensor]]:
    """The tensors of `block_shapes`, view by view, oldest first."""
    if not isinstance(token_map, ViewTokenMap):
        return {}
    blocks = list(token_map.blocks().values())
    return {
        **({"block_parts": [block.parts for block in blocks]} if token_map.parts else {}),
        "block_features": [block.features for block in blocks],
        "block_points": [block.xyz for block in blocks],
        "block_cells": [block.cell for block in blocks],
        "block_rows": [torch.tensor([len(block.cell) for block in blocks], dtype=torch.int64)],
        "block_grids": [torch.tensor([block.grid for block in blocks], dtype=torch.int64)],
        "block_colours": [block.rgb for block in blocks],
    }


def read_blocks(
    path: Path, tensors: dict[str, Tensor], keys: dict[int, Tensor], token_map: TokenMap, origin: Tensor, device: object
) -> dict[int, Block]:
    """The blocks of a file's views, checked.

    Args:
        tensors: those of `block_shapes`. keys: {stamp: voxels that the view holds}, oldest first. origin: of the map.

    Raises:
        BlockError: for numbers that no map would have written.
    """
    rows, grids, cells = tensors["block_rows"].tolist(), tensors["block_grids"].tolist(), tensors["block_cells"]
    if min(rows) < 0 or sum(rows) != len(cells):
        raise BlockError(f"{path}: its views have {sum(rows)} tokens, there are {len(cells)}")
    for name, most in (("block_features", MOST_FEATURE), ("block_points", MOST_METRES)):
        if not bool((tensors[name].abs() <= most).all()):
            raise BlockError(f"{path}: {name} holds a number that is not finite or more than {most:g}")
    tensors = {"block_parts": torch.zeros(len(cells), 0, 3), **tensors}
    there = tensors["block_parts"].isfinite()
    if not bool((there == there.all(dim=-1, keepdim=True)).all()):
        raise BlockError(f"{path}: block_parts holds a place of which a part is not finite")
    if not bool((tensors["block_parts"][there].abs() <= MOST_METRES).all()):
        raise BlockError(f"{path}: block_parts holds a number that is more than {MOST_METRES:g}")
    names = ("block_features", "block_points", "block_cells", "block_colours", "block_parts")
    found = {}
    for stamp, grid, *parts in zip(keys, grids, *(tensors[name].split(rows) for name in names), strict=True):
        features, xyz, cell, rgb, smaller = (part.clone() for part in parts)
        if not all(1 <= side <= MOST_SIDE for side in grid):
            raise BlockError(f"{path}: the view at {stamp} ns has a grid of {grid[0]} x {grid[1]}")
        if len(cell) and (int(cell[0]) < 0 or int(cell[-1]) >= grid[0] * grid[1] or bool((cell.diff() < 1).any())):
            raise BlockError(f"{path}: the tokens of the view at {stamp} ns do not ascend in its grid")
        try:
            held = voxel_keys((xyz.double() - origin).float(), token_map.voxel_size)
        except TokenMapError as error:
            raise BlockError(f"{path}: the view at {stamp} ns: {error}") from error
        if not bool(torch.isin(held, keys[stamp]).all()) or len(held.unique()) != len(keys[stamp]):
            raise BlockError(f"{path}: the tokens of the view at {stamp} ns are not in the voxels that it holds")
        found[stamp] = Block(features.to(str(device)), cell, (grid[0], grid[1]), xyz, rgb, held, smaller)
    return found
