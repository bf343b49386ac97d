# SPDX-License-Identifier: Apache-2.0
"""Reads a Qwen3-VL checkpoint as its publisher lays it out: config.json, safetensors, tokenizer.json."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from adatoken3d_ros.files import UnusableFile, read_file
from adatoken3d_ros.lmm.config_values import ConfigError
from adatoken3d_ros.lmm.official_layout import by_prefix, check_vocabulary, finish
from adatoken3d_ros.lmm.qwen3vl.config import Qwen3VLSettings
from adatoken3d_ros.lmm.qwen3vl.model import Qwen3VL
from adatoken3d_ros.lmm.safetensors_files import (
    CheckpointError,
    LoadReport,
    Progress,
    inventory,
    local_directory,
    read_json,
    some,
)
from adatoken3d_ros.text import shown

# Our names and those of the release. The first prefix that fits counts.
_OFFICIAL = (
    ("language.model.", "model.language_model."),
    ("language.", ""),
    ("vision.tower.", "model.visual."),
)
_HEAD, _TABLE = "language.lm_head.weight", "language.model.embed_tokens.weight"
_END, _PAD = "<|im_end|>", "<|endoftext|>"
_MAX_TOKENIZER_BYTES = 64 * 2**20


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    vision_path: str | Path | None = None,
    quantization: str = "none",
    progress: Progress | None = None,
    free_memory: Callable[[torch.device], int] | None = None,
) -> tuple[Qwen3VL, PreTrainedTokenizerFast, LoadReport]:
    """Loads model and tokenizer from a local directory; for the arguments see `registry.load`.

    Raises:
        CheckpointError: if anything is missing, too much, damaged, misshapen or does not fit into memory.
    """
    started = time.monotonic()
    path, device = local_directory(path), torch.device(device)
    if vision_path is not None:
        raise CheckpointError(f"{path}: this model has a vision tower of its own, and takes none from {vision_path}")
    model = outline(path)
    settings = model.settings
    stored = inventory(path)
    tokenizer, tokenizer_file = load_tokenizer(path)
    check_vocabulary(tokenizer, tokenizer_file, int(settings.language.vocab_size))
    wanted = official_names(model)
    sources = {ours: stored[official] for ours, official in wanted.items() if official in stored}
    spare = ["lm_head.weight"] if settings.tied else []  # some files repeat a tied output layer
    if extra := sorted(set(stored) - set(wanted.values()) - set(spare)):
        raise CheckpointError(f"{path} has tensors that no part of the model takes: {some(extra)}")
    report = finish(
        model,
        sources,
        wanted,
        path=path,
        tokenizer=tokenizer_file,
        ignored=[*set(stored) - set(wanted.values())],
        started=started,
        tied={_HEAD: _TABLE} if settings.tied else None,
        dtype=dtype,
        device=device,
        quantization=quantization,
        progress=progress,
        free_memory=free_memory,
    )
    return model, tokenizer, report


def outline(path: str | Path, vision_path: str | Path | None = None) -> Qwen3VL:
    """The model of a checkpoint without its weights (on the meta device), from its configuration alone.

    Raises:
        CheckpointError: if that is missing, damaged or not supported.
    """
    path = local_directory(path)
    preprocessor = path / "preprocessor_config.json"
    try:
        content = read_json(path / "config.json")
        settings = Qwen3VLSettings.from_dicts(content, read_json(preprocessor) if preprocessor.exists() else {})
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    with torch.device("meta"):
        return Qwen3VL(settings)


def official_names(model: Qwen3VL) -> dict[str, str]:
    """For each tensor of the model, by our name, its name in the official checkpoint.

    A tied output layer is not among them: it is the embedding table.
    """
    tied = {_HEAD} if model.settings.tied else set()
    return by_prefix((name for name in model.state_dict() if name not in tied), _OFFICIAL)


def load_tokenizer(directory: Path) -> tuple[PreTrainedTokenizerFast, Path]:
    """Reads `tokenizer.json`; returns the tokenizer and its file.

    Raises:
        CheckpointError: if it is missing, damaged, or lacks a token of the conversation.
    """
    path = directory / "tokenizer.json"
    try:
        backend: Any = Tokenizer.from_str(bytes(read_file(path, _MAX_TOKENIZER_BYTES)).decode())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (UnusableFile, OSError) as error:
        raise CheckpointError(str(error)) from error
    except Exception as error:  # the library raises this very class
        raise CheckpointError(f"{path} is no tokenizer file: {shown(error, 300)}") from error
    for token in ("<|im_start|>", _END, _PAD, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"):
        if backend.token_to_id(token) is None:
            raise CheckpointError(f"{path} lacks the control token {token}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=_END,
        pad_token=_PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer, path
