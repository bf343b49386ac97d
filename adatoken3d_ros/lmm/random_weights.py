# SPDX-License-Identifier: Apache-2.0
"""Random weights for tiny checkpoints, with which everything can be tried but nothing is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def random_weights(model: nn.Module, official: Mapping[str, str], seed: int) -> dict[str, torch.Tensor]:
    """By official name: norms at one, small biases, matrices scaled so that signals keep their size.

    Args:
        model: on the meta device, for its shapes. official: {name in the model: name in the checkpoint}.
    """
    shapes = {ours: tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for ours, name in official.items():
        shape = shapes[ours]
        if ours.endswith("bias"):
            weights[name] = 0.02 * torch.randn(shape, generator=generator)
        elif "norm" in ours:
            weights[name] = torch.ones(shape)
        elif len(shape) == 1 or ("embed" in ours and "patch" not in ours):
            weights[name] = torch.randn(shape, generator=generator)
        else:
            weights[name] = torch.randn(shape, generator=generator) * torch.Size(shape[1:]).numel() ** -0.5
    return weights
