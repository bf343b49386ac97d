# SPDX-License-Identifier: Apache-2.0
"""Reads checkpoints in the layout that Video-3D LLM, 3DRS and Ross3D share: config.json and the names of tensors."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lmm.config_values import ConfigError
from adatoken3d_ros.lmm.official_layout import (
    by_prefix,
    check_layers,
    check_vocabulary,
    finish,
    locate,
    tower_directory,
)
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    LoadReport,
    Progress,
    Stored,
    inventory,
    local_directory,
    read_json,
    some,
)
from adatoken3d_ros.lmm.video3d.config import TEMPERATURE, Video3DConfig
from adatoken3d_ros.lmm.video3d.model import Video3D
from adatoken3d_ros.lmm.video3d.prompt import GROUND
from adatoken3d_ros.lmm.video3d.tokenizer import TokenizerError, load_tokenizer

# Our names and those of the releases. The first prefix that fits counts.
_OFFICIAL = (
    ("language.", ""),
    ("projector.", "model.mm_projector."),
    ("newline", "model.image_newline"),
    ("head.", "ground_head_"),
    ("vision.tower.", "model.vision_tower.vision_tower.vision_model."),
)
_VISION_PREFIX = _OFFICIAL[-1][1]
_HEAD, _TABLE, _ZERO_TARGET = "lm_head.weight", "model.embed_tokens.weight", "ground_head_zero_target"

# Tensors of the releases that no answer needs: what the tower's output is not taken from, heads of other kinds
# than ours that point at boxes, and what only served training. Anything else that is not the model's is refused.
_UNUSED = tuple(
    re.compile(pattern)
    for pattern in (
        r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm|head)\..+",
        r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
        r"model\.faster_token",
        r"ground_head(_obj|_query|_score)?\.[0-3]\.(weight|bias)",
        r"ground_head_(zero_target|temperature)",
        r"(model\.)?(corres_linear|linear_dc|geometric_linear|proj_3d)(\..+)?",  # 3DRS
        r"(model\.)?(mask_token|mm_inv_projector(\..+)?)",  # Ross3D
    )
)


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
    quantization: str = "none",
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> tuple[Video3D, PreTrainedTokenizerFast, LoadReport]:
    """Loads model and tokenizer from a local directory; arguments as `registry.load`.

    Returns:
        The model in evaluation mode without gradients, its tokenizer, and what was read.

    Raises:
        CheckpointError: if anything is missing, too much, damaged, misshapen or does not fit into memory.
    """
    started = time.monotonic()
    path, device = local_directory(path), torch.device(device)
    vision_dir = tower_directory(path, vision_path)
    stored = inventory(path)
    config = _as_stored(_config(path, vision_dir), stored, path)
    try:
        tokenizer, tokenizer_file = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    check_vocabulary(tokenizer, tokenizer_file, config.language.vocab_size)
    if config.coord_token is not None and not 0 <= config.coord_token < config.language.vocab_size:
        raise CheckpointError(
            f"{path}: coord_token_ids has {config.coord_token}, the table of tokens {config.language.vocab_size} rows"
        )
    if config.grounding is not None and GROUND not in tokenizer.get_added_vocab():
        raise CheckpointError(f"{tokenizer_file} has no {GROUND}, which the tensors {_ZERO_TARGET}, ... are for")
    with torch.device("meta"):
        model = Video3D(config)
    wanted = official_names(model)
    ignored = sorted(set(stored) - set(wanted.values()))
    last = f"{_VISION_PREFIX}encoder.layers.{config.vision_layers}."
    if strange := [n for n in ignored if not n.startswith(last) and not any(p.fullmatch(n) for p in _UNUSED)]:
        raise CheckpointError(f"{path} has {some(strange)}, which this model has not")
    sources, vision = locate(wanted, stored, _VISION_PREFIX, vision_dir, path)
    report = finish(
        model,
        sources,
        wanted,
        path=path,
        tokenizer=tokenizer_file,
        ignored=ignored,
        started=started,
        vision=vision,
        tied={f"language.{_HEAD}": f"language.{_TABLE}"} if config.language.tie_word_embeddings else None,
        dtype=dtype,
        device=device,
        quantization=quantization,
        progress=progress,
        free_memory=free_memory,
    )
    return model, tokenizer, report


def outline(path: str | Path, vision_path: str | Path | None = None) -> Video3D:
    """The model of a checkpoint without its weights (on the meta device), with the vocabulary of its files.

    Raises:
        CheckpointError: if a config.json is missing, damaged or not supported.
    """
    path = local_directory(path)
    config = _config(path, tower_directory(path, vision_path))
    if any(path.glob("*.safetensors")):
        config = _as_stored(config, inventory(path), path)
    with torch.device("meta"):
        return Video3D(config)


def official_names(model: Video3D) -> dict[str, str]:
    """For each tensor of the model, by our name, its name in the releases; without an output layer that is tied."""
    tied = {f"language.{_HEAD}"} if model.config.language.tie_word_embeddings else set()
    return by_prefix((name for name in model.state_dict() if name not in tied), _OFFICIAL)


def _config(path: Path, vision_dir: Path | None) -> Video3DConfig:
    vision = read_json(vision_dir / "config.json") if vision_dir is not None else None
    try:
        return Video3DConfig.from_dict(read_json(path / "config.json"), vision)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _as_stored(config: Video3DConfig, stored: Mapping[str, Stored], path: Path) -> Video3DConfig:
    """With the vocabulary of the files: config.json of the releases has that of the model before tokens were added.
    With the grounding head, too, if they hold one.

    Raises:
        CheckpointError: if there are other layers than config.json says.
    """
    check_layers(int(config.language.num_hidden_layers), stored, path)
    if config.grounding is None and _ZERO_TARGET in stored:
        config = replace(config, grounding=TEMPERATURE)
    shape = stored[_TABLE].shape if _TABLE in stored else ()
    if len(shape) != 2 or not shape[0]:
        return config
    language = copy.deepcopy(config.language)
    language.vocab_size = shape[0]
    language.tie_word_embeddings = _HEAD not in stored and language.tie_word_embeddings
    return replace(config, language=language)
