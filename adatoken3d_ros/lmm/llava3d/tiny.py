# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with random weights in the official layout: it answers nonsense, through every line of code."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from adatoken3d_ros.lmm.llava3d.checkpoint import official_names
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tokenizer import llama_tokenizer, word_vocabulary
from adatoken3d_ros.lmm.random_weights import random_weights

WORDS = """
A a an the The chat between curious human user and artificial intelligence assistant. assistant gives helpful, detailed,
polite answers to human's user's questions. USER: ASSISTANT: related object objects is are was were located at
Describe describe in detail. detail Please output 3D bounding box of then it It localized Answer answer question using
one word or phrase. What what Which which Where where How how many much Is Are Can can Tell tell me only I see from
other this that there There here on under over above below behind front left right next near far between beside inside
with without room table chair desk shelf sofa bed lamp door window wall floor ceiling box ball sphere monitor keyboard
mouse book plant cup bottle cabinet picture curtain red green blue yellow white black brown grey orange purple colour
color shape size big small large tall short round square wooden metal closest farthest largest smallest yes no not you
two three four five six seven eight nine ten metres meters centimetres high wide long it's its they them he she my your
"""


def write_tiny_checkpoint(
    path: str | Path,
    seed: int = 0,
    *,
    layers: int = 8,
    hidden_size: int = 64,
    intermediate_size: int = 160,
    heads: int = 4,
    kv_heads: int | None = None,
    vision_layers: int = 3,
    vision_hidden_size: int = 32,
    vision_heads: int = 4,
    image_size: int = 112,
    patch_size: int = 14,
    num_views: int = 20,
    max_spatial_tokens: int = 2560,
    context_length: int = 4096,
    tie_word_embeddings: bool = False,
    shards: int = 1,
) -> Path:
    """Writes config.json, safetensors (with the vision tower) and tokenizer.json; the same seed gives the same bytes.

    Returns:
        The directory, created if it was not there.

    Raises:
        ConfigError: for sizes that fit no model.
        ValueError: if `shards` is less than 1.
    """
    if shards < 1:
        raise ValueError(f"shards must be at least 1, got {shards}")
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    vocab, merges = word_vocabulary(WORDS.split())
    content = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": len(vocab),
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "max_position_embeddings": context_length,
        "tokenizer_model_max_length": context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "float32",
        "mm_hidden_size": vision_hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": "tiny",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_video_tower": "SpatialAwareModule",
        "num_frames": num_views,
        "max_spatial_tokens": max_spatial_tokens,
        "vision_config": {
            "hidden_size": vision_hidden_size,
            "intermediate_size": 2 * vision_hidden_size,
            "projection_dim": vision_hidden_size,
            "num_hidden_layers": vision_layers,
            "num_attention_heads": vision_heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
    }
    config = Llava3DConfig.from_dict(content)
    (directory / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    llama_tokenizer(vocab, merges).backend_tokenizer.save(str(directory / "tokenizer.json"))
    _save(directory, _random_weights(config, seed, vocab), shards)
    return directory


def write_tokenizer(directory: Path) -> dict[str, int]:
    """Writes tokenizer.json; returns what config.json says of it."""
    llama_tokenizer(*word_vocabulary(WORDS.split())).backend_tokenizer.save(str(directory / "tokenizer.json"))
    return {"pad_token_id": 0}


def _random_weights(config: Llava3DConfig, seed: int, vocab: dict[str, int]) -> dict[str, torch.Tensor]:
    """By official name."""
    with torch.device("meta"):
        model = Llava3D(replace(config, select_layer=-1))  # the release, too, carries the layers that never run
    weights = random_weights(model, official_names(model), seed)
    # Bytes and control tokens other than the end get no weight in the output, so that an answer is printable.
    if (head := weights.get("lm_head.weight")) is not None:
        head[[index for token, index in vocab.items() if token.startswith("<") and len(token) > 1 and index != 2]] = 0.0
    return weights


def _save(directory: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    for stale in (*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")):
        stale.unlink()
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[number::shards])
        weight_map.update(dict.fromkeys(part, name))
        save_file(part, directory / name, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")
