# SPDX-License-Identifier: Apache-2.0
"""A small model to be trained from nothing: config.json, vocabulary and first weights; see `lmm.untrained`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.untrained import ModelSize, Tokens, common_content, padded
from adatoken3d_ros.lmm.video3d import checkpoint
from adatoken3d_ros.lmm.video3d.config import Video3DConfig
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.places import mean_points
from adatoken3d_ros.lmm.video3d.prompt import SYSTEM
from adatoken3d_ros.lmm.video3d.tokenizer import load_tokenizer as load_tokenizer
from adatoken3d_ros.lmm.video3d.tokenizer import qwen_tokenizer, word_vocabulary
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchPoints

TOKENS: Tokens = "views"
PROMPT_WORDS = tuple(SYSTEM.rstrip(".").split())
ANSWER_LEAD = " "
LEARNS_PLACES = False  # sines of the places, for clicks as well

# Words of the conversation that stand behind a line break or a token of their own.
_BARE = ("system", "user", "assistant", SYSTEM.split()[0])
_CELL = 0.1  # metres
# A token's feature begins about as long as the sine that is added to it, sqrt(width / 2).
_FEATURE_GAIN = 4.0


def tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Words with a space before them as single tokens, digits one by one as Qwen2 splits them, bytes for the rest."""
    whole = [word for word in words if word[0] != "\n" and not any(letter.isdigit() for letter in word)]
    return qwen_tokenizer(*word_vocabulary([*whole, "[-", "-"], bare=_BARE))


def config_content(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    """The config.json of such a model; of its tokens the last one stands for points."""
    vision = EfficientNetLiteConfig(size.image_size, size.taps, size.detector)
    return {
        **common_content(size, vocab_size),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_tower": "efficientnet-lite0",
        "vision_config": vision.to_dict(),
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "rms_norm_eps": 1e-6,
        "use_sliding_window": False,
        "add_faster_video": False,
        "coord_token_ids": [vocab_size - 1],
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "world_position_embedding_type": "avg-discrete-sin3d",
        "voxel_size": _CELL,
        "min_xyz_range": [-15, -15, -5],
        "max_xyz_range": [15, 15, 5],
        "frames_upbound": size.views,
    }


def make(content: Mapping[str, Any]) -> Video3D:
    """The model with random weights; raises ConfigError."""
    return Video3D(Video3DConfig.from_dict(content))


def make_tower(content: Mapping[str, Any]) -> VisionTower:
    """Its vision tower alone."""
    return Video3DConfig.from_dict(content).make_tower()


def official_names(model: SpatialLMM) -> dict[str, str]:
    """{name in the model: name in the checkpoint} of every tensor."""
    return checkpoint.official_names(cast(Video3D, model))


def place_tokens(frame: PosedFrame, geometry: PatchGeometry, max_depth: float) -> PatchPoints:
    """The mean point of each token's pixels."""
    return mean_points(frame, geometry, max_depth)


def begin(model: SpatialLMM, generator: torch.Generator) -> None:
    """Features that are not drowned in the places that are added to them."""
    model = cast(Video3D, model)
    linear = [layer for layer in model.projector if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        linear[-1].weight.mul_(_FEATURE_GAIN)


def widened(name: str, old: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Zeros for the added channels."""
    return padded(old, shape)
