# SPDX-License-Identifier: Apache-2.0
"""Images to patch features: CLIP's preprocessing, then as much of the vision tower as is needed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from adatoken3d_ros.scene.frames import check_size

# Of ImageNet's pictures, which EfficientNet was trained on.
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


class VisionTower(nn.Module):
    """One of two towers: transformers' own CLIPVisionModel, only as deep as `config.select_layer` looks, or
    EfficientNet-Lite."""

    def __init__(self, config: Llava3DConfig) -> None:
        super().__init__()
        self.tower: CLIPVisionModel | EfficientNetLite
        normal: dict[str, Any] = {}
        if isinstance(config.vision, EfficientNetLiteConfig):
            self.tower = EfficientNetLite(config.vision)
            normal = _IMAGENET
        else:
            shallow = copy.deepcopy(config.vision)
            shallow.num_hidden_layers = config.vision_layers
            self.tower = CLIPVisionModel(shallow)
        size = config.image_size
        self._patches = config.grid**2
        self._processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=False, **normal
        )

    @property
    def width(self) -> int:
        """C, the width of a patch feature."""
        return int(self.tower.config.hidden_size)

    @property
    def patches(self) -> int:
        """P, patches of an image."""
        return self._patches

    def preprocess(self, rgb: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """V images (H, W, 3) uint8 -> (V, 3, S, S) float32: short side to S (bicubic), centre crop, normalised.

        Raises:
            ValueError: for an image of another shape or dtype, or of a size beyond the limits of `scene.frames`: its
                short side is scaled to S, and a line of 3,000 pixels would become gigabytes.
        """
        for image in rgb:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"an image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
            check_size(image.shape[1], image.shape[0])
        batch = self._processor(list(rgb), input_data_format="channels_last", return_tensors="pt")
        pixels: torch.Tensor = batch["pixel_values"]
        return pixels

    @torch.no_grad()
    def forward(self, rgb: Sequence[NDArray[np.uint8]], *, chunk: int = 8) -> torch.Tensor:
        """V images (H, W, 3) uint8 -> (V, P, C) float32 patch features, row-major over the grid.

        `chunk` images go through the tower at a time, which bounds the memory of the activations.
        """
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        weight = next(self.tower.parameters())
        features = torch.empty((len(rgb), self.patches, self.width), dtype=torch.float32, device=weight.device)
        for start in range(0, len(rgb), chunk):
            pixels = self.preprocess(rgb[start : start + chunk]).to(weight.device, weight.dtype)
            if isinstance(self.tower, EfficientNetLite):
                features[start : start + chunk] = self.tower(pixels)
                continue
            hidden = self.tower(pixels).last_hidden_state  # the encoder's output, not passed through post_layernorm
            features[start : start + chunk] = hidden[:, 1:]  # the first row is the class token
        return features
