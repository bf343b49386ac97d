# SPDX-License-Identifier: Apache-2.0
"""A question about a part of what was seen: some places are left out, before a model sees any of their tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.scene.token_map import TokenMap

_EVER = 1 << 62  # above every view's order
_REACH = 1 << 19  # voxels from the map's origin, half as many as there are


def is_narrowed(question: Question) -> bool:
    """Whether it is not about the whole scene."""
    return bool(len(question.without) or len(question.only))


def left(whole: TokenMap, question: Question) -> Callable[[Tensor], Tensor]:
    """Of voxels' keys (n,) of a map whether (n,) they are left for a question."""
    without, only = _keys(whole, question.without), _keys(whole, question.only) if len(question.only) else None

    def is_left(keys: Tensor) -> Tensor:
        there = ~torch.isin(keys, without)
        return there if only is None else there & torch.isin(keys, only)

    return is_left


def narrowed(whole: TokenMap, question: Question) -> TokenMap:
    """What is left of a map for a question: equal to one whose views had no patch in the voxels that are left out.

    The model's origin and the views' order stay; a view may have no token left.
    """
    part = whole.subset(whole.keys())
    occupied = part.occupied_keys
    part.carve(occupied[~left(whole, question)(occupied)], before=_EVER)
    return part


def _keys(whole: TokenMap, places: NDArray[np.float64]) -> Tensor:
    """Keys of the voxels of places (n, 3), without those that are too far away for there to be one."""
    within = np.abs(places - whole.origin.numpy()) < whole.voxel_size * _REACH
    return whole.keys_at(places[within.all(axis=1)])
