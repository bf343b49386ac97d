# SPDX-License-Identifier: Apache-2.0
"""CLIP's vision transformer: transformers' own, only as deep as its output is used."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.geometry import PatchGeometry


class ClipTower(VisionTower):
    """Patch features of a hidden layer.

    Args:
        config: of the whole network.
        layers: how many of its layers run.
    """

    tower: CLIPVisionModel

    def __init__(self, config: CLIPVisionConfig, layers: int) -> None:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = layers
        size, patch = cast(int, config.image_size), cast(int, config.patch_size)
        geometry = PatchGeometry.square(size, size // patch)
        super().__init__(CLIPVisionModel(shallow), geometry, width=int(config.hidden_size))

    @property
    def flops_per_view(self) -> float:
        return clip_flops(self.tower.config)

    def features(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.tower(pixels).last_hidden_state  # not passed through post_layernorm
        return hidden[:, 1:]  # the first row is the class token

    def restore_buffers(self, device: torch.device) -> None:
        embeddings = self.tower.embeddings
        numbers = torch.arange(embeddings.num_positions, device=device).expand((1, -1))
        embeddings.register_buffer("position_ids", numbers, persistent=False)


def clip_flops(config: CLIPVisionConfig) -> float:
    """Operations on one image; the attention is not causal, and norms and activations are left out."""
    d, m, patch = int(config.hidden_size), int(config.intermediate_size), cast(int, config.patch_size)
    n_patches = (cast(int, config.image_size) // patch) ** 2
    n = n_patches + 1
    layer = 8.0 * n * d * d + 4.0 * n * n * d + 4.0 * n * d * m
    embedding = 2.0 * n_patches * config.num_channels * patch * patch * d
    return embedding + layer * int(config.num_hidden_layers)
