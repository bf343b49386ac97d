# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with random weights in the official layout: it answers nonsense, through every line of code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adatoken3d_ros.lmm.random_weights import random_weights
from adatoken3d_ros.lmm.video3d.checkpoint import official_names
from adatoken3d_ros.lmm.video3d.config import Video3DConfig
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.prompt import COORD
from adatoken3d_ros.lmm.video3d.tokenizer import qwen_tokenizer, word_vocabulary

WORDS = """
You are a helpful assistant. Given an object objects located at The the video captures spatial information of scene.
Describe describe in detail. What what Which which Where where How how many much Is Are Can can I see from this that
there on under above below behind front left right next near between room table chair desk shelf sofa bed lamp door
window wall floor box ball monitor keyboard book plant cup red green blue yellow white black brown yes no one two three
four five six is are big small tall short closest farthest
"""


def write_tiny_checkpoint(
    path: str | Path,
    seed: int = 0,
    *,
    layers: int = 8,
    hidden_size: int = 64,
    intermediate_size: int = 160,
    heads: int = 4,
    kv_heads: int = 2,
    vision_layers: int = 3,
    vision_hidden_size: int = 32,
    vision_heads: int = 4,
    image_size: int = 102,
    patch_size: int = 14,
    num_views: int = 32,
    context_length: int = 4096,
    extra: dict[str, torch.Tensor] | None = None,
    split_tokenizer: bool = False,
    grounds: bool = False,
) -> Path:
    """Writes config.json, safetensors (with the vision tower) and the tokenizer; the same seed gives the same bytes.

    Args:
        path: the directory, created if it was not there, and returned.
        image_size: by default of 7 x 7 patches and a rest of 4 pixels, as odd as the published tower.
        extra: further tensors, as releases carry them for training.
        grounds: with the head that points at boxes.
        split_tokenizer: as vocab.json, merges.txt and added_tokens.json, and not as tokenizer.json.

    Raises:
        ConfigError: for sizes that fit no model.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges, added = word_vocabulary(WORDS.split())
    content: dict[str, Any] = {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "vocab_size": len(vocab),  # without the added tokens, as in the releases
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": context_length,
        "tokenizer_model_max_length": context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "add_faster_video": False,
        "mm_hidden_size": vision_hidden_size,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_vision_tower": "tiny",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "world_position_embedding_type": "avg-discrete-sin3d",
        "voxel_size": 0.1,
        "min_xyz_range": [-15, -15, -5],
        "max_xyz_range": [15, 15, 5],
        "frames_upbound": num_views,
        **({"ground_head_type": "infonce", "object_feature_type": "patch14-pe"} if grounds else {}),
        "vision_config": {
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
        },
    }
    whole = len(vocab) + len(added)
    config = Video3DConfig.from_dict({**content, "vocab_size": whole, "coord_token_ids": [added[COORD]]})
    content["coord_token_ids"] = [added[COORD]]
    _write_json(directory / "config.json", content)
    if split_tokenizer:
        _write_json(directory / "vocab.json", vocab)
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_json(directory / "added_tokens.json", added)
    else:
        qwen_tokenizer(vocab, merges, added).backend_tokenizer.save(str(directory / "tokenizer.json"))
    weights = {**_random_weights(config, seed, len(vocab)), **(extra or {})}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _random_weights(config: Video3DConfig, seed: int, n_text: int) -> dict[str, torch.Tensor]:
    """By official name."""
    with torch.device("meta"):
        model = Video3D(config)
    weights = random_weights(model, official_names(model), seed)
    # Single bytes get no weight in the output, so that an answer is printable; nor do added tokens.
    weights["lm_head.weight"][:256] = 0.0
    weights["lm_head.weight"][n_text:] = 0.0
    width = int(config.vision.hidden_size)
    for name in ("weight", "bias"):
        weights[f"model.vision_tower.vision_tower.vision_model.post_layernorm.{name}"] = torch.ones(width)
    return weights


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
