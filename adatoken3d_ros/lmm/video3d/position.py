# SPDX-License-Identifier: Apache-2.0
"""Places in metres as vectors without a parameter: cells of a box, and sines of their numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TEMPERATURE = 10_000.0


def cells(xyz: Tensor, low: Sequence[float], high: Sequence[float], edge: float) -> Tensor:
    """Numbers (..., 3) float32 of the cells of points (..., 3) in metres, clamped to the box from `low` to `high`."""
    least, most = (torch.tensor(corner, dtype=torch.float32, device=xyz.device) for corner in (low, high))
    inside = torch.minimum(torch.maximum(xyz.float(), least), most)
    return ((inside - least) / edge).round()


def sine(numbers: Tensor, width: int) -> Tensor:
    """(..., 3) -> (..., width) float32: sines and cosines by turns, a third of the width for each of x, y and z.

    Feature k of an axis has the frequency 10000 ** -(2 * (k // 2) / (width // 3)); what is left of the width is zero.
    """
    third = width // 3
    k = torch.arange(third, dtype=torch.float32, device=numbers.device)
    angles = numbers.float()[..., None] / _TEMPERATURE ** (2 * torch.div(k, 2, rounding_mode="floor") / third)
    waves = torch.where(k.long() % 2 == 0, angles.sin(), angles.cos()).flatten(-2)
    return torch.nn.functional.pad(waves, (0, width - 3 * third))
