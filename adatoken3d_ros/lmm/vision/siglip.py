# SPDX-License-Identifier: Apache-2.0
"""SigLIP's vision transformer: transformers' own, without its last layer, its last norm and its pooling head."""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.geometry import PatchGeometry

_NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


class SiglipTower(VisionTower):
    """Patch features of a hidden layer, as its residual stream is, not normed.

    Args:
        config: of the whole network.
        layers: how many of its layers run.
    """

    tower: SiglipVisionModel

    def __init__(self, config: SiglipVisionConfig, layers: int) -> None:
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = layers
        shallow.vision_use_head = False
        size, patch = cast(int, config.image_size), cast(int, config.patch_size)
        network = SiglipVisionModel(shallow)
        network.add_module("post_layernorm", nn.Identity())
        geometry = PatchGeometry(size, size, size // patch, size // patch, rest=True)
        super().__init__(network, geometry, width=int(config.hidden_size), normal=_NORMAL)

    @property
    def flops_per_view(self) -> float:
        config = self.tower.config
        d, m, patch = int(config.hidden_size), int(config.intermediate_size), cast(int, config.patch_size)
        n = self.patches
        layer = 8.0 * n * d * d + 4.0 * n * n * d + 4.0 * n * d * m
        return 2.0 * n * config.num_channels * patch * patch * d + layer * int(config.num_hidden_layers)

    def features(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self.tower(pixels).last_hidden_state
        return hidden

    def restore_buffers(self, device: torch.device) -> None:
        embeddings = self.tower.embeddings
        numbers = torch.arange(embeddings.num_positions, device=device).expand((1, -1))
        embeddings.register_buffer("position_ids", numbers, persistent=False)
