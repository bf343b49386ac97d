# SPDX-License-Identifier: Apache-2.0
"""What a scene's file holds of where the scene was looked at, and when."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from adatoken3d_ros.scene.looked import LOOKS, Looked
from adatoken3d_ros.scene.occupancy import CELLS, MOST_BLOCKS, PACKING, REMEMBERED

MOST_METRES = 1e6
MOST_STAMP = 2**31 * 10**9  # nanoseconds
_MOST_INDEX = 2**20  # of a block

Shapes = dict[str, tuple[str, list[int], torch.dtype]]
SHAPES: Shapes = {  # as those of `view_storage.block_shapes`
    "looked_origin": ("looked_origin", [3], torch.float64),  # one, or none where nothing is known
    "looked_blocks": ("looked_blocks", [3], torch.int64),
    "looked_stamps": ("looked_stamps", [], torch.int64),
    "looked_numbers": ("looked_blocks", [len(LOOKS), CELLS], torch.int32),
}


class LookError(ValueError):
    """Numbers in a file that are no looks; the message says what is wrong with them."""


def look_parts(looked: Looked | None) -> dict[str, list[Tensor]]:
    """The tensors of SHAPES."""
    if looked is None:
        return {name: [torch.zeros(0, *shape, dtype=kind)] for name, (_, shape, kind) in SHAPES.items()}
    return {
        "looked_origin": [torch.from_numpy(looked.origin[None].astype(np.float64))],
        "looked_blocks": [torch.from_numpy(looked.blocks)],
        "looked_stamps": [torch.from_numpy(looked.stamps)],
        "looked_numbers": [torch.from_numpy(looked.tables)],
    }


def read_looks(tensors: Mapping[str, Tensor]) -> Looked | None:
    """What a file knows of where the scene was looked at; None where it does not.

    Args:
        tensors: those of SHAPES.

    Raises:
        LookError: for numbers that no scene would have written.
    """
    origin, blocks, stamps, numbers = (tensors[name] for name in SHAPES)
    if not len(origin):
        if len(blocks) or len(stamps):
            raise LookError(f"{len(blocks)} blocks that were looked at, with no origin")
        return None
    if len(blocks) > MOST_BLOCKS or len(stamps) > REMEMBERED:  # they would take many times what the file takes
        raise LookError(f"{len(blocks)} blocks and {len(stamps)} looks, more than {MOST_BLOCKS} and {REMEMBERED}")
    if len(origin) > 1 or not bool((origin.abs() <= MOST_METRES).all()):  # NaN is not
        raise LookError(f"looked_origin is {origin[:2].tolist()}, not one point up to {MOST_METRES:g} m")
    if not bool(((blocks > -_MOST_INDEX) & (blocks < _MOST_INDEX)).all()):
        raise LookError("looked_blocks holds a block that is too far away")
    if len(torch.unique(blocks @ torch.from_numpy(PACKING))) < len(blocks):
        raise LookError("looked_blocks holds a block twice")
    if not bool(((stamps >= 0) & (stamps <= MOST_STAMP)).all()):
        raise LookError(f"looked_stamps holds a time that is not 0 to {MOST_STAMP} ns")
    if not bool(((numbers >= 0) & (numbers <= len(stamps))).all()):
        raise LookError(f"looked_numbers holds a look that is none of {len(stamps)}")
    return Looked(*(tensor.clone().numpy() for tensor in (origin[0], blocks, numbers, stamps)))
