# SPDX-License-Identifier: Apache-2.0
"""Values of any config.json, checked before something is built of them: whole sizes, within reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformers.activations import ACT2FN

from adatoken3d_ros.text import quoted

# The largest sizes that are built; published models stay far below, and beyond lies only a machine's undoing.
_MOST = {
    "vocab_size": 2**22,
    "hidden_size": 2**16,
    "intermediate_size": 2**18,
    "projection_dim": 2**16,
    "num_hidden_layers": 512,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 2**12,
    "max_position_embeddings": 2**24,
    "image_size": 2**13,
    "patch_size": 2**13,
    "bos_token_id": 2**22,
    "eos_token_id": 2**22,
    "pad_token_id": 2**22,
}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "initializer_range")
_SWITCHES = ("tie_word_embeddings", "attention_bias", "mlp_bias")


class ConfigError(ValueError):
    """A config.json that describes no model we can build; the message names the key and its value."""


def check_values(values: Mapping[str, Any], whose: str = "") -> None:
    """Sizes are whole and within _MOST, the rest of its kind: what follows may build and divide by them."""
    for key, value in values.items():
        if key in _MOST:
            least, most = -1 if key in _TOKENS else 1, _MOST[key]
            several = value if isinstance(value, list) and key == "eos_token_id" else [value]
            if not all(type(one) is int and least <= one <= most for one in several):
                # A pair of sizes is told by name where the square is checked.
                if key in ("image_size", "patch_size") and not isinstance(value, int | float | str):
                    raise ConfigError(f"{key} of the vision tower must be one integer, got {quoted(value)}")
                raise ConfigError(f"{whose}{key} is {quoted(value)}, not a whole number from {least} to {most}")
        elif key in _EPSILONS:
            if type(value) not in (int, float) or not 0 <= value <= 1:
                raise ConfigError(f"{whose}{key} is {quoted(value)}, not a number from 0 to 1")
        elif key in _SWITCHES:
            if not isinstance(value, bool):
                raise ConfigError(f"{whose}{key} is {quoted(value)}, neither true nor false")
        elif key == "hidden_act" and (not isinstance(value, str) or value not in ACT2FN):
            raise ConfigError(f"{whose}hidden_act is {quoted(value)}, no activation that is known")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and width % heads:
        raise ConfigError(f"{whose}hidden_size {width} is no multiple of num_attention_heads {heads}")
    if values.get("head_dim", width // heads) % 2:
        raise ConfigError(f"{whose}heads are {values.get('head_dim', width // heads)} wide, not an even number")
    if not isinstance(pad := values.get("pad_token_id", 0), int) or pad >= values.get(
        "vocab_size", _MOST["vocab_size"]
    ):
        raise ConfigError(f"pad_token_id is {quoted(pad)}, the vocabulary has {values['vocab_size']} tokens")


def check_fixed(content: Mapping[str, Any], fixed: Mapping[str, Sequence[Any]]) -> None:
    """Raises ConfigError for a setting that has another value than those that are supported."""
    for key, allowed in fixed.items():
        if key in content and content[key] not in allowed:
            raise ConfigError(f"{key} is {quoted(content[key], 200)}, supported: {', '.join(map(repr, allowed))}")


def described_tower(
    content: Mapping[str, Any], vision: Mapping[str, Any] | None, known: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """What config.json says of its vision tower: an object `vision_config`, else the name of a known one in
    `mm_vision_tower`, else `vision`, the content of the vision tower's own config.json.

    Raises:
        ConfigError: if none of them describes it.
    """
    name = str(content.get("mm_vision_tower") or "")
    described = content.get("vision_config")
    if described is None:
        described = known.get(name.rstrip("/").rsplit("/", 1)[-1])
    if described is None and vision is not None:
        described = vision.get("vision_config", vision)  # a model of pictures and text keeps it one level down
    if not isinstance(described, Mapping):
        raise ConfigError(
            f"mm_vision_tower is {name!r}, which is not known here, and config.json has no object vision_config: "
            "give the directory of the vision tower"
        )
    return described


def chosen(content: Mapping[str, Any], keys: Sequence[str], required: Sequence[str], whose: str) -> dict[str, Any]:
    """The values of `keys` that there are; raises ConfigError, beginning with `whose`, if a required one is missing."""
    for key in required:
        if content.get(key) is None:
            raise ConfigError(f"{whose} lacks {key}")
    return {key: content[key] for key in keys if content.get(key) is not None}


def rope_theta(content: Mapping[str, Any], default: float) -> float:
    """Base of the rotary frequencies; raises ConfigError for one that is no positive number up to 1e12."""
    theta = float(content.get("rope_theta") or (content.get("rope_parameters") or {}).get("rope_theta", default))
    if not 0 < theta <= 1e12:
        raise ConfigError(f"rope_theta is {theta}, not a positive number up to 1e12")
    return theta


def check_heads(values: Mapping[str, Any]) -> None:
    """Raises ConfigError where heads do not share key heads evenly."""
    heads, keys = values["num_attention_heads"], values.get("num_key_value_heads", values["num_attention_heads"])
    if heads % keys:
        raise ConfigError(f"num_attention_heads {heads} is no multiple of {keys} key heads")


def shape_hash(shape: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that tell models of different shape apart (not different weights)."""
    canonical = json.dumps(shape, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
