# SPDX-License-Identifier: Apache-2.0
"""Values of any config.json, checked before something is built of them: whole sizes, within reason."""

from __future__ import annotations

from collections.abc import Mapping
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
