# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from adatoken3d_ros.lmm.llava3d.config import ConfigError, Llava3DConfig
from adatoken3d_ros.lmm.vision.efficientnet import (
    STAGES,
    EfficientNetLite,
    EfficientNetLiteConfig,
    EfficientNetTower,
    fold_published,
)

LANGUAGE = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def _config(**vision: object) -> Llava3DConfig:
    return Llava3DConfig.from_dict({**LANGUAGE, "vision_config": {"model_type": "efficientnet_lite0", **vision}})


def _tower(config: EfficientNetLiteConfig) -> EfficientNetLite:
    torch.manual_seed(0)
    return EfficientNetLite(config).eval()


def test_sizes_from_a_config() -> None:
    config = _config(image_size=96, taps=[0, 5])
    assert (config.grid, config.patch_size, config.vision.hidden_size, config.vision_layers) == (6, 16, 115, 5)
    assert _config().vision == EfficientNetLiteConfig(224, (0, 3, 5, 7))
    assert EfficientNetLiteConfig().hidden_size == 3 + 40 + 112 + 320
    assert config.hash() != _config(image_size=96, taps=[0, 6]).hash()
    again = Llava3DConfig.from_dict({**LANGUAGE, "vision_config": config.vision.to_dict()})
    assert again.hash() == config.hash()


@pytest.mark.parametrize(
    ("vision", "message"),
    [({"image_size": 100}, "image_size 100"), ({"taps": [5, 3]}, r"taps \(5, 3\)"), ({"taps": [8]}, r"taps \(8,\)")],
)
def test_sizes_that_do_not_fit_are_refused(vision: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _config(**vision)


def test_features_of_images() -> None:
    tower = _config(image_size=96).make_tower().eval()
    images = [np.random.default_rng(k).integers(0, 256, (120, 160, 3), dtype=np.uint8) for k in range(3)]
    features = tower(images, chunk=2)
    assert features.shape == (3, 36, 475) and features.dtype == torch.float32
    torch.testing.assert_close(features[1:2], tower(images[1:2]), rtol=1e-4, atol=1e-5)


def test_a_patch_is_centred_on_the_pixel_whose_depth_it_gets() -> None:
    """A dot at pixel (16 i, 16 j) changes the feature of patch (i, j) most, and its neighbours alike."""
    tower = _tower(EfficientNetLiteConfig(128, (0, 3, 5)))
    for block in tower.modules():  # positive, symmetric filters: what is left is where they look
        if isinstance(block, torch.nn.Conv2d):
            torch.nn.init.constant_(block.weight, 1 / block.weight[0].numel())
            torch.nn.init.zeros_(block.bias)
    image = torch.zeros(2, 3, 128, 128)
    image[1, :, 64, 64] = 1.0
    with torch.no_grad():
        features = tower(image)
    change = (features[1] - features[0]).abs()
    for channels in (change[:, :3], change[:, 3:43], change[:, 43:]):
        grid = channels.sum(dim=1).unflatten(0, (8, 8))
        assert int(grid.argmax()) == 4 * 8 + 4
        torch.testing.assert_close(grid[3, 4], grid[5, 4], rtol=0.02, atol=0)
        torch.testing.assert_close(grid[4, 3], grid[4, 5], rtol=0.02, atol=0)


def test_deep_features_are_spread_over_the_patches_between_their_cells() -> None:
    from adatoken3d_ros.lmm.vision.efficientnet import _to_grid

    deep = torch.tensor([[[[0.0, 2.0], [4.0, 6.0]]]])
    expected = torch.tensor([[0.0, 1, 2, 2], [2, 3, 4, 4], [4, 5, 6, 6], [4, 5, 6, 6]])
    assert torch.equal(_to_grid(deep, 4)[0, 0], expected)


def unfolded(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights by the published names, with the batch norms still apart."""
    weights: dict[str, torch.Tensor] = {}

    def layer(name: str, norm: str, shape: tuple[int, ...]) -> None:
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / (shape[1] * shape[2] ** 2)) ** 0.5
        for key in ("weight", "running_var"):
            weights[f"{norm}.{key}"] = 0.5 + torch.rand(shape[0], generator=generator)
        for key in ("bias", "running_mean"):
            weights[f"{norm}.{key}"] = 0.2 * torch.randn(shape[0], generator=generator)

    layer("_conv_stem", "_bn0", (32, 3, 3, 3))
    channels, number = 32, 0
    for expansion, kernel, _, width, blocks in STAGES:
        for _ in range(blocks):
            prefix, wide = f"_blocks.{number}", channels * expansion
            if expansion > 1:
                layer(f"{prefix}._expand_conv", f"{prefix}._bn0", (wide, channels, 1, 1))
            layer(f"{prefix}._depthwise_conv", f"{prefix}._bn1", (wide, 1, kernel, kernel))
            layer(f"{prefix}._project_conv", f"{prefix}._bn2", (width, wide, 1, 1))
            channels, number = width, number + 1
    return weights


def _published_forward(weights: dict[str, torch.Tensor], x: torch.Tensor) -> list[torch.Tensor]:
    """The network as published, slowly: TensorFlow's padding, batch norms apart. The output of each stage."""

    def layer(x: torch.Tensor, name: str, norm: str, stride: int = 1, groups: int = 1) -> torch.Tensor:
        weight = weights[f"{name}.weight"]
        kernel, size = weight.shape[2], x.shape[2]
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        low = total // 2
        x = functional.pad(x, (low, total - low, low, total - low))
        x = functional.conv2d(x, weight, stride=stride, groups=groups)
        gain, bias, mean, var = (weights[f"{norm}.{k}"] for k in ("weight", "bias", "running_mean", "running_var"))
        return functional.batch_norm(x, mean, var, gain, bias, eps=1e-3)

    x = functional.relu6(layer(x, "_conv_stem", "_bn0", 2))
    outputs, number = [], 0
    for expansion, _, stride, width, blocks in STAGES:
        for block in range(blocks):
            prefix, y = f"_blocks.{number}", x
            if expansion > 1:
                y = functional.relu6(layer(y, f"{prefix}._expand_conv", f"{prefix}._bn0"))
            step = stride if block == 0 else 1
            y = functional.relu6(layer(y, f"{prefix}._depthwise_conv", f"{prefix}._bn1", step, y.shape[1]))
            y = layer(y, f"{prefix}._project_conv", f"{prefix}._bn2")
            x = x + y if step == 1 and x.shape[1] == width else y
            number += 1
        outputs.append(x)
    return outputs


def test_folded_and_centred_it_is_the_published_network_one_pixel_further() -> None:
    """Cell i looks at pixel s i here and at s i + s - 1 there: on an image moved by one pixel, at the same, one on."""
    generator = torch.Generator().manual_seed(1)
    weights = unfolded(generator)
    config = EfficientNetLiteConfig(512)
    tower = EfficientNetLite(config).eval()
    missing = tower.load_state_dict(fold_published(weights, config), strict=False)
    assert missing.missing_keys == ["feature_scale", "feature_shift"] and not missing.unexpected_keys
    image = functional.interpolate(torch.randn(1, 3, 32, 32, generator=generator), size=512, mode="bicubic")
    moved = functional.pad(image, (1, 0, 1, 0))[:, :, :512, :512]
    with torch.no_grad():
        published = _published_forward(weights, image)
        x = functional.relu6(tower.stem(moved))
        for stage, theirs in zip(tower.stages, published, strict=True):
            x = stage(x)
            middle = x.shape[2] // 2  # far from the edges, where the paddings differ
            if theirs.shape[2] >= 32:
                ours = x[..., middle + 1, middle + 1]
                torch.testing.assert_close(ours, theirs[..., middle, middle], rtol=1e-3, atol=1e-3)


def test_published_weights_that_lack_a_tensor_are_refused() -> None:
    weights = unfolded(torch.Generator().manual_seed(1))
    del weights["_blocks.3._bn1.running_var"]
    with pytest.raises(ValueError, match=r"_blocks\.3\._bn1\.running_var"):
        fold_published(weights, EfficientNetLiteConfig())


def test_operations_of_the_tower() -> None:
    """The published network has 407 M multiply-adds at 224 pixels, of which head and classifier are 21.4 M."""
    assert EfficientNetLiteConfig(224, (7,)).flops_per_view / 2 == pytest.approx(407e6 - 21.4e6, rel=0.06)
    assert EfficientNetTower(EfficientNetLiteConfig()).flops_per_view == EfficientNetLiteConfig().flops_per_view
    assert EfficientNetLiteConfig(64, (0,)).flops_per_view == 2 * 27 * 32 * 32 * 32
