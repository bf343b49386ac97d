# SPDX-License-Identifier: Apache-2.0
"""A small checkpoint with random weights in the official layout: it answers nonsense, through every line of code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from adatoken3d_ros.lmm.qwen3vl.checkpoint import official_names
from adatoken3d_ros.lmm.qwen3vl.config import Qwen3VLSettings
from adatoken3d_ros.lmm.qwen3vl.model import Qwen3VL

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_tiny_checkpoint(
    path: str | Path,
    seed: int = 0,
    *,
    layers: int = 8,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vision_layers: int = 4,
    taps: tuple[int, ...] = (0, 1, 2),
    view_pixels: int = 128 * 96,
    context_length: int = 8192,
    tie_word_embeddings: bool = True,
) -> Path:
    """Writes config.json, preprocessor_config.json, safetensors and tokenizer.json; the same seed gives the same bytes.

    Args:
        view_pixels: most pixels of a view; a merged patch has 16 x 16.

    Returns:
        The directory, created if it was not there.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in CONTROL_TOKENS}
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": tokenizer.get_vocab_size() + 5,  # the release, too, has rows that no token uses
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context_length,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "rope_theta": 5e6,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_interleaved": True,
            "mrope_section": [head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6],
        },
        "tie_word_embeddings": tie_word_embeddings,
        "dtype": "float32",
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": vision_layers,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": list(taps),
        "hidden_act": "gelu_pytorch_tanh",
    }
    content = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": tie_word_embeddings,
        "text_config": text,
        "vision_config": vision,
    }
    preprocessor = {
        "size": {"shortest_edge": 32 * 32, "longest_edge": view_pixels},
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    settings = Qwen3VLSettings.from_dicts(content, preprocessor)
    for name, written in (("config.json", content), ("preprocessor_config.json", preprocessor)):
        (directory / name).write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save(str(directory / "tokenizer.json"))
    save_file(_random_weights(settings, seed), directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def byte_tokenizer() -> Tokenizer:
    """Bytes without merges, cut as the published tokenizer cuts, and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS])
    return tokenizer


def write_tokenizer(directory: Path) -> dict[str, int]:
    """Writes tokenizer.json; returns what config.json says of it."""
    tokenizer: Any = byte_tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return {key: tokenizer.token_to_id(token) for key, token in ids.items()}


def _random_weights(settings: Qwen3VLSettings, seed: int) -> dict[str, torch.Tensor]:
    """By official name: norms about one, small biases, matrices scaled so that signals keep their size."""
    with torch.device("meta"):
        model = Qwen3VL(settings)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    shapes = {ours: tuple(tensor.shape) for ours, tensor in model.state_dict().items()}
    for ours, official in official_names(model).items():
        shape = shapes[ours]
        noise = torch.randn(shape, generator=generator)
        if ours.endswith("bias"):
            weights[official] = 0.02 * noise
        elif "norm" in ours:
            weights[official] = 1 + 0.1 * noise
        elif "embed_tokens" in ours or "pos_embed" in ours:
            # Larger ones would let a tied output layer repeat the last token for ever.
            weights[official] = noise * (0.2 if settings.tied or "pos" in ours else 1.0)
        else:
            weights[official] = noise * torch.Size(shape[1:]).numel() ** -0.5
    return weights
