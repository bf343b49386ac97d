# SPDX-License-Identifier: Apache-2.0
"""Images to patch features: preprocessing, then a network, of which each file of this folder has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adatoken3d_ros.decoder.prefill import Cancelled
from adatoken3d_ros.scene.frames import check_size
from adatoken3d_ros.scene.geometry import PatchGeometry


def image_processor(geometry: PatchGeometry, normal: Mapping[str, Any] | None = None) -> Any:
    """What scales, crops and normalises images; see `VisionTower` for `normal`."""
    seen = {"height": geometry.height, "width": geometry.width}
    return CLIPImageProcessorPil(
        size={"shortest_edge": geometry.width} if geometry.crop else seen,
        crop_size=seen,
        do_convert_rgb=False,
        **(normal or {}),
    )


class VisionTower(nn.Module, ABC):
    """A network that gives one feature for each patch of an image.

    Args:
        tower: the network.
        geometry: of the image that it sees and its patches.
        width: C, the width of a patch's feature.
        normal: mean and deviation of the pixels that it was trained on, by the names of transformers' image processor;
            those of CLIP where there are none.
    """

    def __init__(
        self, tower: nn.Module, geometry: PatchGeometry, *, width: int, normal: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.tower = tower
        self.geometry = geometry
        self.patches = geometry.patches
        self.width = width
        self._processor = image_processor(geometry, normal)

    @property
    @abstractmethod
    def flops_per_view(self) -> float:
        """Operations (two a multiply-add) on one image."""

    @abstractmethod
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (V, 3, height, width) -> (V, P, C), row-major over the grid."""

    def restore_buffers(self, device: torch.device) -> None:
        """Fills what is computed and in no checkpoint, after the network was made without memory."""

    def preprocess(self, rgb: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """V images (H, W, 3) uint8 -> (V, 3, height, width) float32: scaled (bicubic) and cropped as the geometry says,
        normalised.

        Raises:
            ValueError: for an image of another shape or dtype, or of a size beyond the limits of `scene.frames`: its
                short side is scaled to the image's, and a line of 3,000 pixels would become gigabytes.
        """
        for image in rgb:
            if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
                raise ValueError(f"an image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
            check_size(image.shape[1], image.shape[0])
        batch = self._processor(list(rgb), input_data_format="channels_last", return_tensors="pt")
        pixels: torch.Tensor = batch["pixel_values"]
        return pixels

    @contextmanager
    def interruptible(self, should_stop: Callable[[], bool] | None) -> Iterator[None]:
        """Within it, the tower raises Cancelled before the next of its innermost layers once should_stop() is true."""
        if should_stop is None:
            yield
            return

        def look(layer: nn.Module, _: object) -> None:
            if should_stop():
                raise Cancelled(f"stopped before a {type(layer).__name__}")

        hooks = [part.register_forward_pre_hook(look) for part in self.modules() if not list(part.children())]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

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
            features[start : start + chunk] = self.look(rgb[start : start + chunk])
        return features

    def look(self, rgb: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """As `forward`, all images at a time."""
        weight = next(self.tower.parameters())
        return self.features(self.preprocess(rgb).to(weight.device, weight.dtype))
