# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPVisionModel

from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.vision.tower import VisionTower

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def small_config(**changes: object) -> Llava3DConfig:
    """A tower of 3 layers on 4 x 4 patches."""
    content = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
        },
    }
    return Llava3DConfig.from_dict({**content, **changes})


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    torch.manual_seed(0)
    return small_config().make_tower().eval()


def _images(*sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for w, h in sizes]


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (56, 56), (61, 57), (57, 61), (1296, 968), (40, 300)])
def test_preprocessing_is_resize_crop_normalise(tower, size):
    (image,) = _images(size)
    width, height = size
    short = min(size)
    resized = (int(56 * width / short), int(56 * height / short))
    left, top = (resized[0] - 56) // 2, (resized[1] - 56) // 2
    pixels = np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.BICUBIC))
    expected = (pixels[top : top + 56, left : left + 56] / 255.0 - MEAN) / STD
    got = tower.preprocess([image])
    assert got.shape == (1, 3, 56, 56) and got.dtype == torch.float32
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_torchvision_is_not_needed():
    assert "torchvision" not in sys.modules


@pytest.mark.parametrize("select", [-2, -1, -3, 1])
def test_shallow_tower_equals_the_hidden_state_of_the_whole_one(select):
    torch.manual_seed(0)
    config = small_config(mm_vision_select_layer=select)
    whole = CLIPVisionModel(config.vision).eval()
    shallow = config.make_tower().eval()
    kept = {name: value for name, value in whole.state_dict().items() if name in shallow.tower.state_dict()}
    shallow.tower.load_state_dict(kept)
    images = _images((80, 60), (56, 90))
    with torch.no_grad():
        hidden = whole(shallow.preprocess(images), output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    torch.testing.assert_close(shallow(images), hidden[select][:, 1:], rtol=0, atol=1e-6)
    assert len(shallow.tower.encoder.layers) == config.vision_layers


def test_views_in_chunks_equal_views_at_once(tower):
    images = _images((60, 60), (80, 60), (60, 80), (70, 56), (56, 56))
    at_once = tower(images, chunk=5)
    assert at_once.shape == (5, 16, 32) and at_once.dtype == torch.float32 and not at_once.requires_grad
    for chunk in (1, 2, 4, 99):
        torch.testing.assert_close(tower(images, chunk=chunk), at_once, rtol=0, atol=1e-5)


def test_patches_are_row_major(tower):
    # Changing the pixels of one patch of an image that is not resized changes that patch's embedding alone.
    image = np.zeros((56, 56, 3), dtype=np.uint8)
    marked = image.copy()
    marked[14:28, 42:56] = 255  # row 1, column 3 of the 4 x 4 grid
    embed = tower.tower.embeddings
    with torch.no_grad():
        a, b = (embed(tower.preprocess([i]))[0, 1:] for i in (image, marked))
    assert (a != b).any(dim=1).nonzero().flatten().tolist() == [7]


def test_reduced_precision_gives_float32_features():
    torch.manual_seed(0)
    tower = small_config().make_tower().to(torch.bfloat16).eval()
    features = tower(_images((60, 60)))
    assert features.dtype == torch.float32 and torch.isfinite(features).all()


def test_no_image(tower):
    assert tower([]).shape == (0, 16, 32)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(tower, image):
    with pytest.raises(ValueError, match="must be|empty"):
        tower([image])


def test_chunk_of_nothing_is_refused(tower):
    with pytest.raises(ValueError, match="got 0"):
        tower(_images((60, 60)), chunk=0)


def test_config_is_left_as_it_was():
    config: Llava3DConfig = small_config()
    config.make_tower()
    assert config.vision.num_hidden_layers == 3
