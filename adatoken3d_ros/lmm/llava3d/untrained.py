# SPDX-License-Identifier: Apache-2.0
"""A small model to be trained from nothing: config.json, vocabulary and first weights; see `lmm.untrained`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn

from adatoken3d_ros.lmm.interface import SpatialLMM
from adatoken3d_ros.lmm.llava3d import checkpoint
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.llava3d.prompt import TEMPLATES
from adatoken3d_ros.lmm.llava3d.tokenizer import LlamaTokenizer, llama_tokenizer, word_vocabulary
from adatoken3d_ros.lmm.llava3d.tokenizer import load_tokenizer as load_tokenizer
from adatoken3d_ros.lmm.untrained import ModelSize, Tokens, common_content, padded
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.scene.frames import PosedFrame
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, PatchPoints, patch_points

TOKENS: Tokens = "voxels"
PROMPT_WORDS = tuple(
    word for before, after in TEMPLATES.values() for word in (*before.split(), *after.format(question="").split())
)
ANSWER_LEAD = ""
LEARNS_PLACES = True

_REACH = 4.5  # metres from the middle of a room
_HEIGHTS = (-0.3, 3.0)  # metres
_POSITION_GAIN = 2.0


def tokenizer(words: Iterable[str]) -> LlamaTokenizer:
    """Words as single tokens, digits after the decimal point one by one, letters and bytes for the rest."""
    return llama_tokenizer(*word_vocabulary(words))


def config_content(size: ModelSize, vocab_size: int) -> dict[str, Any]:
    """The config.json of such a model."""
    vision = EfficientNetLiteConfig(size.image_size, size.taps, size.detector)
    return {
        **common_content(size, vocab_size),
        "mm_hidden_size": vision.hidden_size,
        "mm_vision_tower": "efficientnet-lite0",
        "vision_config": vision.to_dict(),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "mm_video_tower": "SpatialAwareModule",
        "num_frames": size.views,
        "voxel_size": size.voxel_size,
        "max_spatial_tokens": size.max_tokens,
    }


def make(content: Mapping[str, Any]) -> Llava3D:
    """The model with random weights; raises ConfigError."""
    return Llava3D(Llava3DConfig.from_dict(content))


def make_tower(content: Mapping[str, Any]) -> VisionTower:
    """Its vision tower alone."""
    return Llava3DConfig.from_dict(content).make_tower()


def official_names(model: SpatialLMM) -> dict[str, str]:
    """{name in the model: name in the checkpoint} of every tensor."""
    return checkpoint.official_names(cast(Llava3D, model))


def place_tokens(frame: PosedFrame, geometry: PatchGeometry, max_depth: float) -> PatchPoints:
    """The point of each patch."""
    return patch_points(frame, PatchConfig(geometry, max_depth))


def begin(model: SpatialLMM, generator: torch.Generator) -> None:
    """Positions that can be read."""
    model = cast(Llava3D, model)
    for layer in model.projector:
        if isinstance(layer, nn.Linear):
            nn.init.zeros_(layer.bias)
    for position in (model.position, model.click):
        spread_knots(position, generator)


def widened(name: str, old: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Zeros for the added channels; of the position MLP's hidden layer, which LayerNorm looks at as a whole, some of
    its units again, so that mean and deviation stay about what they were."""
    if name.startswith(("position.lift.", "position.norm.")) and shape[0] > len(old):
        return torch.cat([old, old[torch.arange(shape[0] - len(old)) * len(old) // (shape[0] - len(old))]])
    return padded(old, shape)


def spread_knots(position: PositionMLP, generator: torch.Generator) -> None:
    """Each unit of the hidden layer begins to say something at another place of a room.

    Three of four look along an axis, and where they change (the knots) is spread evenly, so that coordinates can be
    read off to centimetres; the others look in any direction. Without biases, LayerNorm would take away how far from
    the origin a point is.
    """
    width = position.lift.out_features
    direction = torch.nn.functional.normalize(torch.randn(width, 3, generator=generator), dim=1)
    knot = torch.empty(width).uniform_(-_REACH, _REACH, generator=generator)
    for axis, (low, high) in enumerate(((-_REACH, _REACH), (-_REACH, _REACH), _HEIGHTS)):
        rows = torch.arange(axis, 3 * width // 4, 3)
        # As far between the knots along each axis; half of the units look backwards.
        scale = 2 * _REACH / (high - low) * torch.where(torch.arange(len(rows)) % 2 == 0, 1.0, -1.0)
        direction[rows] = 0.0
        direction[rows, axis] = scale
        knot[rows] = scale * torch.linspace(low, high, len(rows))
    with torch.no_grad():
        position.lift.weight.copy_(direction)
        position.lift.bias.copy_(-knot)
        position.out.weight.mul_(_POSITION_GAIN)
        position.out.bias.zero_()
