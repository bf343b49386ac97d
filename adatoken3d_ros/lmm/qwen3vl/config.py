# SPDX-License-Identifier: Apache-2.0
"""Sizes of a Qwen3-VL model, read from the `config.json` and `preprocessor_config.json` of its checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from huggingface_hub.errors import StrictDataclassError
from transformers import Qwen3VLTextConfig
from transformers.activations import ACT2FN
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from adatoken3d_ros.lmm.config_values import ConfigError, shape_hash
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.text import quoted, shown

# Not in the files: the original knows nothing of scenes. Views of 640 x 480 pixels are 300 tokens each.
NUM_VIEWS = 20
VOXEL_SIZE = 0.1
MAX_VIEW_PIXELS = 640 * 480
MAX_CONTEXT = 32_768  # tokens that a prompt may have, of the 256 k that the model was made for

_LANGUAGE_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "hidden_act",
    "rms_norm_eps",
    "attention_bias",
)
_VISION_KEYS = (
    "depth",
    "hidden_size",
    "intermediate_size",
    "num_heads",
    "in_channels",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "out_hidden_size",
    "num_position_embeddings",
    "deepstack_visual_indexes",
    "hidden_act",
)
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}
_NO_NUMBERS = ("hidden_act", "rms_norm_eps", "attention_bias", "deepstack_visual_indexes")
_OPTIONAL = ("hidden_act", "attention_bias", "rms_norm_eps", "num_key_value_heads", "head_dim", "in_channels")
_MOST = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "out_hidden_size": 2**16,
    "intermediate_size": 2**18,
    "max_position_embeddings": 2**24,
    "num_position_embeddings": 2**20,
}
_MOST_ELSE = 4096
_TOKENS = ("image_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True)
class Qwen3VLSettings:
    """What shapes a model.

    Attributes:
        language, vision: sizes of the language model and of the vision tower, as transformers reads them.
        tied: whether the output layer is the embedding table.
        image_token, vision_start, vision_end: ids of the tokens that stand for a patch, and around a view's.
        pixels: fewest and most pixels of a view, which is resized where it has others.
        mean, std: of the pixels, by channel.
        num_views, voxel_size, context_length: see `ModelSizes`.
    """

    language: Qwen3VLTextConfig
    vision: Qwen3VLVisionConfig
    tied: bool
    image_token: int
    vision_start: int
    vision_end: int
    pixels: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    num_views: int = NUM_VIEWS
    voxel_size: float = VOXEL_SIZE
    context_length: int = MAX_CONTEXT

    @property
    def patch_size(self) -> int:
        """Edge of a patch before merging, pixels."""
        return cast(int, self.vision.patch_size)

    @property
    def stride(self) -> int:
        """Edge of a merged patch, which is one token, in pixels of the resized image."""
        return self.patch_size * int(self.vision.spatial_merge_size)

    @property
    def tokens_per_view(self) -> int:
        """Most tokens of a view."""
        return self.pixels[1] // self.stride**2

    @property
    def geometry(self) -> PatchGeometry:
        """Of a view three quarters as high as wide, as most cameras' are, with the most tokens; others keep theirs."""
        rows = max(1, math.isqrt(self.tokens_per_view * 3 // 4))
        columns = self.tokens_per_view // rows
        return PatchGeometry(rows * self.stride, columns * self.stride, rows, columns, crop=False)

    def hash(self) -> str:
        """16 hexadecimal digits that tell models of another shape or preprocessing apart."""
        shape = {
            "architecture": "qwen3_vl",
            "language": {key: getattr(self.language, key) for key in _LANGUAGE_KEYS},
            "rope": cast(dict[str, Any], self.language.rope_parameters),
            "vision": {key: getattr(self.vision, key) for key in _VISION_KEYS},
            "rest": [self.tied, self.pixels, self.mean, self.std, self.voxel_size],
            "marks": [self.vision_start, self.vision_end],
            "context_length": self.context_length,
        }
        return shape_hash(shape)

    @classmethod
    def from_dicts(cls, content: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> Qwen3VLSettings:
        """From the contents of config.json and of preprocessor_config.json (empty: the published one).

        Raises:
            ConfigError: for a missing key, a value of the wrong kind or a setting that is not supported.
        """
        text, tower = _part(content, "text_config"), _part(content, "vision_config")
        language_values, vision_values = (
            _values(text, _LANGUAGE_KEYS, "text_config"),
            _values(tower, _VISION_KEYS, "vision_config"),
        )
        rope = _rope(text, int(language_values["head_dim"]))
        _check_tower(vision_values, language_values)
        try:
            language = Qwen3VLTextConfig(**language_values, rope_parameters=rope, **_ATTENTION)
            vision = Qwen3VLVisionConfig(**vision_values, **_ATTENTION)
        except (TypeError, ValueError, StrictDataclassError) as error:
            raise ConfigError(f"config.json describes no model: {shown(error, 300)}") from error
        tokens = []
        for key in _TOKENS:
            value = content.get(key)
            if type(value) is not int or not 0 <= value < int(language.vocab_size):
                raise ConfigError(f"{key} is {quoted(value)}, the vocabulary has {language.vocab_size} tokens")
            tokens.append(value)
        tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        if not isinstance(tied, bool):
            raise ConfigError(f"tie_word_embeddings is {quoted(tied)}, neither true nor false")
        stride = vision_values["patch_size"] * vision_values["spatial_merge_size"]
        return cls(
            language=language,
            vision=vision,
            tied=tied,
            image_token=tokens[0],
            vision_start=tokens[1],
            vision_end=tokens[2],
            pixels=_pixels(preprocessor, vision_values, stride),
            mean=_channels(preprocessor, "image_mean"),
            std=_channels(preprocessor, "image_std"),
            context_length=min(MAX_CONTEXT, int(language.max_position_embeddings)),
        )


def _part(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    part = content.get(key)
    if not isinstance(part, Mapping):
        raise ConfigError(f"config.json has no object {key}")
    return part


def _values(part: Mapping[str, Any], keys: tuple[str, ...], whose: str) -> dict[str, Any]:
    values = {key: part[key] for key in keys if part.get(key) is not None}
    for key in keys:
        if key not in values and key not in _OPTIONAL:
            raise ConfigError(f"{whose} lacks {key}")
    for key, value in values.items():
        most = _MOST.get(key, _MOST_ELSE)
        if key not in _NO_NUMBERS and (type(value) is not int or not 1 <= value <= most):
            raise ConfigError(f"{whose}.{key} is {quoted(value)}, not a whole number from 1 to {most}")
    if values.get("hidden_act", "silu") not in ACT2FN:
        raise ConfigError(f"{whose}.hidden_act is {quoted(values['hidden_act'])}, no activation that is known")
    epsilon = values.get("rms_norm_eps", 0.0)
    if type(epsilon) not in (int, float) or not 0 <= epsilon <= 1:
        raise ConfigError(f"{whose}.rms_norm_eps is {quoted(epsilon)}, not a number from 0 to 1")
    if not isinstance(values.get("attention_bias", False), bool):
        raise ConfigError(f"{whose}.attention_bias is {quoted(values['attention_bias'])}, neither true nor false")
    if values.get("in_channels", 3) != 3:
        raise ConfigError(f"{whose}.in_channels is {values['in_channels']}, supported: 3")
    if whose == "text_config":
        heads, width = values["num_attention_heads"], values["hidden_size"]
        values.setdefault("num_key_value_heads", heads)
        if "head_dim" not in values and width % heads:
            raise ConfigError(f"text_config.hidden_size {width} is no multiple of num_attention_heads {heads}")
        values.setdefault("head_dim", width // heads)
        if heads % values["num_key_value_heads"] or values["head_dim"] % 2:
            raise ConfigError(
                f"text_config has {heads} heads of {values['head_dim']} on {values['num_key_value_heads']} of keys"
            )
    return values


def _rope(text: Mapping[str, Any], head_dim: int) -> dict[str, Any]:
    """Rotary positions, as newer or older files write them; three axes, interleaved, without scaling."""
    written = text.get("rope_parameters") or text.get("rope_scaling") or {}
    if not isinstance(written, Mapping):
        raise ConfigError(f"rope_parameters is {quoted(written)}, not an object")
    theta = written.get("rope_theta", text.get("rope_theta", 5e6))
    kind, section = written.get("rope_type", "default"), written.get("mrope_section", [24, 20, 20])
    if kind != "default" or written.get("mrope_interleaved", True) is not True:
        raise ConfigError(f"rope_parameters are {quoted(dict(written), 200)}; supported are three interleaved axes")
    if type(theta) not in (int, float) or not 0 < theta <= 1e12:
        raise ConfigError(f"rope_theta is {quoted(theta)}, not a positive number up to 1e12")
    if (
        not isinstance(section, list)
        or len(section) != 3
        or not all(type(n) is int and n >= 0 for n in section)
        or sum(section) != head_dim // 2
        or max(section[1:]) * 3 > head_dim // 2 + 2
    ):
        raise ConfigError(f"mrope_section is {quoted(section)}, for heads of {head_dim}")
    return {"rope_type": "default", "rope_theta": float(theta), "mrope_section": section, "mrope_interleaved": True}


def _check_tower(vision: dict[str, Any], language: Mapping[str, Any]) -> None:
    taps, depth = vision["deepstack_visual_indexes"], vision["depth"]
    if (
        not isinstance(taps, list | tuple)
        or not all(type(tap) is int and 0 <= tap < depth for tap in taps)
        or list(taps) != sorted(set(taps))
        or len(taps) > language["num_hidden_layers"]
    ):
        raise ConfigError(f"deepstack_visual_indexes is {quoted(taps)}, for a tower of {depth} layers")
    if vision["out_hidden_size"] != language["hidden_size"]:
        theirs = language["hidden_size"]
        raise ConfigError(f"vision_config.out_hidden_size is {vision['out_hidden_size']}, text_config's is {theirs}")
    if vision["hidden_size"] % (4 * vision["num_heads"]):
        raise ConfigError(f"vision_config has {vision['num_heads']} heads in a width of {vision['hidden_size']}")
    if round(vision["num_position_embeddings"] ** 0.5) ** 2 != vision["num_position_embeddings"]:
        raise ConfigError(f"num_position_embeddings {vision['num_position_embeddings']} is no square")


def _pixels(preprocessor: Mapping[str, Any], vision: Mapping[str, Any], stride: int) -> tuple[int, int]:
    for key, ours in (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")):
        if preprocessor.get(key, vision[ours]) != vision[ours]:
            raise ConfigError(
                f"preprocessor_config.json: {key} is {quoted(preprocessor[key])}, config.json has {vision[ours]}"
            )
    size = preprocessor.get("size", {})
    if not isinstance(size, Mapping):
        raise ConfigError(f"preprocessor_config.json: size is {quoted(size)}, not an object")
    least, most = size.get("shortest_edge", 65_536), size.get("longest_edge", 16_777_216)
    if not all(type(value) is int and value >= stride**2 for value in (least, most)) or least > most:
        raise ConfigError(f"preprocessor_config.json: size is {quoted(dict(size))}, not from fewest to most pixels")
    return least, max(least, min(most, MAX_VIEW_PIXELS))


def _channels(preprocessor: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = preprocessor.get(key, [0.5, 0.5, 0.5])
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(type(value) in (int, float) and 0 <= value <= 1 for value in values)
        or (key == "image_std" and not all(values))
    ):
        raise ConfigError(f"preprocessor_config.json: {key} is {quoted(values)}")
    return (float(values[0]), float(values[1]), float(values[2]))
