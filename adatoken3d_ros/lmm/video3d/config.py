# SPDX-License-Identifier: Apache-2.0
"""Sizes and constants of a model of the Video-3D LLM family, read from the `config.json` of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen2Config, SiglipVisionConfig

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
from adatoken3d_ros.lmm.vision.efficientnet import EfficientNetLiteConfig, EfficientNetTower
from adatoken3d_ros.lmm.vision.siglip import SiglipTower
from adatoken3d_ros.lmm.vision.tower import VisionTower
from adatoken3d_ros.text import quoted, shown

VisionConfig = SiglipVisionConfig | EfficientNetLiteConfig

# Constants of the original implementation that its config.json need not carry.
NUM_VIEWS = 32
CELL = 0.1
TEMPERATURE = 0.07  # of the grounding head
LOW, HIGH = (-15.0, -15.0, -5.0), (15.0, 15.0, 5.0)
# Of the map by which views are kept or dropped; the model itself knows no voxels.
VOXEL_SIZE = 0.2

# The published sizes of vision towers that checkpoints name without describing them.
KNOWN_VISION: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
}
_VISION_KEYS = (*KNOWN_VISION["siglip-so400m-patch14-384"],)
_LANGUAGE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
_REQUIRED_VISION = _VISION_KEYS[:6]
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}
_MOST = {"num_views": 10_000, "cell": 100.0, "context_length": 2**24, "grounding": 1e3}
_MOST_PATCHES = 2**14
# Settings under which the published weights were trained; another value would need code that is not here.
_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llava_qwen",),
    "world_position_embedding_type": ("avg-discrete-sin3d",),
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "mm_newline_position": ("grid",),
    "mm_spatial_pool_mode": ("bilinear",),
    "mm_spatial_pool_stride": (2,),
    "mm_vision_select_feature": ("patch",),
    "mm_use_im_start_end": (False,),
    "mm_use_im_patch_token": (False,),
    "add_faster_video": (False,),
    "use_sliding_window": (False,),
    "use_pos_skipping": (False,),
}
_REQUIRED_SETTINGS = ("world_position_embedding_type", "mm_spatial_pool_mode", "mm_spatial_pool_stride")


@dataclass(frozen=True)
class Video3DConfig:
    """What shapes a model.

    Attributes:
        language: sizes of the language model; D = `language.hidden_size`.
        vision: sizes of the whole vision tower; of SigLIP the last layer never runs.
        coord_token: id of the token that stands for a point in a question; None for a model without one.
        grounding: temperature of the head that points at boxes; None for a model without one.
        num_views: how many views of a scene the weights were trained with.
        cell: edge of the cells to which places are rounded, metres.
        low, high: corners of the box to which places are clamped, metres.
        context_length: most tokens of prompt and answer together.
        average_missing_depth: a pixel without depth counts for its token's place, at the camera, as in the original;
            else it does not count.
    """

    language: Qwen2Config
    vision: VisionConfig
    coord_token: int | None = None
    grounding: float | None = None
    num_views: int = NUM_VIEWS
    cell: float = CELL
    low: tuple[float, float, float] = LOW
    high: tuple[float, float, float] = HIGH
    context_length: int = 32768
    average_missing_depth: bool = False

    def __post_init__(self) -> None:
        for key in ("image_size", "patch_size"):
            if not isinstance(getattr(self.vision, key), int):
                raise ConfigError(f"{key} of the vision tower must be one integer, got {getattr(self.vision, key)!r}")
        if not 2 <= self.patches <= math.isqrt(_MOST_PATCHES):
            raise ConfigError(
                f"image_size {self.image_size} has {self.patches} patches of {self.vision.patch_size} pixels along an "
                f"edge, not 2 to {math.isqrt(_MOST_PATCHES)}"
            )
        if self.vision_layers < 1:
            raise ConfigError(f"a vision tower of {self.vision_layers + 1} layers has none without its last")
        for name, most in _MOST.items():
            if getattr(self, name) is not None and not 0 < getattr(self, name) <= most:
                raise ConfigError(f"{name} must be positive and at most {most}, got {getattr(self, name)}")
        for low, high in zip(self.low, self.high, strict=True):
            if not -1e6 <= low < high <= 1e6:
                raise ConfigError(f"places are clamped to {list(self.low)} to {list(self.high)}, which is no box")

    @property
    def image_size(self) -> int:
        """Edge of the square image that the vision tower sees, pixels."""
        return cast(int, self.vision.image_size)

    @property
    def patches(self) -> int:
        """Patches along an edge of the image; pixels of the last one that is not whole are not seen."""
        return self.image_size // cast(int, self.vision.patch_size)

    @property
    def grid(self) -> int:
        """Tokens along an edge, of two patches each."""
        return math.ceil(self.patches / 2)

    @property
    def vision_layers(self) -> int:
        """Layers (or stages) of the vision tower that run."""
        return _TOWERS[self.vision.model_type].layers(self.vision)

    def make_tower(self) -> VisionTower:
        """The vision tower with random weights."""
        return _TOWERS[self.vision.model_type].make(self.vision)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], vision: Mapping[str, Any] | None = None) -> Video3DConfig:
        """From the content of a checkpoint's config.json.

        The vision tower is described by an object `vision_config` inside `content`, else by the name in
        `mm_vision_tower` if it is a known one, else by `vision`, the content of the vision tower's own config.json.

        Raises:
            ConfigError: for a missing key, a value of the wrong kind or a setting that is not supported.
        """
        for key in _REQUIRED_SETTINGS:
            if key not in content:
                raise ConfigError(f"config.json lacks {key}; without positions in 3D it is no model of a scene")
        check_fixed(content, _FIXED)
        try:
            tower, language = _vision_config(content, vision), _language_config(content)
            coord = content.get("coord_token_ids")
            config = cls(
                language=language,
                vision=tower,
                coord_token=None if coord is None else _one_token(coord),
                grounding=_temperature(content) if content.get("ground_head_type") == "infonce" else None,
                num_views=int(content.get("frames_upbound") or NUM_VIEWS),
                cell=float(content.get("voxel_size") or CELL),
                low=_corner(content.get("min_xyz_range") or LOW),
                high=_corner(content.get("max_xyz_range") or HIGH),
                context_length=min(
                    int(content.get("tokenizer_model_max_length") or language.max_position_embeddings),
                    int(language.max_position_embeddings),
                ),
                average_missing_depth=_switch(content, "average_missing_depth"),
            )
        except ConfigError:
            raise
        except (StrictDataclassError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ConfigError(f"config.json has a wrong value: {shown(error, 300)}") from error
        width = content.get("mm_hidden_size", tower.hidden_size)
        if width != tower.hidden_size:
            raise ConfigError(f"mm_hidden_size is {quoted(width)}, but the vision tower is {tower.hidden_size} wide")
        return config

    def hash(self) -> str:
        """16 hexadecimal digits that tell models of different shape apart (not different weights)."""
        language = {key: getattr(self.language, key) for key in _LANGUAGE_KEYS}
        language["rope_theta"] = (self.language.rope_parameters or {})["rope_theta"]
        shape = {
            "family": "video3d",
            "language": language,
            "vision": _TOWERS[self.vision.model_type].shape(self.vision),
            **{name: getattr(self, name) for name in ("coord_token", "num_views", "cell", "low", "high")},
            "context_length": self.context_length,
            **({"average_missing_depth": True} if self.average_missing_depth else {}),
            **({} if self.grounding is None else {"grounding": self.grounding}),
        }
        return shape_hash(shape)


def _switch(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{key} is {quoted(value)}, neither true nor false")
    return value


def _temperature(content: Mapping[str, Any]) -> float:
    if "patch14" not in (features := content.get("object_feature_type", "patch14-pe")):
        raise ConfigError(f"object_feature_type is {quoted(features)}, supported: 'patch14-pe'")
    return float(content.get("ground_head_temperature") or TEMPERATURE)


def _one_token(ids: Any) -> int:
    if not isinstance(ids, list) or len(ids) != 1 or type(ids[0]) is not int:
        raise ConfigError(f"coord_token_ids is {quoted(ids)}, not a list of one token")
    return ids[0]


def _corner(values: Any) -> tuple[float, float, float]:
    x, y, z = (float(value) for value in values)
    return x, y, z


class _Tower(NamedTuple):
    """What a kind of vision tower is made of: its sizes as a config.json describes them, and what follows from them."""

    read: Callable[[Mapping[str, Any]], VisionConfig]
    layers: Callable[[Any], int]
    make: Callable[[Any], VisionTower]
    shape: Callable[[Any], dict[str, Any]]


def _siglip(described: Mapping[str, Any]) -> SiglipVisionConfig:
    values = chosen(described, _VISION_KEYS, _REQUIRED_VISION, "the vision tower's configuration")
    check_values(values, "the vision tower's ")
    return SiglipVisionConfig(**values, **_ATTENTION)


def _siglip_layers(sizes: SiglipVisionConfig) -> int:
    return int(sizes.num_hidden_layers) - 1


# By the `model_type` of what describes it. Where that is another or none it is SigLIP, as in the releases.
_TOWERS = {
    SiglipVisionConfig.model_type: _Tower(
        _siglip,
        _siglip_layers,
        lambda sizes: SiglipTower(sizes, _siglip_layers(sizes)),
        lambda sizes: {key: getattr(sizes, key) for key in _VISION_KEYS},
    ),
    efficientnet.MODEL_TYPE: _Tower(
        EfficientNetLiteConfig.from_dict,
        lambda sizes: int(sizes.taps[-1]),
        EfficientNetTower,
        EfficientNetLiteConfig.to_dict,
    ),
}


def _vision_config(content: Mapping[str, Any], vision: Mapping[str, Any] | None) -> VisionConfig:
    described = described_tower(content, vision, KNOWN_VISION)
    kind = described.get("model_type")
    known = kind if isinstance(kind, str) and kind in _TOWERS else SiglipVisionConfig.model_type
    return _TOWERS[known].read(described)


def _language_config(content: Mapping[str, Any]) -> Qwen2Config:
    values = chosen(content, _LANGUAGE_KEYS, _REQUIRED, "config.json")
    values.setdefault("rms_norm_eps", 1e-6)
    values.setdefault("max_position_embeddings", 32768)
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    check_values(values)
    # A `rope_scaling` is not looked at, as the original sets it to none.
    check_heads(values)
    return Qwen2Config(
        **values,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta(content, 1e6)},
        **_ATTENTION,
    )
