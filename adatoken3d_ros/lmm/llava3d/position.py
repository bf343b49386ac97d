# SPDX-License-Identifier: Apache-2.0
"""Positions in metres as vectors: added to image features, or standing for a point that the user clicked."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class PositionMLP(nn.Module):
    """Linear(3, width), LayerNorm, ReLU, Linear(width, width) on raw metric coordinates.

    Coordinates are neither scaled nor clipped: the model knows a room by its absolute, gravity-aligned metres.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width, eps=1e-5)
        self.out = nn.Linear(width, width)

    def forward(self, xyz: torch.Tensor) -> torch.Tensor:
        """(..., 3) metres, any float dtype -> (..., width) in the module's dtype.

        Coordinates are taken in float32 up to the last layer: bfloat16 would round a point at 4 m by 16 mm.
        """
        return self.out(self.hidden(xyz).to(self.out.weight.dtype))

    def hidden(self, xyz: torch.Tensor) -> torch.Tensor:
        """(..., 3) metres -> (..., width) float32, everything but the last layer, which is linear."""
        hidden = functional.linear(xyz.float(), self.lift.weight.float(), self.lift.bias.float())
        return functional.relu(
            functional.layer_norm(
                hidden, self.norm.normalized_shape, self.norm.weight.float(), self.norm.bias.float(), self.norm.eps
            )
        )

    def finish(self, mean: torch.Tensor) -> torch.Tensor:
        """(..., width) float32, a mean of `hidden` over points -> the mean of `forward` over them, float32."""
        return functional.linear(mean, self.out.weight.float(), self.out.bias.float())
