# SPDX-License-Identifier: Apache-2.0
"""Sizes and constants of a LLaVA-3D model, read from the `config.json` of its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPVisionConfig, LlamaConfig

from adatoken3d_ros.lmm.config_values import (
    ConfigError,
    check_fixed,
    check_heads,
    check_values,
    chosen,
    described_tower,
    rope_theta,
    shape_hash,
)
from adatoken3d_ros.lmm.vision import efficientnet
from adatoken3d_ros.lmm.vision.clip import ClipTower
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig, EfficientNetTower
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.text import quoted, shown

VisionConfig = CLIPVisionConfig | EfficientNetLiteConfig

# Constants of the original implementation that its config.json does not carry.
VOXEL_SIZE = 0.2
MAX_SPATIAL_TOKENS = 2560
NUM_VIEWS = 20

# The published sizes of vision towers that checkpoints name without describing them.
KNOWN_VISION: dict[str, dict[str, Any]] = {
    "clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "projection_dim": 768,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}

_VISION_KEYS = (*KNOWN_VISION["clip-vit-large-patch14-336"],)
_LANGUAGE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REQUIRED_VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
)
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MOST_PATCHES = 2**14
_MOST_OF_A_SCENE = {"num_views": 10_000, "voxel_size": 100.0, "max_spatial_tokens": 2**20, "context_length": 2**24}
# Settings under which the published weights were trained; another value would need code that is not here.
_FIXED = {
    "model_type": ("llava_llama",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "mm_video_tower": ("SpatialAwareModule",),
    "rope_scaling": (None,),
}


@dataclass(frozen=True)
class Llava3DConfig:
    """What shapes a model.

    Attributes:
        language: sizes of the language model; D = `language.hidden_size`.
        vision: sizes of the whole vision tower; C = `vision.hidden_size`.
        select_layer: index into a CLIP tower's hidden states whose patches are used; -2: of the last layer but one.
        num_views: how many views of a scene the weights were trained with.
        voxel_size: edge of the voxels in which patches are averaged, metres.
        max_spatial_tokens: most spatial tokens that reach the language model.
        context_length: most tokens of prompt and answer together.
    """

    language: LlamaConfig
    vision: VisionConfig
    select_layer: int = -2
    num_views: int = NUM_VIEWS
    voxel_size: float = VOXEL_SIZE
    max_spatial_tokens: int = MAX_SPATIAL_TOKENS
    context_length: int = 4096

    def __post_init__(self) -> None:
        for key in ("image_size", "patch_size"):
            if not isinstance(getattr(self.vision, key), int):
                raise ConfigError(f"{key} of the vision tower must be one integer, got {getattr(self.vision, key)!r}")
        if self.image_size % self.patch_size:
            raise ConfigError(f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}")
        if self.grid**2 > _MOST_PATCHES:
            raise ConfigError(f"image_size {self.image_size} has {self.grid**2} patches, more than {_MOST_PATCHES}")
        if isinstance(self.vision, CLIPVisionConfig) and not 1 <= self.vision_layers <= self.vision.num_hidden_layers:
            raise ConfigError(
                f"mm_vision_select_layer {self.select_layer} is outside a tower of "
                f"{self.vision.num_hidden_layers} layers"
            )
        for name, most in _MOST_OF_A_SCENE.items():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
            if getattr(self, name) > most:
                raise ConfigError(f"{name} must be at most {most}, got {getattr(self, name)}")

    @property
    def image_size(self) -> int:
        """Edge of the square image that the vision tower sees, pixels."""
        return cast(int, self.vision.image_size)

    @property
    def patch_size(self) -> int:
        """Edge of a patch, pixels."""
        return cast(int, self.vision.patch_size)

    @property
    def grid(self) -> int:
        """Patches along an edge of the image."""
        return self.image_size // self.patch_size

    @property
    def vision_layers(self) -> int:
        """Layers (or stages) of the vision tower that run; CLIP's hidden state k is the output of its k-th layer."""
        if isinstance(self.vision, EfficientNetLiteConfig):
            return self.vision.taps[-1]
        layers = int(self.vision.num_hidden_layers)
        return self.select_layer if self.select_layer >= 0 else layers + 1 + self.select_layer

    def make_tower(self) -> VisionTower:
        """The vision tower with random weights."""
        if isinstance(self.vision, EfficientNetLiteConfig):
            return EfficientNetTower(self.vision)
        return ClipTower(self.vision, self.vision_layers)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], vision: Mapping[str, Any] | None = None) -> Llava3DConfig:
        """From the content of a checkpoint's config.json.

        The vision tower is described by an object `vision_config` inside `content`, else by the name in
        `mm_vision_tower` if it is a known one, else by `vision`, the content of the vision tower's own config.json.

        Raises:
            ConfigError: for a missing key, a value of the wrong kind or a setting that is not supported.
        """
        check_fixed(content, _FIXED)
        try:
            tower = _vision_config(content, vision)
            language = _language_config(content)
            config = cls(
                language=language,
                vision=tower,
                select_layer=int(content.get("mm_vision_select_layer", -2)),
                num_views=int(content.get("num_frames", NUM_VIEWS)),
                voxel_size=float(content.get("voxel_size", VOXEL_SIZE)),
                max_spatial_tokens=int(content.get("max_spatial_tokens", MAX_SPATIAL_TOKENS)),
                context_length=min(
                    int(content.get("tokenizer_model_max_length") or language.max_position_embeddings),
                    int(language.max_position_embeddings),
                ),
            )
        except ConfigError:
            raise
        except (StrictDataclassError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ConfigError(f"config.json has a wrong value: {shown(error, 300)}") from error
        width = content.get("mm_hidden_size", tower.hidden_size)
        if width != tower.hidden_size:
            raise ConfigError(f"mm_hidden_size is {quoted(width)}, but the vision tower is {tower.hidden_size} wide")
        return config

    def shape(self) -> dict[str, Any]:
        """Everything that shapes the model, as plain JSON values."""
        language = {key: getattr(self.language, key) for key in _LANGUAGE_KEYS}
        language["rope_theta"] = (self.language.rope_parameters or {})["rope_theta"]
        return {
            "language": language,
            "vision": self._vision_shape(),
            "select_layer": self.select_layer,
            "num_views": self.num_views,
            "voxel_size": self.voxel_size,
            "max_spatial_tokens": self.max_spatial_tokens,
            "context_length": self.context_length,
        }

    def _vision_shape(self) -> dict[str, Any]:
        if isinstance(self.vision, EfficientNetLiteConfig):
            return self.vision.to_dict()
        return {key: getattr(self.vision, key) for key in _VISION_KEYS}

    def hash(self) -> str:
        """16 hexadecimal digits that tell models of different shape apart (not different weights)."""
        return shape_hash(self.shape())


def _vision_config(content: Mapping[str, Any], vision: Mapping[str, Any] | None) -> VisionConfig:
    described = described_tower(content, vision, KNOWN_VISION)
    if described.get("model_type") == efficientnet.MODEL_TYPE:
        return EfficientNetLiteConfig.from_dict(described)
    values = chosen(described, _VISION_KEYS, _REQUIRED_VISION, "the vision tower's configuration")
    check_values(values, "the vision tower's ")
    return CLIPVisionConfig(**values, **_ATTENTION)


def _language_config(content: Mapping[str, Any]) -> LlamaConfig:
    rope = content.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ConfigError(f"rope_type is {quoted(rope['rope_type'])}, supported: 'default'")
    values = chosen(content, _LANGUAGE_KEYS, _REQUIRED, "config.json")
    values.setdefault("rms_norm_eps", 1e-5)
    values.setdefault("max_position_embeddings", 4096)
    check_values(values)
    check_heads(values)
    return LlamaConfig(
        **values,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta(content, 10000.0)},
        **_ATTENTION,
    )
