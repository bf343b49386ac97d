# SPDX-License-Identifier: Apache-2.0
"""From the probabilities of boxes to those that are meant, and to words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Of the probability, so much is held by the boxes that are told: the threshold at which Video-3D LLM was evaluated on
# Multi3DRefer, where a description may mean several things or none.
ENOUGH = 0.4


def meant(chances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which of N boxes are meant, the likeliest first; none if that is the likeliest.

    Args:
        chances: (N + 1,) probabilities, the last that it is none of them.
    """
    if chances.argmax() == len(chances) - 1:
        return np.zeros(0, dtype=np.int64)
    order = np.argsort(-chances[:-1], kind="stable")
    return order[: int(np.searchsorted(chances[order].cumsum(), ENOUGH)) + 1]


def told(boxes: NDArray[np.float64], chances: NDArray[np.float64], chosen: NDArray[np.int64]) -> str:
    """In words: of N boxes (N, 6) those `chosen`, centre and size in metres, each with its probability (N + 1,)."""
    if not len(chosen):
        return f"none of {len(boxes)} boxes ({chances[-1]:.2f})"
    every = (f"[{', '.join(f'{round(value, 2) + 0.0:.2f}' for value in boxes[i])}] ({chances[i]:.2f})" for i in chosen)
    return f"{len(chosen)} of {len(boxes)} boxes: {', '.join(every)}"
