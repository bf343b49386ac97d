# SPDX-License-Identifier: Apache-2.0
"""Which of some boxes a description means: the grounding head of the family.

The description is read with the token `<ground>` as its answer; what the last layer makes of that token is the query.
A box is the mean of the patches in it, projected as the language model reads them but not pooled, and the sine of its
centre. Both go through a small network; their cosine over a temperature is the score. One more vector, learnt, stands
for none of the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def ground(query: Tensor, objects: Tensor, temperature: float) -> Tensor:
    """Probabilities (N,) of N candidates: a softmax over cosines.

    Args:
        query: (E,), what is looked for. objects: (N, E), what there is. Both of the head's networks.
        temperature: by which the cosines are divided.
    """
    cosines = functional.normalize(objects.float(), dim=-1) @ functional.normalize(query.float(), dim=-1)
    return (cosines / temperature).softmax(dim=0)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(N, P) bool: which points (P, 3) lie in which boxes (N, 6), centre and size; a point of NaN lies in none."""
    low, high = boxes[:, :3] - boxes[:, 3:] / 2, boxes[:, :3] + boxes[:, 3:] / 2
    return ((low[:, None] <= points) & (points <= high[:, None])).all(dim=-1)


class GroundingHead(nn.Module):
    """Two networks of the language model's width D, and the vector for none of the boxes.

    Args:
        width: D. temperature: of the softmax.
    """

    def __init__(self, width: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.zero_target = nn.Parameter(torch.randn(width))
        self.obj, self.query = _network(width), _network(width)

    def forward(self, state: Tensor, objects: Tensor) -> Tensor:
        """State (D,) behind the last norm, objects (N, D) -> probabilities (N + 1,), the last for none of them."""
        every = torch.cat([objects.to(self.zero_target.dtype), self.zero_target[None]])
        return ground(self.query(state.to(self.zero_target.dtype)), self.obj(every), self.temperature)


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width), nn.Linear(width, width))
