# SPDX-License-Identifier: Apache-2.0
"""Reads a checkpoint in the layout of the official LLaVA-3D release: its config.json and the names of its tensors."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from adatoken3d_ros.lmm.identity import model_identity
from adatoken3d_ros.lmm.llava3d.config import ConfigError, Llava3DConfig
from adatoken3d_ros.lmm.llava3d.model import Llava3D
from adatoken3d_ros.lmm.llava3d.tokenizer import TokenizerError, load_tokenizer
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    LoadReport,
    Progress,
    Stored,
    check_filled,
    fill,
    inventory,
    local_directory,
    read_json,
    some,
)

# Our names and those of the release. The first prefix that fits counts.
_POSITION = {"lift": "0", "norm": "1", "out": "3"}
_OFFICIAL = (
    ("language.", ""),
    ("projector.", "model.mm_projector."),
    ("position.", "model.video_tower.video_tower.positional_embedding.position_embedding_head."),
    ("click.", "model.video_tower.prompt_encoder.pos_emb3d.position_embedding_head."),
    ("vision.tower.", "model.vision_tower.vision_tower.vision_model."),
)
_VISION_PREFIX = _OFFICIAL[-1][1]
_HEAD = "language.lm_head.weight"


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
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
        progress: called with (fraction of the bytes, name of the file) as loading goes on.
        free_memory: bytes free on a device; the machine's own answer if None.

    Returns:
        The model in evaluation mode without gradients, its tokenizer, and what was read.

    Raises:
        CheckpointError: if anything is missing, damaged, misshapen or does not fit into memory.
    """
    started = time.monotonic()
    path, device = local_directory(path), torch.device(device)
    vision_dir = local_directory(vision_path) if vision_path is not None else None
    config = load_config(path, vision_dir)
    stored = inventory(path)
    _check_layers(config, stored, path)  # first: what no file holds is not even built
    try:
        tokenizer, tokenizer_file = load_tokenizer(path)
    except TokenizerError as error:
        raise CheckpointError(str(error)) from error
    if len(tokenizer) > config.language.vocab_size:
        raise CheckpointError(
            f"{tokenizer_file} has {len(tokenizer)} tokens, config.json gives the model {config.language.vocab_size}"
        )

    with torch.device("meta"):
        model = Llava3D(config)
    wanted = official_names(model)
    sources, vision_source = _locate(wanted, stored, vision_dir, path)
    tied = {_HEAD: "language.model.embed_tokens.weight"} if config.language.tie_word_embeddings else {}
    weights = fill(
        model, sources, wanted, dtype=dtype, device=device, tied=tied, progress=progress, free_memory=free_memory
    )
    model.loaded_identity = model_identity(model.shape_hash, weights)
    # What is computed and not stored: rotary frequencies (float32 whatever the weights are), patch numbers.
    model.language.model.rotary_emb = LlamaRotaryEmbedding(config.language).to(device)
    model.vision.restore_buffers(device)
    check_filled(model)
    used = {source.name for source in sources.values() if source.file.parent == path}
    report = LoadReport(
        path=path,
        tensors=len(sources),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        ignored=sorted(set(stored) - used),
        files=tuple(sorted({source.file for source in sources.values()})),
        vision=vision_source,
        tokenizer=tokenizer_file,
        seconds=time.monotonic() - started,
    )
    return model, tokenizer, report


def outline(path: str | Path, vision_path: str | Path | None = None) -> Llava3D:
    """The model of a checkpoint without its weights (on the meta device), from its config.json alone.

    Raises:
        CheckpointError: as `load_config`.
    """
    config = load_config(local_directory(path), local_directory(vision_path) if vision_path is not None else None)
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
    names = {}
    for ours in model.state_dict():
        if ours == _HEAD and model.config.language.tie_word_embeddings:
            continue
        prefix, official = next(pair for pair in _OFFICIAL if ours.startswith(pair[0]))
        rest = ours.removeprefix(prefix)
        if prefix in ("position.", "click."):
            layer, parameter = rest.split(".")
            rest = f"{_POSITION[layer]}.{parameter}"
        names[ours] = official + rest
    return names


def _only(vision: Mapping[str, Any]) -> dict[str, Any]:
    return {"vision_config": vision.get("vision_config", vision)}


def _locate(
    wanted: Mapping[str, str], stored: Mapping[str, Stored], vision_dir: Path | None, path: Path
) -> tuple[dict[str, Stored], str]:
    """Our name -> stored tensor, for all that were found, and where the vision tower comes from."""
    sources = {ours: stored[official] for ours, official in wanted.items() if official in stored}
    tower = {ours: official for ours, official in wanted.items() if official.startswith(_VISION_PREFIX)}
    missing = [official for ours, official in tower.items() if ours not in sources]
    if not missing:
        return sources, "embedded"
    if vision_dir is None:
        # Some but not all is a damaged checkpoint, none is one that relies on a separate tower.
        if len(missing) < len(tower):
            raise CheckpointError(f"{path} lacks {some(missing)} of its vision tower")
        raise CheckpointError(
            f"{path} carries no vision tower ({_VISION_PREFIX}*): give the directory of the CLIP model as vision_path"
        )
    separate = inventory(vision_dir)
    for ours, official in tower.items():
        bare = official.removeprefix(_VISION_PREFIX)
        found = separate.get(f"vision_model.{bare}") or separate.get(bare)
        if found is None:
            raise CheckpointError(f"{vision_dir} lacks vision_model.{bare}")
        sources[ours] = found
    return sources, str(vision_dir)


def _check_layers(config: Llava3DConfig, stored: Mapping[str, Stored], path: Path) -> None:
    """As many layers in the files as config.json says."""
    found = {int(match[1]) for name in stored if (match := re.match(r"model\.layers\.(\d{1,9})\.", name))}
    said = int(config.language.num_hidden_layers)
    if len(found) != said:
        raise CheckpointError(f"{path}: config.json has num_hidden_layers {said}, the files hold {len(found)}")
