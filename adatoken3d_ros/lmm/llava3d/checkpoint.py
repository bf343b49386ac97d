# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint in the layout of the official LLaVA-3D release: its config.json and the names of its tensors."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.lmm.config_values import ConfigError
from adatoken3d_ros.lmm.llava3d.config import Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tokenizer import TokenizerError, load_tokenizer
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
    inventory,
    local_directory,
    read_json,
    some,
)

logger = logging.getLogger(__name__)

# Our names and those of the release. The first prefix that fits counts.
_POSITION = "model.video_tower.video_tower.positional_embedding.position_embedding_head."
_CLICK = "model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head."
_OFFICIAL = (
    ("language.", ""),
    ("projector.", "model.mm_projector."),
    *(
        (f"{part}.{ours}.", f"{official}{number}.")
        for part, official in (("position", _POSITION), ("click", _CLICK))
        for ours, number in (("lift", 0), ("norm", 1), ("out", 3))
    ),
    ("vision.tower.", "model.vision_tower.vision_tower.vision_model."),
)
_VISION_PREFIX = _OFFICIAL[-1][1]
_HEAD = "language.lm_head.weight"
# Of use to nobody: rotary frequencies that older transformers wrote, and what of the tower is not run.
_UNUSED = re.compile(rf"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|{re.escape(_VISION_PREFIX)}.+")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
    quantization: str = "none",
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> tuple[Llava3D, PreTrainedTokenizerFast, LoadReport]:
    """Loads model and tokenizer from a local directory.

    Args:
        path: directory with config.json, the tokenizer (tokenizer.model or tokenizer.json) and safetensors files,
            sharded with or without an index, or single.
        dtype: of all weights; None keeps what is stored.
        device: where the weights go.
        vision_path: directory of a CLIP model in safetensors, used where the checkpoint carries no vision tower.
        quantization: what the language model's linear layers become, see `registry.load`.
        progress: called with (fraction of the bytes, name of the file) as loading goes on.
        free_memory: bytes free on a device; the machine's own answer if None.

    Returns:
        The model in evaluation mode without gradients, its tokenizer, and what was read.

    Raises:
        CheckpointError: if anything is missing, damaged, misshapen or does not fit into memory.
    """
    started = time.monotonic()
    path, device = local_directory(path), torch.device(device)
    vision_dir = tower_directory(path, vision_path)
    config = load_config(path, vision_dir)
    stored = inventory(path)
    check_layers(int(config.language.num_hidden_layers), stored, path)  # first: what no file holds is not even built
    try:
        tokenizer, tokenizer_file = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    check_vocabulary(tokenizer, tokenizer_file, config.language.vocab_size)
    with torch.device("meta"):
        model = Llava3D(config)
    wanted = official_names(model)
    sources, vision = locate(wanted, stored, _VISION_PREFIX, vision_dir, path)
    ignored = sorted(set(stored) - {source.name for source in sources.values() if source.file.parent == path})
    if strange := [name for name in ignored if not _UNUSED.fullmatch(name)]:
        # The release was never opened where this was written: what it may have beside its code's own is not refused.
        logger.warning("%s has tensors that no part of the model takes: %s", path, some(strange))
    report = finish(
        model,
        sources,
        wanted,
        path=path,
        tokenizer=tokenizer_file,
        ignored=ignored,
        started=started,
        vision=vision,
        tied={_HEAD: "language.model.embed_tokens.weight"} if config.language.tie_word_embeddings else None,
        dtype=dtype,
        device=device,
        quantization=quantization,
        progress=progress,
        free_memory=free_memory,
    )
    return model, tokenizer, report


def outline(path: str | Path, vision_path: str | Path | None = None) -> Llava3D:
    """The model of a checkpoint without its weights (on the meta device), from its config.json alone.

    Raises:
        CheckpointError: as `load_config`.
    """
    path = local_directory(path)
    config = load_config(path, tower_directory(path, vision_path))
    with torch.device("meta"):
        return Llava3D(config)


def load_config(path: Path, vision_dir: Path | None = None) -> Llava3DConfig:
    """The configuration of the checkpoint in `path`, with the vision tower's own if config.json does not describe it.

    Raises:
        CheckpointError: if a config.json is missing, damaged or not supported.
    """
    vision = read_json(vision_dir / "config.json") if vision_dir is not None else None
    try:
        config = Llava3DConfig.from_dict(read_json(path / "config.json"), vision)
        if vision is not None:
            # Heads leave no trace in the shapes of tensors: a tower with others would load and be wrong.
            given = Llava3DConfig.from_dict({**read_json(path / "config.json"), "mm_vision_tower": "", **_only(vision)})
            for key in ("num_attention_heads", "patch_size", "image_size", "hidden_act", "taps"):
                ours, theirs = getattr(config.vision, key, None), getattr(given.vision, key, None)
                if ours != theirs:
                    raise CheckpointError(f"{vision_dir}: {key} is {theirs!r}, the checkpoint asks for {ours!r}")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config


def official_names(model: Llava3D) -> dict[str, str]:
    """For each tensor of the model, by our name, its name in the official checkpoint.

    A tied output layer is not among them: it is the embedding table.
    """
    tied = {_HEAD} if model.config.language.tie_word_embeddings else set()
    return by_prefix((name for name in model.state_dict() if name not in tied), _OFFICIAL)


def _only(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {"vision_config": vision.get("vision_config", vision)}
