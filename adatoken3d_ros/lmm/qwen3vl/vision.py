# SPDX-License-Identifier: Apache-2.0
"""The vision tower: an image of any size to one token for each merged patch, and what the first layers add to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel, Qwen3VLVisionRotaryEmbedding

from adatoken3d_ros.lmm.qwen3vl.config import Qwen3VLSettings
from adatoken3d_ros.lmm.qwen3vl.geometry import grid_of
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.frames import check_size


class Qwen3VLTower(VisionTower):
    """transformers' own tower, one image at a time.

    A token's feature is (1 + K) * D wide: the token itself, then what DeepStack adds after each of the first K layers.
    """

    def __init__(self, settings: Qwen3VLSettings) -> None:
        nn.Module.__init__(self)
        self.settings = settings
        self.tower = Qwen3VLVisionModel(settings.vision)
        self.geometry = settings.geometry
        self.patches = settings.tokens_per_view
        self.width = int(settings.vision.out_hidden_size) * (1 + len(settings.vision.deepstack_visual_indexes))
        self._images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": settings.pixels[0], "longest_edge": settings.pixels[1]},
            patch_size=settings.patch_size,
            merge_size=settings.vision.spatial_merge_size,
            temporal_patch_size=cast(int, settings.vision.temporal_patch_size),
            image_mean=list(settings.mean),
            image_std=list(settings.std),
            do_convert_rgb=False,
        )

    @property
    def flops_per_view(self) -> float:
        vision, merge = self.settings.vision, int(self.settings.vision.spatial_merge_size) ** 2
        n, width, inner = self.patches * merge, int(vision.hidden_size), int(vision.intermediate_size)
        pixels = int(vision.in_channels) * cast(int, vision.temporal_patch_size) * self.settings.patch_size**2
        layer = 2 * n * (4 * width**2 + 2 * width * inner) + 4 * n**2 * width
        wide, mergers = width * merge, 1 + len(vision.deepstack_visual_indexes)
        merging = 2 * self.patches * mergers * (wide**2 + wide * int(vision.out_hidden_size))
        return float(2 * n * pixels * width + int(vision.depth) * layer + merging)

    def restore_buffers(self, device: torch.device) -> None:
        self.tower.rotary_pos_emb = Qwen3VLVisionRotaryEmbedding(self.settings.vision).to(device)

    def preprocess(self, rgb: Sequence[NDArray[np.uint8]]) -> Tensor:
        """One image (H, W, 3) uint8 -> (n, C * T * p * p) float32, the pixels of its patches as the tower reads them.

        Raises:
            ValueError: for an image of another shape or dtype, beyond the limits of `scene.frames`, or smaller than a
                merged patch.
        """
        (image,) = rgb
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"an image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
        check_size(image.shape[1], image.shape[0])
        grid_of(image.shape[0], image.shape[1], self.settings.stride, self.settings.pixels)
        found = self._images([image], input_data_format="channels_last", return_tensors="pt")
        return cast(Tensor, found["pixel_values"])

    def features(self, pixels: Tensor) -> Tensor:
        raise NotImplementedError("an image's patches are read with their grid: see `view`")

    @torch.no_grad()
    def view(self, image: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) uint8 -> (rows * columns, (1 + K) * D) float32, row-major over the image's own grid."""
        weight = next(self.tower.parameters())
        settings, merge = self.settings, int(self.settings.vision.spatial_merge_size)
        pixels = self.preprocess([image])
        rows, columns = grid_of(image.shape[0], image.shape[1], settings.stride, settings.pixels)
        grid = torch.tensor([[1, rows * merge, columns * merge]], device=weight.device)
        found = self.tower(pixels.to(weight.device, weight.dtype), grid_thw=grid, return_dict=True)
        return torch.cat([found.pooler_output, *found.deepstack_features], dim=1).float()

    def forward(self, rgb: Sequence[NDArray[np.uint8]], *, chunk: int = 8) -> Tensor:
        """V images of one size -> (V, P, (1 + K) * D) float32."""
        return torch.stack([self.view(image) for image in rgb])
