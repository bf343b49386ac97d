# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite0 as a vision tower that gives one feature per patch: small enough for a robot without a GPU.

The network is the published one (Tan and Le 2019, arXiv:1905.11946; Lite: no squeeze-and-excitation, ReLU6), with batch
normalisation folded into the convolutions. One thing differs: convolutions of stride 2 are padded on both sides alike,
where TensorFlow pads on the right and below. Cell i of stride s then looks at pixel s * i, the very pixel whose depth
says where the patch is (`scene.patches`), instead of at pixel s * i + s - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from adatoken3d_ros.lmm.vision import ssd
from adatoken3d_ros.lmm.vision.tower import VisionTower, image_processor
from adatoken3d_ros.scene.geometry import PatchGeometry

MODEL_TYPE = "efficientnet_lite0"
PATCH = 16
STEM = 32
# expansion, kernel, stride, channels, blocks
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_BATCH_NORM_EPS = 1e-3
# Of ImageNet's pictures, which the network was trained on.
_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Sizes of the tower.

    Attributes:
        image_size: edge of the square image, pixels, a multiple of 32.
        taps: stages (1..7) whose output is used, 0 for the pixels; their channels, put side by side, are the feature.
        detector: whether the evidence of a detector (`ssd`) follows them, a channel for each of its classes.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    image_size: int = 224
    taps: tuple[int, ...] = (0, 3, 5, 7)
    detector: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 64 or self.image_size % 32:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 32 from 64 on")
        if not self.taps or sorted(set(self.taps)) != list(self.taps) or not 0 <= self.taps[0] <= self.taps[-1] <= 7:
            raise ValueError(f"taps {self.taps} must be ascending numbers from 0 to 7")

    @property
    def patch_size(self) -> int:
        """Pixels between two patches."""
        return PATCH

    @property
    def own_size(self) -> int:
        """Channels of a patch's feature that are the network's own."""
        return sum(3 if tap == 0 else STAGES[tap - 1][3] for tap in self.taps)

    @property
    def hidden_size(self) -> int:
        """C, channels of a patch's feature."""
        return self.own_size + len(ssd.CLASSES) * self.detector

    @property
    def flops_per_view(self) -> float:
        """Operations (two a multiply-add) on one image, up to the last tap."""
        size = self.image_size // 2
        channels, total = STEM, 2.0 * 27 * STEM * size * size + ssd.FLOPS * self.detector
        for expansion, kernel, stride, width, blocks in STAGES[: self.taps[-1]]:
            for block in range(blocks):
                wide = channels * expansion
                total += 2.0 * channels * wide * size * size * (expansion > 1)
                size //= stride if block == 0 else 1
                total += 2.0 * (kernel * kernel * wide + wide * width) * size * size
                channels = width
        return total

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EfficientNetLiteConfig:
        """From an object `vision_config` of a config.json.

        Raises:
            ValueError, TypeError: for a value that does not fit.
        """
        return cls(
            image_size=int(content.get("image_size", cls.image_size)),
            taps=tuple(int(tap) for tap in content.get("taps", cls.taps)),
            detector=bool(content.get("detector", False)),
        )

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, with the sizes that follow from it."""
        sizes = {
            "model_type": MODEL_TYPE,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_size": self.hidden_size,
            "taps": list(self.taps),
        }
        return {**sizes, "detector": True} if self.detector else sizes


class _Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; the input is added where shapes allow."""

    def __init__(self, channels: int, width: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand = nn.Conv2d(channels, wide, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, kernel // 2, groups=wide)
        self.project = nn.Conv2d(wide, width, 1)
        self.residual = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else functional.relu6(self.expand(x))
        out: Tensor = self.project(functional.relu6(self.depthwise(wide)))
        return x + out if self.residual else out


class EfficientNetLite(nn.Module):
    """Normalised images to patch features; built only as deep as the last tap."""

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Conv2d(3, STEM, 3, 2, 1)
        self.stages = nn.ModuleList()
        channels = STEM
        for expansion, kernel, stride, width, blocks in STAGES[: config.taps[-1]]:
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(_Block(channels, width, expansion, kernel, stride if block == 0 else 1))
                channels = width
            self.stages.append(stage)
        # Brings the taps to one scale; set from training images, see `training.pretrained`.
        self.feature_scale = nn.Parameter(torch.ones(config.own_size))
        self.feature_shift = nn.Parameter(torch.zeros(config.own_size))
        self.detector = ssd.SsdMobileNet() if config.detector else None

    def forward(self, pixels: Tensor) -> Tensor:
        """(V, 3, S, S) -> (V, P, C), patches row-major; patch (i, j) is centred on pixel (16 i, 16 j)."""
        side = pixels.shape[2] // PATCH
        taps = [_to_grid(pixels, side)] if 0 in self.config.taps else []
        x = functional.relu6(self.stem(pixels))
        for number, stage in enumerate(self.stages, 1):
            x = stage(x)
            if number in self.config.taps:
                taps.append(_to_grid(x, side))
        features = torch.cat(taps, dim=1).flatten(2).transpose(1, 2)
        return features * self.feature_scale + self.feature_shift


class EfficientNetTower(VisionTower):
    """The network behind its preprocessing."""

    tower: EfficientNetLite

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        geometry = PatchGeometry.square(config.image_size, config.image_size // PATCH)
        super().__init__(EfficientNetLite(config), geometry, width=config.hidden_size, normal=_IMAGENET)
        self._detected = image_processor(PatchGeometry.square(ssd.SIZE, 1), ssd.NORMAL)

    @property
    def flops_per_view(self) -> float:
        return self.tower.config.flops_per_view

    def features(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.tower(pixels)
        return out

    def look(self, rgb: Sequence[NDArray[np.uint8]]) -> Tensor:
        own = super().look(rgb)
        detector = self.tower.detector
        if detector is None:
            return own
        batch = self._detected(list(rgb), input_data_format="channels_last", return_tensors="pt")
        boxes, scores = detector(batch["pixel_values"].to(own.device, own.dtype))
        return torch.cat([own, ssd.EVIDENCE * ssd.painted(boxes, scores, self.geometry.rows)], dim=2)


def _to_grid(x: Tensor, side: int) -> Tensor:
    """(V, c, n, n), cells centred on multiples of their stride -> (V, c, side, side), centred on multiples of 16."""
    n = x.shape[2]
    if n >= side:
        ratio = n // side
        if ratio == 1:
            return x
        return functional.avg_pool2d(x, ratio + 1, ratio, ratio // 2, count_include_pad=False)
    # Every second patch lies between two cells; beyond the last cell its value is held.
    between = functional.interpolate(x, size=(2 * n - 1, 2 * n - 1), mode="bilinear", align_corners=True)
    return functional.pad(between, (0, 1, 0, 1), mode="replicate")


def fold_published(published: Mapping[str, Tensor], config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """Weights by the names of `EfficientNetLite`, from those of the PyTorch packages of EfficientNet-Lite0.

    Args:
        published: state dict with `_conv_stem`, `_bn0`, `_blocks.{k}._expand_conv`, ...; the classifier is not read.

    Raises:
        ValueError: if a tensor is missing.
    """

    def fold(convolution: str, norm: str, ours: str) -> None:
        try:
            weight = published[f"{convolution}.weight"].double()
            gain, bias, mean, var = (
                published[f"{norm}.{k}"].double() for k in ("weight", "bias", "running_mean", "running_var")
            )
        except KeyError as error:
            raise ValueError(f"the published weights lack {error}") from None
        factor = gain / torch.sqrt(var + _BATCH_NORM_EPS)
        folded[f"{ours}.weight"] = (weight * factor[:, None, None, None]).float()
        folded[f"{ours}.bias"] = (bias - mean * factor).float()

    folded: dict[str, Tensor] = {}
    fold("_conv_stem", "_bn0", "stem")
    number = 0
    for s, (expansion, _, _, _, blocks) in enumerate(STAGES[: config.taps[-1]]):
        for b in range(blocks):
            theirs, ours = f"_blocks.{number}", f"stages.{s}.{b}"
            if expansion > 1:
                fold(f"{theirs}._expand_conv", f"{theirs}._bn0", f"{ours}.expand")
            fold(f"{theirs}._depthwise_conv", f"{theirs}._bn1", f"{ours}.depthwise")
            fold(f"{theirs}._project_conv", f"{theirs}._bn2", f"{ours}.project")
            number += 1
    return folded
